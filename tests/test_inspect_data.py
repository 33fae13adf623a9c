"""inspect_data.py as a user calls it: what it prints, how it ends, and the page it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, GOLDEN_DATA, LLM_TYPES, ROOT
from transformers import AutoConfig, AutoTokenizer

from finetune.dataset import SupervisedDataset, load_samples
from finetune.inspect_data import Inspection, as_text


def inspect(*flags: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "finetune" / "inspect_data.py"), *map(str, flags)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture
def base(tmp_path) -> Path:
    """A 2.5 checkpoint without weights, which are not needed."""
    folder = tmp_path / "base"
    shutil.copytree(GOLDEN["llama3"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def open_data(llm_type: str, max_length: int | None = None) -> tuple[SupervisedDataset, AutoConfig]:
    config = AutoConfig.from_pretrained(GOLDEN[llm_type])
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    samples = load_samples(GOLDEN_DATA / "samples.json")
    return SupervisedDataset.for_checkpoint(config, tokenizer, samples, max_length), config


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_numbers_are_those_of_the_items(llm_type):
    dataset, config = open_data(llm_type)
    items = [dataset[n] for n in range(6)]
    total = sorted(len(item["input_ids"]) for item in items)
    found = Inspection(dataset)
    summary = found.summary(config, ["samples.json"])
    assert sorted(found.lengths()["total"].tolist()) == total
    picture = [int(item["image_bound"].diff(dim=1).sum()) for item in items]
    assert found.lengths()["picture"].tolist() == picture
    assert found.slices().sum() == sum(len(item["pixel_values"]) for item in items)
    assert summary["tokens"]["total"]["max"] == total[-1] and summary["tokens"]["total"]["min"] == total[0]
    assert summary["truncated_at"]["512"] == sum(n > 512 for n in total) == 0
    recommended = summary["recommended_model_max_length"]
    assert total[-1] <= recommended < total[-1] + 64 and summary["truncated_at"][str(recommended)] == 0
    assert summary["problems"] == [] and summary["nothing_supervised"] == 0
    assert f"--model_max_length {recommended}" in as_text(summary)

    limit = total[2]
    dataset, _ = open_data(llm_type, limit)
    found = Inspection(dataset)
    summary = found.summary(config, ["samples.json"])
    assert summary["truncated_at"][str(limit)] == sum(n > limit for n in total)
    lost = [item for item in items if (item["labels"][:limit] == -100).all()]
    assert summary["nothing_supervised"] == len(summary["problems"]) == len(lost)
    for card in found.cards():
        item = next(item for item in items if item["id"] == card.name)
        assert len(card.item["input_ids"]) == len(item["input_ids"])
        if "nothing supervised" in card.reasons:
            assert card.kept == 0
        else:
            assert ("truncated" in card.reasons) == (card.kept < len(item["input_ids"])) or card.kept <= limit
    assert {reason for card in found.cards() for reason in card.reasons} >= {"first samples", "longest", "most slices"}


def test_clean_data(base, tmp_path):
    """Status 0; the same numbers as text, as JSON and on the page."""
    report = tmp_path / "deep" / "report"
    flags = ("--model_name_or_path", base, "--data_path", GOLDEN_DATA / "samples.json")
    as_json = inspect(*flags, "--json", "--report", report, "--num_workers", 2)
    assert as_json.returncode == 0, as_json.stderr[-2000:]
    summary = json.loads(as_json.stdout)
    assert summary["samples"] == summary["with_pictures"] == 6
    page = (report / "report.html").read_text()
    assert f"--model_max_length {summary['recommended_model_max_length']}" in page
    assert [entry.name for entry in report.iterdir()] == ["report.html"]


def test_problems_end_with_status_1(base, tmp_path):
    samples = json.loads((GOLDEN_DATA / "samples.json").read_text())
    samples[1]["image"] = "gone.png"
    damaged = bytearray((GOLDEN_DATA / "images" / "a.png").read_bytes())
    damaged[60:120] = bytes(60)  # the header and the end are well
    (tmp_path / "damaged.png").write_bytes(damaged)
    samples[2]["image"] = str(tmp_path / "damaged.png")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(samples))
    flags = ("--model_name_or_path", base, "--data_path", path, "--image_folder", GOLDEN_DATA)
    result = inspect(*flags, "--report", tmp_path)
    assert result.returncode == 1, result.stderr[-2000:]
    assert re.search(r"sample 1 \(id '1'\): picture \S+gone\.png does not exist", result.stdout)
    assert "sample 2 (id '2'): picture" in result.stdout and "2 with problems" in result.stdout
    assert "gone.png does not exist" in (tmp_path / "report.html").read_text()
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_wrong_calls_are_reported_together(tmp_path):
    flags = ("--model_name_or_path", "./none", "--data_path", "none.json", "--max_slice_nums", 0, "--num_workers", -1)
    result = inspect(*flags, "--image_folder", "nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    for word in ("./none", "none.json", "--max_slice_nums 0", "--num_workers -1", "nowhere"):
        assert word in result.stderr
    assert "Traceback" not in result.stderr
