"""Several machines, as several torchrun agents on this one, with one OUTPUT_DIR or one for each."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import PATIENCE, ROOT, launch, launch_nodes, losses
from safetensors.torch import load_file

from finetune import checkpoints, checks
from finetune.checkpoints import newest_everywhere, write_manifest
from finetune.data_files import load_samples
from finetune.errors import UserError
from finetune.finetune import _stop_on, train
from finetune.loading import load_finetuned
from finetune.machines import output_is_shared

STEPS = 4


def processes(work: Callable[[int], object], folder: Path, count: int, per_node: int = 1) -> list:
    """What `work(rank)` returns, or the text of its UserError, in `count` processes of a distributed run."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    folder.mkdir()

    def run(rank: int) -> None:
        os.environ.update(LOCAL_RANK=str(rank % per_node), LOCAL_WORLD_SIZE=str(per_node))
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
        try:
            results.put((rank, work(rank)))
        except UserError as error:
            results.put((rank, f"UserError: {error}"))
        torch.distributed.barrier()

    started = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * count
    found = dict(results.get() for _ in range(count))
    return [found[rank] for rank in range(count)]


def test_one_node_shares_with_itself(tmp_path):
    assert output_is_shared(tmp_path / "out")
    assert processes(lambda rank: output_is_shared(tmp_path / f"out{rank}"), tmp_path / "store", 2, 2) == [True] * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("folders", "shared"), [("aaa", True), ("abc", False), ("aabb", False), ("aaaa", True)])
def test_shared_disks_are_found_out(folders, shared, tmp_path):
    """Nodes whose OUTPUT_DIR is the folder of this letter; four processes run on two nodes."""
    per_node = 2 if len(folders) == 4 else 1
    work = lambda rank: output_is_shared(tmp_path / folders[rank])  # noqa: E731
    assert processes(work, tmp_path / "store", len(folders), per_node) == [shared] * len(folders)
    assert not [path for letter in set(folders) for path in (tmp_path / letter).iterdir()]


@pytest.mark.parametrize("folders", ["aab", "abb"])
def test_disks_shared_by_some_nodes_are_refused(folders, tmp_path):
    found = processes(lambda rank: output_is_shared(tmp_path / folders[rank]), tmp_path / "store", 3)
    assert all(text.startswith("UserError") and "one folder on some of the 3 nodes" in text for text in found)


def test_a_folder_that_one_node_cannot_write_stops_all(tmp_path):
    (tmp_path / "b").touch()
    found = processes(lambda rank: output_is_shared(tmp_path / "ab"[rank]), tmp_path / "store", 2)
    assert all(f"--output_dir {tmp_path / 'b'}" in text and "cannot be written" in text for text in found)


def test_a_problem_of_one_node_is_told_on_all(tmp_path):
    work = lambda rank: _stop_on(["of both", "of one"][: rank + 1], "Wrong:")  # noqa: E731
    told = "UserError: Wrong:\nprocess 0: of both\nprocess 1: of both\nprocess 1: of one"
    assert processes(work, tmp_path / "store", 2) == [told] * 2
    same = lambda _: _stop_on(["of both"], "Wrong:")  # noqa: E731
    assert processes(same, tmp_path / "store2", 2) == ["UserError: Wrong:\nof both"] * 2
    assert processes(lambda _: _stop_on([], "Wrong:"), tmp_path / "store3", 2) == [None] * 2


@pytest.mark.parametrize(("count", "per_node", "readers"), [(1, 1, []), (2, 2, []), (4, 2, [0, 2]), (2, 1, [0, 1])])
def test_data_files_are_compared_by_the_first_process_of_each_of_several_nodes(count, per_node, readers, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"id": n} for n in range(3)]))

    def work(_: int) -> bool:
        with mock.patch("finetune.checks._content", wraps=checks._content) as content:
            checks.check_same_data({"train": load_samples(tmp_path / "train.json")})
        return content.called

    found = processes(work, tmp_path / "store", count, per_node)
    assert [rank for rank in range(count) if found[rank]] == readers


