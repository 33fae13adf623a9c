"""benchmarks/train_step.py: its numbers agree with each other, and its count of FLOPs with one made by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TESTS

from finetune.minicpmv import MiniCPMVConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
import growth
import train_step

PICTURES = ("--pictures", "200x120,112x112,text", "--answer_tokens", "20")


def measure(tmp_path: Path, *flags: str) -> dict:
    """Result of a run of the benchmark as a user starts it, from its file."""
    path = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/train_step.py", *PICTURES, "--json", str(path), *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    result = json.loads(path.read_text())
    lines = run.stdout.splitlines()
    assert json.loads(lines[-1]) == result
    assert "| name | value |" in lines
    check(result)
    return result


def check(result: dict) -> None:
    """What holds between the numbers of every result."""
    seconds, per_step = result["step_seconds"], result["per_step"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert seconds["mean"] == pytest.approx(result["host_step_seconds"])
    for rate in ("samples", "tokens", "supervised_tokens"):
        assert result[f"{rate}_per_second"] == pytest.approx(per_step[rate] / seconds["mean"])
    assert per_step["samples"] == result["samples_per_process"] * result["processes"]
    for kind in ("done", "model"):
        rate = result[f"tflop_per_step_{kind}"] / seconds["mean"] / result["processes"]
        assert result[f"tflops_{kind}"] == pytest.approx(rate)
        assert result[f"fraction_{kind}"] == pytest.approx(rate / result["matmul_tflops"])
    assert result["fraction_done"] >= result["fraction_model"] > 0
    assert 0 <= result["data_wait_seconds"] < seconds["max"]
    assert result["host_gib"] > 0
    assert all(map(math.isfinite, result["losses"]))
    assert result["loss"] in result["losses"]
    assert {"torch", "transformers", "deepspeed"} == set(result["versions"])


def test_lora_with_deepspeed(tmp_path):
    zero2 = ("--deepspeed", "finetune/ds_config_zero2.json")
    result = measure(tmp_path, "--model", "tiny-2.5", "--batch", "2", "--steps", "3", "--warmup", "1", *zero2)
    assert len(result["losses"]) == 4
    assert result["parameters"]["trained"] > 0
    assert result["parameters"]["frozen"] > 0
    # 3 steps of 2 samples: every size twice, 3 slices, 1 slice and none
    assert result["per_step"]["slices"] == pytest.approx((3 + 1 + 0) * 2 / 3)
    assert result["tflop_per_step_done"] > result["tflop_per_step_model"]  # checkpointing is on


@pytest.mark.slow
def test_full_without_deepspeed_and_flags_passed_on(tmp_path):
    profile = tmp_path / "profile.txt"
    passed_on = ("--gradient_accumulation_steps", "2", "--gradient_checkpointing=false", "--profile", str(profile))
    result = measure(tmp_path, "--model", "tiny-2.0", "--method", "full", "--steps", "1", "--warmup", "1", *passed_on)
    assert result["samples_per_process"] == 2
    assert result["parameters"]["frozen"] == 0
    assert len(result["losses"]) == 2 + train_step.PROFILED_STEPS
    assert result["tflop_per_step_done"] == result["tflop_per_step_model"]
    assert "aten::mm" in profile.read_text()


@pytest.mark.slow
def test_zero3_on_two_processes(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["benchmarks/train_step.py", *PICTURES, "--json", str(path), "--model", "tiny-2.5", "--steps", "2"]
    command += ["--warmup", "1", "--deepspeed", "finetune/ds_config_zero3.json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    result = json.loads(path.read_text())
    check(result)
    assert result["processes"] == 2
    whole = measure(tmp_path, "--model", "tiny-2.5", "--steps", "1", "--warmup", "0")
    assert result["parameters"] == whole["parameters"]  # of the whole model, not of one process's share


def test_flags_of_the_benchmark_itself_are_refused():
    with pytest.raises(SystemExit):
        train_step.parse(["--data_path", "mine.json"])
    options, further = train_step.parse(["--deepspeed", "none", "--batch", "3", "--tune_vision", "false"])
    assert (options.deepspeed, options.batch, further) == ("", 3, ["--tune_vision", "false"])


def test_growth_comes_from_turns(tmp_path):
    """Warm-up sees every entry, then each has its steps; the table and the plot are of what the results say."""
    options, _ = train_step.parse(["--pictures", "112x112,text:9", "--turn", "3", "--warmup", "3"])
    assert options.steps == 6
    assert train_step.order_of_entries(options, 9, 1) == [0, 1, 0, 0, 0, 0, 1, 1, 1]
    assert train_step.order_of_entries(options, 4, 2) == [0, 0, 1, 1, 0, 0, 0, 0]
    in_turn, _ = train_step.parse(["--pictures", "112x112,text"])
    assert train_step.order_of_entries(in_turn, 3, 1) == [0, 1, 0]
    slices = [{"slices": n, "tokens": 9, "seconds": n / 10} for n in (5, 1)]
    text = [{"slices": 0, "tokens": n, "seconds": n / 1000} for n in (100, 300)]
    named = {"model": "2.5", "method": "lora", "device": "none"}
    batch = {"by_entry": [], "samples_per_process": 2, "step_seconds": {"median": 0.7}}
    results = [{**named, "by_entry": slices + text}, batch]
    for number, result in enumerate(results):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    grown = growth.points(results)
    assert grown == {"slices": [(1, 0.1), (5, 0.5)], "tokens": [(100, 0.1), (300, 0.3)], "batch": [(2, 0.7)]}
    command = [sys.executable, ROOT / "benchmarks" / "growth.py", "0.json", "1.json", "--plot", "growth.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "| slices | 5 | 0.5000 | 0.100000 |" in run.stdout and "| tokens | 300 | 0.3000 | 0.001000 |" in run.stdout
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_flops_of_the_real_model_by_hand():
    """One picture of 1024 patches, 300 tokens, 100 of them supervised."""
    config = MiniCPMVConfig(**json.loads((TESTS / "hub" / "minicpm_llama3_v2_5_config.json").read_text()))
    counts = train_step.Counts([300], 100, [1024])

    def flops(trained: set[str], vision: bool, llm: bool, lora: int = 0) -> tuple[float, float]:
        return train_step.step_flops(config, counts, trained, vision, llm, lora)

    vision = 1024 * 27 * (2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 1152 * 1024)
    patches = 1024 * 2 * 3 * 14 * 14 * 1152
    keys = 1024 * 2 * (1152 * 4096 + 2 * 4096**2)
    queries, outputs, looks = 2 * 96 * 4096**2, 2 * 96 * 2 * 4096**2, 4 * 4096 * 96 * 1024
    linear = 300 * 32 * 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    causal = 32 * 4 * 4096 * 300 * 300 // 2
    head = 100 * 2 * 4096 * 128256
    lora = 32 * 64 * (4096 + 4096 + 4096 + 1024)  # of q_proj and k_proj

    tower = 3 * vision + 2 * patches + 3 * keys + 3 * queries + 3 * outputs + 3 * looks
    adapter = 3 * 300 * 2 * lora
    done, model = flops({"vpm", "resampler"}, False, False, lora)
    assert done == model == pytest.approx(tower + 2 * linear + 3 * causal + 2 * head + adapter, rel=1e-12)
    full = flops({"vpm", "resampler", "llm"}, False, False)[1]
    assert full == pytest.approx(tower + 3 * linear + 3 * causal + 3 * head, rel=1e-12)
    frozen = flops(set(), True, False, lora)
    assert frozen[0] == frozen[1]  # a frozen tower has no backward pass for which to compute anything again
    frozen_tower = vision + patches + keys + queries + outputs + looks
    assert frozen[1] == pytest.approx(frozen_tower + 2 * linear + 3 * causal + 2 * head + adapter, rel=1e-12)

    # Checkpointing adds exactly the forward pass of the blocks.
    assert flops({"vpm", "resampler"}, True, False, lora)[0] - model == pytest.approx(vision, rel=1e-9)
    language = linear + causal + 300 * 2 * lora
    assert flops({"vpm", "resampler"}, False, True, lora)[0] - model == pytest.approx(language, rel=1e-9)
    assert flops({"vpm", "resampler"}, True, True, lora)[1] == model


def test_weights_are_random_and_tables_right(tiny):
    """Random weights leave what is computed, position tables and rotary frequencies, as a model has it."""
    for folder in tiny.values():
        plain = train_step.MiniCPMV.from_pretrained(folder)
        dtype = plain.dtype
        made = train_step.random_model("", config=plain.config, dtype=dtype, attn_implementation="sdpa")
        stored = dict(plain.named_buffers())
        assert stored.keys() == dict(made.named_buffers()).keys()
        for name, buffer in made.named_buffers():
            assert buffer.equal(stored[name]), name
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                assert parameter.std().item() == pytest.approx(train_step.STD, rel=0.3), name
