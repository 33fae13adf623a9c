"""One run at a time in an output folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import outcome, write_adapter

from finetune import evaluate, merge_lora, run_lock
from finetune.errors import UserError
from finetune.finetune import train
from finetune.run_lock import LOCK, only_one_writes, only_run_in

FLAGS = (
    *("--batch_size", 2, "--max_steps", 1, "--max_slice_nums", 1, "--report_to", "none", "--disable_tqdm", "true"),
    *("--dataloader_num_workers", 0, "--save_strategy", "no", "--use_lora", "true", "--lora_r", 4),
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "DYING", 0.4)


def holder(folder: Path, seconds: float = 600, lock: Callable = only_run_in) -> multiprocessing.Process:
    """Another process that holds a folder."""
    context = multiprocessing.get_context("fork")
    holds = context.Event()

    def hold() -> None:
        with lock(folder, takes=True):
            holds.set()
            time.sleep(seconds)

    process = context.Process(target=hold, daemon=True)
    process.start()
    assert holds.wait(60)
    return process


def record(folder: Path) -> dict:
    return json.loads((folder / LOCK).read_text())


def test_a_second_run_is_refused_before_anything_is_touched(tiny, data_file, tmp_path, capsys):
    folder = tmp_path / "out"
    other = holder(folder)
    try:
        needed = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder)
        status, lines = outcome(train, (*needed, *FLAGS, "--overwrite_output_dir", "true"), capsys)
        assert status == 1
        (line,) = [line for line in lines if "another run works there" in line]
        assert line.startswith(f"--output_dir {folder}: ") and f"process {other.pid} on {os.uname().nodename}" in line
        assert [path.name for path in folder.iterdir()] == [LOCK]
        (folder / "checkpoint-2").mkdir()  # of the run that goes on
        (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
        _, lines = outcome(train, (*needed, *FLAGS), capsys)
        assert any("another run works there" in line for line in lines) and not any("earlier" in line for line in lines)
        shutil.rmtree(folder / "checkpoint-2")
        other.kill()
        other.join()
        train([str(word) for word in (*needed, *FLAGS)])  # at once
        assert not (folder / LOCK).exists() and (folder / "adapter_model.safetensors").exists()
    finally:
        other.kill()


def test_a_killed_run_is_taken_over_though_its_parent_has_not_noticed(tmp_path, caplog):
    """A zombie still has its number."""
    other = holder(tmp_path)
    other.kill()
    while Path(f"/proc/{other.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    with only_run_in(tmp_path, takes=True):
        assert record(tmp_path)["process"] == os.getpid()
    assert f"process {other.pid} on" in caplog.text and "taken over" in caplog.text
    other.join()


def test_a_run_that_is_being_killed_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "DYING", 60)
    other = holder(tmp_path, seconds=1)  # which releases it a moment later
    with only_run_in(tmp_path, takes=True):
        assert record(tmp_path)["process"] == os.getpid()
    other.join()
    assert other.exitcode == 0


def test_a_number_that_another_process_has_now_is_no_run(tmp_path):
    with only_run_in(tmp_path, takes=True):
        found = record(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({**found, "process": 1}))
    with only_run_in(tmp_path, takes=True):
        pass


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "another"}, {"namespace": "pid:[1]"}])
@pytest.mark.parametrize("alive", [True, False])
def test_runs_of_other_machines_and_containers_give_signs_of_life(other, alive, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.5)
    with only_run_in(tmp_path, takes=True):
        found = record(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({**found, **other}))
    stop = multiprocessing.Event()

    def live() -> None:
        while not stop.wait(0.02):
            os.utime(tmp_path / LOCK)

    process = multiprocessing.get_context("fork").Process(target=live, daemon=True)
    if alive:
        process.start()
        with (
            pytest.raises(UserError, match=f"on {other.get('host', found['host'])}"),
            only_run_in(tmp_path, takes=True),
        ):
            pass
        stop.set()
        process.join()
        assert record(tmp_path) == {**found, **other}
    else:
        with only_run_in(tmp_path, takes=True):
            assert record(tmp_path)["host"] == found["host"]
    assert "looking for" in caplog.text


def test_the_file_lives_as_long_as_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SIGN_OF_LIFE", 0.02)
    with pytest.raises(ValueError, match="mine"), only_run_in(tmp_path, takes=True):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        while (tmp_path / LOCK).stat().st_mtime_ns == before:
            time.sleep(0.01)
        with pytest.raises(UserError, match="another run works there"), only_run_in(tmp_path, takes=True):
            pass  # of the same process
        assert record(tmp_path)["process"] == os.getpid()
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_nothing_was_left_is_removed(tmp_path):
    for left in (False, True):
        with pytest.raises(UserError), only_run_in(tmp_path / "new", takes=True):
            (tmp_path / "new" / "mine").touch() if left else None
            raise UserError
        assert (tmp_path / "new").exists() == left
    (tmp_path / "mine").mkdir()
    with only_run_in(tmp_path / "mine", takes=True):
        pass
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("program", [merge_lora, evaluate])
def test_two_calls_do_not_write_one_output(program, tiny, data_file, tmp_path, capsys):
    """Merging took what the other one was writing for left over, and removed it; answers went into the same files."""
    adapter, output = write_adapter(tiny["llama3"], tmp_path / "adapter"), tmp_path / "output"
    unfinished = tmp_path / "output.incomplete"
    words = ["--adapter", adapter, "--output", output]
    if program is evaluate:
        limits = ("--limit", 1, "--max_new_tokens", 2)
        words = ["--model", adapter, "--data_path", data_file, "--output", output, *limits]
    other = holder(output, lock=only_one_writes)
    try:
        unfinished.mkdir()
        (unfinished / merge_lora.MARK).touch()
        status, lines = outcome(program.main, words, capsys)
        assert status == 1 and [path.name for path in unfinished.iterdir()] == [merge_lora.MARK]
        (line,) = [line for line in lines if f"--output {output}: another run works there" in line]
        assert f"process {other.pid} on {os.uname().nodename}" in line
    finally:
        other.kill()
        other.join()
    shutil.rmtree(unfinished)
    assert outcome(program.main, words, capsys)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "output"]


def test_a_process_that_writes_nothing_takes_nothing(tmp_path):
    with only_run_in(tmp_path / "out", takes=False):
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"process": "x"}'])
def test_files_that_say_nothing_are_taken_over(content, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    (tmp_path / LOCK).write_text(content)
    with only_run_in(tmp_path, takes=True):
        assert record(tmp_path)["process"] == os.getpid()


def test_of_many_that_begin_at_once_one_wins(tmp_path):
    """Each holds the folder for longer than the others try."""
    context = multiprocessing.get_context("fork")
    begin, results = context.Barrier(8), context.SimpleQueue()
    (tmp_path / LOCK).write_text("")  # of one that was killed

    def attempt() -> None:
        begin.wait()
        try:
            with only_run_in(tmp_path, takes=True):
                results.put("won")
                begin.wait()
        except UserError:
            results.put("refused")
            begin.wait()

    processes = [context.Process(target=attempt) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(results.get() for _ in range(8)) == ["refused"] * 7 + ["won"]
    assert not (tmp_path / LOCK).exists()