def test_the_node_with_another_file_is_named(tmp_path):
    """Another file with as many samples, and one with more, of which each process tells."""
    for rank, samples in enumerate([["a", "b"], ["a", "b"], ["a", "c"], ["a", "b", "c"]]):
        (tmp_path / f"{rank}.json").write_text(json.dumps([{"id": name} for name in samples]))

    def read(*files: int) -> list:
        work = lambda rank: checks.check_same_data({"train": load_samples(tmp_path / f"{files[rank]}.json")})  # noqa: E731
        return processes(work, tmp_path / f"store{''.join(map(str, files))}", 4, per_node=2)

    assert all(
        text.startswith("UserError: The processes read different data") and "process 2" in text and "2.json (" in text
        for text in read(0, 0, 2, 2)
    )
    assert all("process 1 on" in text and "reads train: 3 samples" in text for text in read(0, 3, 0, 0))


@pytest.mark.parametrize(
    ("steps", "agreed"),
    [
        (([2, 4], [2, 4]), 4),
        (([2, 4], [2]), 2),
        (([2], [2, 4]), 2),
        (([8, 10], [8]), 8),
        (([2, 4], [2, 6]), 2),
        (([], []), None),
        (([2], [4]), "UserError"),
        (([2], []), "UserError"),
    ],
)
def test_nodes_resume_the_newest_checkpoint_that_all_have(steps, agreed, tmp_path):
    for rank, of_node in enumerate(steps):
        for step in of_node:
            (tmp_path / str(rank) / f"checkpoint-{step}").mkdir(parents=True)
            (tmp_path / str(rank) / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    found = processes(lambda rank: newest_everywhere(tmp_path / str(rank), writes=True), tmp_path / "store", 2)
    if agreed == "UserError":
        assert all("no complete checkpoint in common" in text and "process 0: [2]" in text for text in found)
    else:
        assert found == [agreed and str(tmp_path / f"{rank}/checkpoint-{agreed}") for rank in range(2)]


def test_a_checkpoint_that_cannot_be_put_in_its_place_ends_all(tmp_path, monkeypatch):
    """It is moved by one of the processes, and would be waited for by the others."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = tmp_path / "_incomplete" / "checkpoint-2"
    whole.mkdir(parents=True)
    (whole / "trainer_state.json").write_text("{}")
    write_manifest(whole)
    monkeypatch.setattr(checkpoints.os, "replace", full)
    found = processes(lambda rank: newest_everywhere(tmp_path, writes=rank == 0), tmp_path / "store", 2, 2)
    assert all("cannot be put in its place: [Errno 28] No space left" in text for text in found)


def on_two_nodes(outputs: tuple[Path, Path], script: str, *flags: object, **variables: object) -> list:
    """Two nodes, each with an OUTPUT_DIR of its own or the same, that must both succeed."""
    results = launch_nodes(script, *flags, nodes=[{"OUTPUT_DIR": output} for output in outputs], **variables)
    for result in results:
        assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return results


RUNS = {  # launcher, DeepSpeed file, model, flags
    "lora-plain": ("finetune_lora.sh", "", "llama3", ("--lora_r", 8, "--lora_dropout", 0)),
    "lora-zero2": ("finetune_lora.sh", "ds_config_zero2.json", "llama3", ("--lora_r", 8, "--lora_dropout", 0)),
    "lora-zero3": ("finetune_lora.sh", "ds_config_zero3.json", "llama3", ("--lora_r", 8, "--lora_dropout", 0)),
    "full-plain": ("finetune_ds.sh", "", "minicpm", ()),
    "full-zero3": ("finetune_ds.sh", "ds_config_zero3.json", "minicpm", ()),
}


def call(name: str, tiny, data_file: Path, *more: object) -> tuple[str, tuple, dict]:
    """Launcher, flags and variables of a run of 4 steps of 4 samples over two processes, with a checkpoint at 2."""
    script, deepspeed, llm_type, flags = RUNS[name]
    short = ("--batch_size", 2, "--max_steps", STEPS, "--logging_steps", 1, "--learning_rate", 1e-3)
    same = (
        "--lr_scheduler_type",
        "constant",
        "--warmup_ratio",
        0,
        "--dataloader_num_workers",
        0,
        "--report_to",
        "none",
    )
    variables = {"MODEL": tiny[llm_type], "DATA": data_file, "DS_CONFIG": deepspeed, "SAVE_STEPS": 2}
    return script, (*short, *same, *flags, *more), variables


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [file for file in folder.glob("*model.safetensors")]
    return load_file(file)


def assert_same_weights(left: Path, right: Path) -> None:
    expected = weights(right)
    assert set(weights(left)) == set(expected)
    for name, tensor in weights(left).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def logits(folder: Path) -> torch.Tensor:
    model, _ = load_finetuned(folder)
    return model(data={"input_ids": torch.arange(9)[None]}).logits


@pytest.mark.slow
def test_two_nodes_with_their_own_disks(tiny, data_file, tmp_path):
    """Losses of one process with the whole batch; each node is left with a complete result."""
    script, flags, variables = call("lora-zero2", tiny, data_file, "--save_strategy", "no")
    nodes = tmp_path / "node0", tmp_path / "node1"
    results = on_two_nodes(nodes, script, *flags, **variables)
    (told,) = [line for line in results[0].stderr.splitlines() if "2 nodes" in line]
    assert "a folder on each node's own disk" in told and "2 nodes" not in results[1].stderr
    one = "--batch_size 4 --use_lora true --lora_alpha 64 --weight_decay 0.1 --adam_beta2 0.95".split()
    plain = [str(flag) for flag in flags[2:]]
    train(
        [
            *(*one, *plain, "--gradient_checkpointing", "true", "--model_name_or_path", str(tiny["llama3"])),
            *("--data_path", str(data_file), "--output_dir", str(tmp_path / "one")),
        ]
    )
    assert losses(nodes[0]) == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    assert torch.equal(logits(nodes[0]), logits(nodes[1]))
    assert json.loads((nodes[1] / "training_settings.json").read_text())["resolved"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "local"])
@pytest.mark.parametrize("name", RUNS)
def test_nodes_train_save_and_resume_as_one(name, shared, tiny, data_file, tmp_path):
    """Two nodes with a process each end with losses and weights of one node with two, unbroken and resumed."""
    script, flags, variables = call(name, tiny, data_file)
    launch(script, *flags, timeout=PATIENCE, OUTPUT_DIR=tmp_path / "one", GPUS_PER_NODE=2, **variables)
    nodes = (tmp_path / "node0", tmp_path / ("node0" if shared else "node1"))
    on_two_nodes(nodes, script, *flags, **variables)
    assert losses(nodes[0]) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for node in set(nodes):
        assert_same_weights(node, tmp_path / "one")
        assert_same_weights(node / "checkpoint-4", tmp_path / "one" / "checkpoint-4")
        assert torch.equal(logits(node), logits(node / "checkpoint-4"))
        shutil.rmtree(node / "checkpoint-4")
        for file in node.iterdir():
            if file.is_file():
                file.unlink()
    on_two_nodes(nodes, script, *flags, "--resume_from_checkpoint", "true", **variables)
    for node in set(nodes):
        assert losses(node / "checkpoint-4") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert_same_weights(node, tmp_path / "one")


def test_slurm_script_starts_the_launcher_on_every_node(tmp_path):
    """With stand-ins for SLURM's commands, and a launcher that prints what it was given."""
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames n[07-08]" ] && printf "n07\\nn08\\n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nfor n in 0 1; do SLURM_NODEID=$n "$@" || exit; done',
    }
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    launcher = tmp_path / "a launcher.sh"
    launcher.write_text('echo "$NODE_RANK/$NNODES $MASTER_ADDR:$MASTER_PORT $MODEL [$1] [$2]"; exit "${STATUS:-0}"\n')
    job = {"SLURM_JOB_NODELIST": "n[07-08]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "1230045"}
    environment = {
        **job,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "MODEL": "m",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    spooled = shutil.copy(ROOT / "finetune" / "slurm.sh", tmp_path / "slurm_script")

    def submit(**more: str):
        command = ["sh", spooled, "--run_name", "a name"]
        whole = {**environment, "LAUNCHER": launcher.name, **more}
        return subprocess.run(command, env=whole, cwd="/", capture_output=True, text=True)

    result = submit()
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{n}/2 n07:20045 m [--run_name] [a name]" for n in range(2)]
    assert submit(STATUS="3").returncode == 3
    assert submit(MASTER_PORT="7000").stdout.startswith("0/2 n07:7000")
    assert "start this script with sbatch" in submit(SLURM_SUBMIT_DIR="").stderr
    header = [line for line in Path(spooled).read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --signal=TERM@120"} <= set(header)
    for launched in ("finetune/finetune_lora.sh", "finetune/finetune_ds.sh"):
        assert launched in Path(spooled).read_text() and (ROOT / launched).is_file()
