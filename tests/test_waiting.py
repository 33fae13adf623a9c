"""Whatever a loader waits for, a signal ends the run with a checkpoint, and a stall is reported."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, TESTS
from test_guards import Items, trainer_of
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback

from finetune import dataset as dataset_module
from finetune import waiting
from finetune.arguments import load_config
from finetune.checkpoints import newest_complete
from finetune.checks import find_problems, scan
from finetune.dataset import SupervisedDataset, data_collator, load_samples
from finetune.loading import load_tokenizer
from finetune.waiting import Taken, reported

FOR_EVER = 3600


def stall(at: int):
    """At one sample the disk hangs; where it is read in the training process, a signal comes meanwhile."""

    def wait(number: int, item: dict) -> dict:
        if number == at:
            if get_worker_info() is None:
                signal_soon()
            time.sleep(FOR_EVER)
        return item

    return wait


def signal_soon(number: int = signal.SIGTERM) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


class SignalAfter(TrainerCallback):
    """A signal comes soon after a step has ended, or an evaluation has begun."""

    def __init__(self, step: int, within: str = "on_step_end"):
        self.step = step
        setattr(self, within, self.send)

    def send(self, _args, state, _control, **_):
        if state.global_step == self.step:
            self.step = None
            signal_soon()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_for_a_step(workers, tmp_path):
    """accelerate asks for a batch ahead: step 3 is not computed, since the batch of step 4 does not come."""
    callbacks = [SignalAfter(2)] if workers else []
    items = Items(spoil=stall(3))
    trainer = trainer_of(
        tmp_path,
        items,
        None,
        callbacks,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=1 if workers else None,
    )
    trainer.train()
    assert trainer.guard.signal == signal.SIGTERM and trainer.state.global_step == 2
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_in_an_evaluation(workers, tmp_path):
    callbacks = [SignalAfter(2)] if workers else []
    settings = {"eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": workers}
    trainer = trainer_of(tmp_path, Items(), None, callbacks, Items(4, spoil=stall(2)), **settings)
    trainer.train()
    assert trainer.guard.signal == signal.SIGTERM and trainer.state.global_step == 2
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, caplog):
    trainer = trainer_of(tmp_path, Items(spoil=stall(0)))
    trainer.train()
    assert trainer.guard.signal == signal.SIGTERM and trainer.state.global_step == 0
    assert newest_complete(tmp_path) is None and "single sample" not in caplog.text


def test_a_fifo_that_nobody_writes_to(tmp_path):
    """Python resumes a system call that a signal has interrupted."""
    os.mkfifo(tmp_path / "fifo")

    def read(number: int, item: dict) -> dict:
        if number == 3:
            signal_soon(signal.SIGINT)
            (tmp_path / "fifo").read_bytes()
        return item

    trainer = trainer_of(tmp_path / "out", Items(spoil=read))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background it is ignored
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.guard.signal == signal.SIGINT
    assert newest_complete(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_resumed_run_takes_the_steps_of_an_unbroken_one(at, tmp_path):
    """Also where the first batch of an epoch was waited for, for which the loader has drawn random numbers already."""

    def run(folder: str, spoil=lambda _number, item: item, resume=None):
        settings = {"max_steps": 8, "train_sampling_strategy": "random"}
        trainer = trainer_of(tmp_path / folder, Items(4, spoil), **settings)
        plain = trainer.compute_loss_func
        trainer.compute_loss_func = lambda *args, **kwargs: plain(*args, **kwargs) * (0.5 + torch.rand(()))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    drawn = []

    def stall_at(_number: int, item: dict) -> dict:
        drawn.append(1)
        if len(drawn) == at + 1 + (at % 4 > 0):  # a batch ahead, but for the first of an epoch
            signal_soon()
            time.sleep(FOR_EVER)
        return item

    unbroken, stopped = run("unbroken"), run("broken", stall_at)
    assert stopped.guard.signal and stopped.state.global_step == at
    resumed = run("broken", resume=newest_complete(tmp_path / "broken"))
    figures = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (unbroken, resumed)]
    assert len(figures[0]) == 8 and figures[0] == figures[1]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stall_is_reported(workers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "DELAY", 0.2)

    def slow(number: int, item: dict) -> dict:
        time.sleep(2 if number == 2 else 0)
        return item

    trainer_of(tmp_path, Items(spoil=slow), max_steps=3, dataloader_num_workers=workers).train()
    reports = [record.message for record in caplog.records if "has been waiting" in record.message]
    assert 1 <= len(reports) <= 3  # looked for every half second, and due ever more rarely
    assert "process 0 has been waiting for the samples of step" in reports[0]
    assert "the disk that the pictures are on, or at /dev/shm" in reports[0] and " bytes)" in reports[0]


def slow_look(indices: range) -> int:
    time.sleep(1.2)
    return len(indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stall_of_the_checks_is_reported(workers, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "DELAY", 0.2)
    scan(7, slow_look, "test", workers)
    assert "has been waiting for samples 0 to 6, which are looked at" in caplog.text


LOADING, CHECKING = "samples, now for ", "samples 0 to 23, which are looked at, now for "


@pytest.mark.parametrize(
    ("checks", "workers", "told"),
    [
        (False, 0, f"process 0 has been waiting for {LOADING}"),
        (False, 1, "loader process 0 of process 0 has been waiting for "),
        (True, 0, f"process 0 has been waiting for {CHECKING}"),
    ],
)
def test_the_picture_that_stalls_is_named(checks, workers, told, tiny, data_file, tmp_path, monkeypatch):
    """By the process that reads it, which is the only one to know; it is slow until that is in the log."""
    monkeypatch.setattr(waiting, "DELAY", 0.2)
    log, load = tmp_path / "log", dataset_module.load_image
    expected = f"{told}{data_file}: sample 4 (id 's4'), picture 4.png, for "

    def slow(picture, *place):
        end = time.monotonic() + (PATIENCE if picture == "4.png" else 0)
        while expected not in log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        return load(picture, *place)

    monkeypatch.setattr(dataset_module, "load_image", slow)
    config, tokenizer = load_config(str(tiny["llama3"])), load_tokenizer(tiny["llama3"])
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(data_file), 2048)
    handler, logger = logging.FileHandler(log), logging.getLogger("finetune")
    logger.addHandler(handler)
    try:
        if checks:
            assert find_problems(dataset, decode=True, workers=workers) == []
        else:
            loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=data_collator)
            assert len(list(Taken(loader))) == 12
    finally:
        logger.removeHandler(handler)
    lines = [line for line in log.read_text().splitlines() if expected in line]
    assert lines and ("/dev/shm" in lines[0]) == (not workers)


def test_waits_of_other_threads_are_their_own(monkeypatch, caplog):
    """One that ends within another's is not taken to go on."""
    monkeypatch.setattr(waiting, "DELAY", 0.2)
    began, other_began = threading.Event(), threading.Event()

    def wait() -> None:
        with reported("one"):
            began.set()
            other_began.wait(PATIENCE)

    thread = threading.Thread(target=wait)
    thread.start()
    began.wait(PATIENCE)
    with reported("another"):
        other_began.set()
        thread.join()
    time.sleep(1.2)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("evaluation", [False, True])
