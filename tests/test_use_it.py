"""The README's section "Use it", run as it stands there: its commands in their order, its Python as a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_adapter
from PIL import Image

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Use it\n")[2].partition("\n## ")[0]
BLOCKS = [block for block in re.findall(r"```(shell|python)\n(.*?)```", SECTION, re.S) if "hf upload" not in block[1]]


@pytest.fixture(scope="module")
def place(tiny, data_file, tmp_path_factory) -> Path:
    """A folder with everything that the section names: models, adapters, a picture, data."""
    place = tmp_path_factory.mktemp("place")
    (place / "finetune").symlink_to(ROOT / "finetune")
    models = {"MiniCPM-Llama3-V-2_5": tiny["llama3"], "MiniCPM-V-2": tiny["minicpm"]}
    for name, folder in models.items():
        shutil.copytree(folder, place / "openbmb" / name)
    for seed, name in enumerate(("lora", "food", "signs")):
        write_adapter(place / "openbmb" / "MiniCPM-Llama3-V-2_5", place / "output" / name, seed=seed)
    shutil.copytree(data_file.parent, place / "my")
    shutil.copyfile(place / "my" / "train.json", place / "my" / "eval.json")
    Image.new("RGB", (200, 120), (200, 30, 30)).save(place / "my" / "picture.jpg")
    questions = [{"question": "What is this?", "image": "my/picture.jpg"}, {"question": "What is a cake?"}]
    (place / "my" / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in questions))
    return place


def test_every_part_has_its_command():
    commands = "".join(text for kind, text in BLOCKS if kind == "shell")
    for program in ("chat.py", "evaluate.py", "merge_lora.py --adapter", "merge_lora.py --modernize"):
        assert f"python finetune/{program}" in commands
    assert "--predict_with_generate true" in commands and "--lora_weight_path" in commands
    assert "load_adapters" in "".join(text for kind, text in BLOCKS if kind == "python")


def _some_are_slow(number: int):
    slow = any(word in BLOCKS[number][1] for word in ("finetune_lora.sh", "--compare", "--json"))
    return pytest.param(number, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("number", [_some_are_slow(number) for number in range(len(BLOCKS))])
def test_as_shown(number, place):
    kind, text = BLOCKS[number]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(place),
        "XDG_STATE_HOME": str(place),
    }
    if kind == "python":
        file = place / "snippet.py"
        file.write_text(text, encoding="utf-8")
        text = "python snippet.py"
    # Answers are drawn at random and may be long: none goes into another's prompt, where it might not fit.
    typed = "What is a cake?\n/reset\n/image my/picture.jpg\nWhat is this?\n"
    result = subprocess.run(
        ["sh", "-e", "-c", text], cwd=place, env=environment, input=typed, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, f"{text}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    assert "Traceback" not in result.stderr, result.stderr[-6000:]
