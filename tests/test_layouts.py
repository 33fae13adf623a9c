"""The same training at any layout: processes, ZeRO stages, offload, accumulation in place of batch.

A reference of one process without DeepSpeed; the others by finetune.py's own `train`, one after another in the same
two processes under torchrun, which pays for their start once. Four samples a step, of which a process often has only
text, or only pictures, while the other has the rest, or nothing at all, where an epoch ends: so no layout hangs on that
either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLM_TYPES, ROOT, losses
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from finetune.checks import find_problems
from finetune.dataset import Repeated, SupervisedDataset, load_samples
from finetune.loading import EXTRA_WEIGHTS_NAME
from finetune.trainer import BalancedSteps, WholeSteps

STEPS = 20
SAMPLES_PER_STEP = 4
LAYOUTS = {  # name: processes, samples per process at once, DeepSpeed configuration
    "ddp": (2, 2, ""),
    "ddp-accumulating": (2, 1, ""),
    "zero1": (2, 2, "zero1"),
    "zero2": (2, 2, "ds_config_zero2.json"),
    "zero2-accumulating": (2, 1, "ds_config_zero2.json"),
    "zero3": (2, 2, "ds_config_zero3.json"),
    "zero3-accumulating": (2, 1, "ds_config_zero3.json"),
    "zero2-offload": (2, 2, "ds_config_zero2_offload.json"),
    "zero3-offload": (2, 2, "ds_config_zero3_offload.json"),
    "accumulating": (1, 1, ""),
}
MIXED = "tpttptpptttpp"  # text, picture: dealt to two processes, one or two at a time; the last step is one sample
PROGRAM = """
import gc, json, os, sys
from finetune.finetune import train
for flags in json.load(open(sys.argv[1])):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # how TrainingArguments tells accelerate of DeepSpeed
    train(flags)
    gc.collect()
"""


@pytest.fixture(scope="session")
def mixed_file(tmp_path_factory) -> Path:
    """Samples with and without pictures in the order of `MIXED`, answers of different lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = []
    for number, kind in enumerate(MIXED):
        answer = " ".join(["red", "green", "blue"][: 1 + number % 3]) + "."
        turns = [{"role": "user", "content": "Say a colour."}, {"role": "assistant", "content": answer}]
        samples.append({"id": str(number), "conversations": turns})
        if kind == "p":
            samples[-1]["image"] = f"{number}.png"
            size = (200, 120) if number % 4 == 1 else (112, 112 - 14 * (number % 3))
            Image.new("RGB", size, (200 - 9 * number, 30 + 9 * number, 60)).save(folder / f"{number}.png")
    path = folder / "mixed.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_processes_get_is_as_different_as_can_be(tiny, mixed_file, at_once):
    """That the layouts are worth comparing: text alone beside pictures, and nothing to learn beside something."""
    config, tokenizer = AutoConfig.from_pretrained(tiny["llama3"]), AutoTokenizer.from_pretrained(tiny["llama3"])
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(mixed_file))
    find_problems(dataset)
    costs, accumulation = dataset.loads @ [1, 500], SAMPLES_PER_STEP // 2 // at_once
    order = list(BalancedSteps(WholeSteps(range(len(MIXED)), 2 * at_once), costs, at_once, 2, accumulation))
    kinds = ["-" if isinstance(index, Repeated) else MIXED[index] for index in order]
    pairs = set()
    for start in range(0, len(kinds), 2 * at_once):
        both = kinds[start : start + 2 * at_once]
        pairs.add(tuple(sorted("".join(sorted(of_process)) for of_process in (both[:at_once], both[at_once:]))))
    assert pairs >= {1: {("p", "t"), ("-", "p")}, 2: {("pt", "tt"), ("pp", "pt"), ("--", "-p")}}[at_once]


def flags(layout: str, llm_type: str, method: str, tiny: dict[str, Path], data: Path, folder: Path) -> list[str]:
    """What finetune.py gets for a run of 20 steps."""
    processes, at_once, deepspeed = LAYOUTS.get(layout, (1, SAMPLES_PER_STEP, ""))
    accumulation = SAMPLES_PER_STEP // processes // at_once
    if deepspeed == "zero1":  # a user's own file
        own = json.loads((ROOT / "finetune" / "ds_config_zero2.json").read_text())
        own["zero_optimization"]["stage"] = 1
        deepspeed = folder.with_suffix(".json")
        deepspeed.write_text(json.dumps(own))
    elif deepspeed:
        deepspeed = ROOT / "finetune" / deepspeed
    words = (
        *("--model_name_or_path", tiny[llm_type], "--data_path", data, "--output_dir", folder),
        *("--batch_size", at_once, "--gradient_accumulation_steps", accumulation, "--max_steps", STEPS),
        *("--train_sampling_strategy", "sequential", "--learning_rate", 1e-3, "--lr_scheduler_type", "cosine"),
        *("--warmup_steps", 3, "--weight_decay", 0.1, "--logging_steps", 1, "--save_strategy", "no"),
        *("--gradient_checkpointing", "true", "--dataloader_num_workers", 0, "--report_to", "none", "--bf16", "false"),
        *(("--use_lora", "true", "--lora_r", 8, "--lora_dropout", 0) if method == "lora" else ()),
        *(("--deepspeed", deepspeed) if deepspeed else ()),
    )
    return list(map(str, words))