def test_processes_of_which_one_waits_end_together(evaluation, workers, tmp_path):
    """The signal reaches both, as torchrun and SLURM send it; the others wait for the one that is stalled."""
    program = f"""
        import os, sys, time
        from datetime import timedelta
        from pathlib import Path
        sys.path.insert(0, {str(TESTS)!r})
        import torch
        from test_guards import Items, trainer_of

        out = Path({str(tmp_path)!r})

        def stall(number, item):
            if number == 9:
                (out / "stalled").touch()
                time.sleep({FOR_EVER})
            return item

        settings = dict(dataloader_num_workers={workers}, per_device_train_batch_size=1, use_cpu=True)
        settings |= dict(per_device_eval_batch_size=1, eval_strategy="steps", eval_steps=3)
        bad, good = Items(spoil=stall), Items()
        datasets = (good, bad) if {evaluation} else (bad, good)
        trainer = trainer_of(out / "out", datasets[0], None, (), datasets[1], **settings)
        trainer.train()
        torch.distributed.destroy_process_group()
        sys.exit(128 + trainer.guard.signal)
    """
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "stalled").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=PATIENCE)[1]
    assert "Signal 15" in error or "SIGTERM" in error, error[-4000:]
    assert Path(newest_complete(tmp_path / "out")).name == "checkpoint-3", error[-4000:]
