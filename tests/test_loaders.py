"""Loader processes: they end with the run, and what they send has room in shared memory."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from finetune import loaders
from finetune.arguments import load_config
from finetune.checks import find_problems
from finetune.dataset import SupervisedDataset, data_collator
from finetune.finetune import train
from finetune.loaders import Lifeline, Load, fitting_workers, sample_bytes, shared_memory_needed
from finetune.loading import load_tokenizer

FLAGS = (
    *("--use_lora", "true", "--lora_r", 4, "--batch_size", 2, "--max_steps", 2, "--logging_steps", 1),
    *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_num_workers", 2),
)


def command(folder: Path, tiny, data_file: Path, *flags: object) -> list[str]:
    needed = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder)
    return [str(word) for word in (*needed, *FLAGS, *flags)]


def children() -> set[int]:
    """Process numbers of this process's loader processes and others that it started by multiprocessing."""
    return {process.pid for process in multiprocessing.active_children()}


def gone(pids: set[int], seconds: float = 30) -> bool:
    """Whether processes end within that time."""
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return not alive


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


class Numbers(Dataset):
    """Its items take an hour, or no time."""

    def __init__(self, seconds: float = 0):
        self.seconds = seconds

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds)
        return index


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seconds", [0, 3600])
def test_loader_processes_end_with_the_lifeline(context, seconds):
    """However busy they are, and whatever holds their iterator; a second lifeline keeps none of them."""
    before = children()
    lifeline, other = Lifeline(), Lifeline()
    loader = DataLoader(Numbers(seconds), num_workers=2, persistent_workers=True, multiprocessing_context=context)
    lifeline.give_to(loader)
    iterator = iter(loader)
    if not seconds:
        assert len(list(iterator)) == 100
    started = children() - before
    assert len(started) == 2
    lifeline.close()
    assert gone(started)
    other.close()