@pytest.fixture(scope="session")
def reference(tiny, mixed_file, tmp_path_factory):
    """The run of one process, by model and method, made on first use."""
    done = {}

    def make(llm_type: str, method: str) -> Path:
        if (llm_type, method) not in done:
            folder = tmp_path_factory.mktemp("reference")
            run = flags("reference", llm_type, method, tiny, mixed_file, folder / "out")
            train_together([run], folder, processes=1)
            done[llm_type, method] = folder / "out"
        return done[llm_type, method]

    return make


def train_together(runs: list[list[str]], folder: Path, processes: int) -> None:
    """Runs one after another in the same processes. A hang ends in `subprocess.TimeoutExpired`."""
    program, listed = folder / "program.py", folder / "runs.json"
    program.write_text(PROGRAM)
    listed.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:processes]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),  # more than one per process would be used as transformers thinks fit
    }
    result = subprocess.run(
        [*command, str(program), str(listed)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180 + 60 * len(runs),
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"


def weights(folder: Path, method: str) -> dict[str, torch.Tensor]:
    if method == "full":
        return load_file(folder / "model.safetensors")
    extra = torch.load(folder / EXTRA_WEIGHTS_NAME, weights_only=True)
    return load_file(folder / "adapter_model.safetensors") | extra


def check(runs: list[tuple[str, str, str]], tiny, mixed_file: Path, tmp_path: Path, reference) -> None:
    """Train `(layout, llm_type, method)` and compare losses step by step and weights at the end."""
    folders = {run: tmp_path / "-".join(run) for run in runs}
    for processes in (1, 2):
        listed = [
            flags(*run, tiny, mixed_file, folder) for run, folder in folders.items() if LAYOUTS[run[0]][0] == processes
        ]
        if listed:
            train_together(listed, tmp_path, processes)
    for run, folder in folders.items():
        expected = reference(*run[1:])
        assert len(losses(expected)) == STEPS and losses(expected)[-1] < 0.5 * losses(expected)[0]
        assert losses(folder) == pytest.approx(losses(expected), abs=1e-4), run
        trained, wanted = weights(folder, run[2]), weights(expected, run[2])
        assert trained.keys() == wanted.keys()
        for name, tensor in trained.items():
            torch.testing.assert_close(
                tensor, wanted[name], atol=1e-4, rtol=0, msg=lambda text, run=run, name=name: f"{run} {name}: {text}"
            )


@pytest.mark.slow
def test_some_layouts(tiny, mixed_file, tmp_path, reference):
    """The cheapest that together have both models, both methods, DDP, ZeRO-2 and ZeRO-3."""
    runs = [
        ("ddp", "llama3", "lora"),
        ("zero3", "llama3", "lora"),
        ("zero2", "minicpm", "full"),
        ("zero3-accumulating", "minicpm", "full"),
    ]
    check(runs, tiny, mixed_file, tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_every_layout(llm_type, method, tiny, mixed_file, tmp_path, reference):
    check([(layout, llm_type, method) for layout in LAYOUTS], tiny, mixed_file, tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("llm_type", "method"), [("llama3", "lora"), ("minicpm", "full")])
def test_evaluation_loss_at_every_layout_and_batch(llm_type, method, tiny, mixed_file, tmp_path):
    """13 samples, so that most batches leave some over, on one process or two."""
    layouts = [(layout, batch) for layout in ("plain", "ddp", "zero2", "zero3") for batch in (1, 3, 4)]
    folders = {run: tmp_path / f"{run[0]}-{run[1]}" for run in layouts}
    for processes in (1, 2):
        runs = [
            [
                *flags(layout, llm_type, method, tiny, mixed_file, folder),
                *("--max_steps", "1", "--learning_rate", "0", "--warmup_steps", "0", "--eval_strategy", "steps"),
                *("--eval_steps", "1", "--eval_data_path", str(mixed_file)),
                *("--per_device_eval_batch_size", str(batch)),
            ]
            for (layout, batch), folder in folders.items()
            if (layout == "plain") == (processes == 1)
        ]
        train_together(runs, tmp_path, processes)
    found = {}
    for run, folder in folders.items():
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        [found[run]] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert found == pytest.approx(dict.fromkeys(found, found["plain", 1]), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layouts_on_two_gpus(tiny, mixed_file, tmp_path, reference):
    """In float32, through NCCL."""
    layouts = ("ddp", "zero2", "zero3", "zero3-offload")
    runs = [(layout, *trained) for layout in layouts for trained in (("llama3", "lora"), ("minicpm", "full"))]
    check(runs, tiny, mixed_file, tmp_path, reference)
