"""Real runs, killed and stopped at any point, go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_nodes, losses
from safetensors.torch import load_file

from finetune.checkpoints import ASIDE, checkpoint_steps, fault, newest_complete
from finetune.loading import load_finetuned

STEPS = 24
LAYOUTS = {"plain": (1, ""), "ddp": (2, ""), "zero2": (2, "ds_config_zero2.json"), "zero3": (2, "ds_config_zero3.json")}
FLAGS = (
    *("--max_steps", STEPS, "--logging_steps", 1, "--learning_rate", 1e-3, "--batch_size", 2, "--save_total_limit", 2),
    *("--lora_r", 8, "--lora_dropout", 0.1, "--dataloader_num_workers", 1, "--report_to", "none", "--save_steps", 1),
)


def start(layout: str, folder: Path, tiny, data_file: Path, *flags: object) -> subprocess.Popen:
    """A run of LoRA, with dropout, shuffling and a cosine schedule, in a process group of its own."""
    processes, deepspeed = LAYOUTS[layout]
    variables = {"MODEL": tiny["llama3"], "DATA": data_file, "OUTPUT_DIR": folder, "GPUS_PER_NODE": processes}
    variables |= {"DS_CONFIG": deepspeed, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
    return subprocess.Popen(
        ["sh", str(ROOT / "finetune" / "finetune_lora.sh"), *map(str, (*FLAGS, *flags))],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def watch(process: subprocess.Popen) -> list[str]:
    """The lines of a run's output, as they come."""
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True).start()
    return lines


def wait_until(condition, process: subprocess.Popen, seconds: float = 240, pause: float = 0.001) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run ended, or nothing came"
        time.sleep(pause)


@pytest.fixture(scope="module")
def unbroken(tiny, data_file, tmp_path_factory):
    """Folders of runs that nobody disturbs, by layout."""
    done = {}

    def make(layout: str) -> Path:
        if layout not in done:
            done[layout] = tmp_path_factory.mktemp(layout)
            process = start(layout, done[layout], tiny, data_file)
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, output[-6000:]
        return done[layout]

    return make