PROGRAM = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
from test_loaders import Numbers
from torch.utils.data import DataLoader
from finetune.loaders import Lifeline
import multiprocessing
loader = DataLoader(Numbers({seconds}), num_workers=2, persistent_workers=True)
lifeline = Lifeline()
lifeline.give_to(loader)
iterator = iter(loader)
{first}
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
{end}
"""


SLOW = [(end, seconds) for end in ("raise ValueError", "os._exit(3)") for seconds in (0, 3600)]


@pytest.mark.parametrize(
    ("end", "seconds"),
    [
        pytest.param("", 0, marks=pytest.mark.slow),
        ("os.kill(os.getpid(), signal.SIGKILL)", 3600),
        *(pytest.param(*values, marks=pytest.mark.slow) for values in SLOW),
    ],
)
def test_loader_processes_end_with_the_process(end, seconds, tmp_path):
    first = "" if seconds else "next(iterator)"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(paths=[str(ROOT), str(ROOT / "tests")], seconds=seconds, first=first, end=end))
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    pids = set(map(int, result.stdout.split()))
    assert len(pids) == 2 and gone(pids)


@pytest.mark.slow
def test_persistent_loader_processes_end_with_the_run(tiny, data_file, tmp_path):
    """The program itself, with an evaluation, whose loader stays as well."""
    flags = ("--dataloader_persistent_workers", "true", "--eval_strategy", "steps", "--eval_steps", 1)
    words = command(tmp_path, tiny, data_file, *flags, "--eval_data_path", data_file)
    program = [sys.executable, str(ROOT / "finetune" / "finetune.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_run_in_this_process_leaves_none_behind(tiny, data_file, tmp_path):
    """And the trainer can be used on."""
    before = children()
    flags = ("--dataloader_persistent_workers", "true", "--eval_strategy", "steps", "--eval_steps", 1)
    train(command(tmp_path / "a", tiny, data_file, *flags, "--eval_data_path", data_file))
    assert gone(children() - before)


def test_loader_processes_outlive_the_signals_of_the_run():
    before = children()
    lifeline = Lifeline()
    loader = DataLoader(Numbers(), num_workers=1, persistent_workers=True)
    lifeline.give_to(loader)
    iterator = iter(loader)
    next(iterator)
    (pid,) = children() - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert len(list(iterator)) == 99 and state(pid) != "Z"
    lifeline.close()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_batch_that_cannot_be_sent_ends_its_loader_process(context, capfd, monkeypatch):
    """As with full shared memory, the queue's thread meets the error, here of what cannot be pickled. Otherwise the
    batch would be waited for until `timeout`, whose error is another."""
    monkeypatch.setattr(logging.getLogger("finetune"), "handlers", [logging.StreamHandler()])
    lifeline = Lifeline()
    loader = DataLoader(Numbers(), collate_fn=in_a_function, num_workers=1, timeout=60, multiprocessing_context=context)
    lifeline.give_to(loader)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iter(loader))
    lifeline.close()
    assert "loader process 0 cannot send a batch: " in capfd.readouterr().err


def in_a_function(items: list) -> object:
    """A batch that no other process can be sent."""
    return lambda: items


def test_what_is_needed():
    """By hand: 3 samples at a time, in one process or two, the largest ones first."""
    sizes = np.array([1.0, 100, 10, 1000])
    load = Load(sizes, batch_size=1, kept=1)
    assert shared_memory_needed([load], workers=0, prefetched=2, processes_here=1) == 0
    assert shared_memory_needed([load], workers=1, prefetched=1, processes_here=1) == 1100
    assert shared_memory_needed([load], workers=1, prefetched=2, processes_here=1) == 1110
    assert shared_memory_needed([load], workers=1, prefetched=2, processes_here=2) == 1111 + 1100
    assert shared_memory_needed([load, load], workers=1, prefetched=1, processes_here=1) == 2200


@pytest.mark.parametrize("llm_type", ["llama3", "minicpm"])
@pytest.mark.parametrize("size", [(1344, 1344), (300, 2000), (100, 90), (640, 200)])
def test_the_estimate_is_no_less_than_what_a_batch_takes(llm_type, size, tiny, tmp_path):
    """Storages in whole pages, as they lie in shared memory; and not three times as much."""
    Image.effect_noise(size, 64).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "It is red. " * 20}]
    samples = [{"id": n, "image": str(tmp_path / "a.png"), "conversations": turns} for n in range(2)]
    config = load_config(str(tiny[llm_type]))
    dataset = SupervisedDataset.for_checkpoint(config, load_tokenizer(tiny[llm_type]), samples, 2048)
    assert find_problems(dataset) == []
    batch = data_collator([dataset[0], dataset[1]])

    def pages(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return -(-value.untyped_storage().nbytes() // loaders.PAGE) * loaders.PAGE
        return sum(map(pages, value)) if isinstance(value, list) else 0

    pixels = config.slicing["scale_resolution"], config.slicing["patch_size"]
    estimate = sample_bytes(dataset.loads[:, 1], batch["input_ids"].shape[1], *pixels).sum()
    taken = sum(map(pages, batch.values()))
    assert taken <= estimate <= 3 * taken


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "used", "told"), [(2**30, 4, ""), (2**19, 1, "1 are used"), (2**10, 0, "by the pro")])
def test_fewer_loader_processes_where_memory_is_small(free, used, told, monkeypatch, caplog):
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda _: Usage(free, 0, free))
    monkeypatch.setattr(loaders, "SHARED_MEMORY", Path("/"))
    load = Load(np.full(100, 2**16), batch_size=2, kept=1)
    assert fitting_workers([load], 4, "--dataloader_num_workers") == used
    assert told in caplog.text and ("--shm-size=64m" in caplog.text) == (used < 4)


def test_a_system_without_it_takes_all(monkeypatch):
    monkeypatch.setattr(loaders, "SHARED_MEMORY", Path("/no/such/folder"))
    assert fitting_workers([Load(np.full(100, 2**40), 2, 1)], 4, "--dataloader_num_workers") == 4


@pytest.mark.parametrize("prefetched", [None, 4])
def test_training_with_little_shared_memory(prefetched, tiny, data_file, tmp_path, monkeypatch, caplog):
    """No loader processes are left to use: nor are the settings that only they take."""
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**10))
    with monkeypatch.context() as patched:
        patched.setattr("finetune.places.room_problem", lambda *_: None)
        further = () if prefetched is None else ("--dataloader_prefetch_factor", prefetched)
        further += ("--dataloader_multiprocessing_context", "fork")
        train(command(tmp_path, tiny, data_file, "--dataloader_persistent_workers", prefetched is not None, *further))
    assert "of shared memory" in caplog.text
    settings = json.loads((tmp_path / "training_settings.json").read_text())["arguments"]["training"]
    assert settings["dataloader_num_workers"] == 0