def assert_same_run(folder: Path, reference: Path) -> None:
    """Losses of every step, and the adapter, as in the run that nobody disturbed."""
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-5)
    assert len(losses(folder)) == STEPS
    expected = load_file(reference / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kills"), [("plain", 8), ("zero2", 8), ("zero3", 8)])
def test_killed_again_and_again(layout, kills, unbroken, tiny, data_file, tmp_path):
    """24 times in all: every second time within a save, else anywhere between the first step and some seconds later."""
    rng = random.Random(layout)
    folder = tmp_path / "out"
    for number in range(kills):
        process = start(layout, folder, tiny, data_file, "--resume_from_checkpoint", "true")
        lines = watch(process)
        before = max(checkpoint_steps(folder), default=0)
        wait_until(lambda lines=lines: any("'loss'" in line for line in lines), process)
        if number % 2:
            wait_until(lambda: any((folder / ASIDE).glob("checkpoint-*")), process, pause=0)
            time.sleep(rng.uniform(0, 0.05))
        else:
            wait_until(lambda before=before: max(checkpoint_steps(folder), default=0) > before, process)
            time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        newest = newest_complete(folder)
        assert newest is not None and fault(Path(newest)) is None, "".join(lines)[-6000:]
        assert int(newest.rsplit("-", 1)[1]) >= before
        load_finetuned(newest)
        if before >= STEPS - 4:
            break
    process = start(layout, folder, tiny, data_file, "--resume_from_checkpoint", "true")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-6000:]
    assert_same_run(folder, unbroken(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
@pytest.mark.parametrize("victim", ["torchrun", "a rank"])
def test_killing_one_process_ends_the_others(layout, victim, tiny, data_file, tmp_path):
    folder = tmp_path / "out"
    process = start(layout, folder, tiny, data_file)
    wait_until(lambda: newest_complete(folder) is not None, process)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    os.kill(process.pid if victim == "torchrun" else ranks[1], signal.SIGKILL)
    process.wait(timeout=60)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() and state(pid) != "Z" for pid in ranks):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert newest_complete(folder) is not None


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    ("layout", "number", "everyone"),
    [
        pytest.param("zero2", signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param("plain", signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param("ddp", signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param("zero3", signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_gone_on(layout, number, everyone, unbroken, tiny, data_file, tmp_path):
    """By a signal to torchrun, as from SLURM's batch script, or to the whole group, as from a terminal or `scancel`.
    The command that the run prints goes on with it."""
    folder = tmp_path / "out"
    process = start(layout, folder, tiny, data_file, "--save_steps", 100)
    lines = watch(process)
    wait_until(lambda: sum("'loss'" in line for line in lines) >= 3, process)
    (os.killpg if everyone else os.kill)(process.pid, number)
    assert process.wait(timeout=120) == 128 + number
    text = "".join(lines)
    assert "Traceback" not in text, text[-6000:]
    assert f"{number.name}: stopped after step" in text
    (step,) = checkpoint_steps(folder)
    assert 3 <= step < STEPS and str(folder / f"checkpoint-{step}") in text
    assert not (folder / "adapter_model.safetensors").exists()
    command = next(line for line in lines if "--resume_from_checkpoint true" in line)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-6000:]
    assert shlex.split(command)[-2:] == ["--resume_from_checkpoint", "true"]
    assert_same_run(folder, unbroken(layout))


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(tiny, data_file, tmp_path):
    """`nohup` is a shell's word for: SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("plain", tmp_path, tiny, data_file, "--save_steps", 100)
    finally:
        signal.signal(signal.SIGHUP, before)
    lines = watch(process)
    wait_until(lambda: any("'loss'" in line for line in lines), process)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=240) == 0, "".join(lines)[-6000:]
    assert len(losses(tmp_path)) == STEPS


@pytest.mark.slow
def test_newest_checkpoint_with_a_fault_is_passed_over(unbroken, tiny, data_file, tmp_path):
    """One that lacks a file, and one that is cut off: the run goes on from the third."""
    folder = tmp_path / "out"
    process = start("zero2", folder, tiny, data_file, "--save_total_limit", 4, "--save_steps", 6)
    process.communicate(timeout=300)
    (folder / "checkpoint-24" / "scheduler.pt").unlink()
    states = next((folder / "checkpoint-18").rglob("*optim_states.pt"))
    states.write_bytes(states.read_bytes()[:-100])
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    process = start("zero2", folder, tiny, data_file, "--save_steps", 100, "--resume_from_checkpoint", "true")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-6000:]
    assert "checkpoint-24 is incomplete (scheduler.pt is missing)" in output
    assert f"checkpoint-18 is incomplete (global_step18/{states.name} has" in output
    assert_same_run(folder, unbroken("zero2"))


@pytest.mark.slow
def test_processes_that_read_different_data_are_found(tiny, data_file, tmp_path):
    """Two agents, one of which has a file with a sample changed; then one with a file that is missing."""
    other = tmp_path / "other"
    shutil.copytree(data_file.parent, other)
    samples = json.loads(data_file.read_text())
    samples[7]["conversations"][1]["content"] = "It is grey."
    (other / "train.json").write_text(json.dumps(samples))
    for second, message in ((other / "train.json", "read different data"), (other / "gone.json", "process 1: ")):
        variables = {"MODEL": tiny["llama3"], "OUTPUT_DIR": tmp_path / second.stem, "DS_CONFIG": ""}
        flags, nodes = ("--max_steps", 2, "--report_to", "none"), [{"DATA": data_file}, {"DATA": second}]
        for result in launch_nodes("finetune_lora.sh", *flags, nodes=nodes, **variables):
            output = result.stdout + result.stderr
            assert (
                result.returncode != 0
                and message in output
                and 'Traceback (most recent call last):\n  File "/' not in output
            )
            assert "train.json" in output or "gone.json" in output
