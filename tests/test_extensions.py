"""DeepSpeed's extensions: said before they are compiled, and a build that cannot be, or that nobody finishes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, launch, outcome
from torch.utils import cpp_extension

from finetune import extensions as module
from finetune import finetune
from finetune.extensions import needed_extensions
from finetune.minicpmv import MiniCPMV

ZERO2 = ROOT / "finetune" / "ds_config_zero2.json"
LONG_AGO = time.time() - 3600


@pytest.fixture
def extensions(tmp_path, monkeypatch) -> Path:
    """An empty folder for extensions, as on a new machine."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


@pytest.fixture
def start(tiny, data_file, tmp_path, monkeypatch, capsys, caplog):
    """What a run under DeepSpeed says before its weights load, which here ends it."""

    def stop(*_, **__):
        raise SystemExit("weights would load")

    monkeypatch.setattr(MiniCPMV, "from_pretrained", stop)
    words = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", tmp_path / "out"]
    words += ["--deepspeed", ZERO2, "--report_to", "none"]

    def call() -> str:
        caplog.clear()
        return "\n".join([*outcome(finetune.train, words, capsys)[1], caplog.text])

    return call


def test_a_build_is_announced_once(extensions, start):
    folder = extensions / "deepspeed_shm_comm"
    said = start()
    assert f"DeepSpeed compiles its extension deepspeed_shm_comm in {folder}" in said and "would load" in said
    (folder / "deepspeed_shm_comm.so").touch()
    assert "compiles" not in start()


@pytest.fixture
def lock(extensions, monkeypatch) -> Path:
    """What a killed build leaves with PyTorch before 2.14, which waits for ever for its end."""
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    monkeypatch.setattr(module, "QUIET_HERE", 1.0)
    monkeypatch.setattr(module, "LOOK_EVERY", 0.05)
    folder = extensions / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    return folder / "lock"


@pytest.mark.parametrize("age", ["just now", "long ago"])
def test_a_lock_that_nobody_holds(lock, start, monkeypatch, age):
    if age == "long ago":
        monkeypatch.setattr(module, "_is_ours_alone", lambda _: False)
        for path in (lock, lock.parent):
            os.utime(path, (LONG_AGO, LONG_AGO))
    said = start()
    assert f"{lock}: DeepSpeed waits for ever" in said and "Remove the file" in said and "would load" not in said
    assert ("waiting for another run that compiles deepspeed_shm_comm" in said) == (age == "just now")


@pytest.mark.usefixtures("lock")
def test_a_lock_of_later_versions_stands_for_nothing(start, monkeypatch):
    monkeypatch.delattr(cpp_extension, "FileBaton")
    assert "would load" in start()


@pytest.mark.parametrize("shared", [False, True])
def test_a_build_that_goes_on_is_waited_for(lock, start, monkeypatch, shared):
    """On a disk of this machine for its processes, on another for changes; it ends here after the patience for either
    without them is over several times."""
    monkeypatch.setattr(module, "_is_ours_alone", lambda _: not shared)
    if shared:
        monkeypatch.setattr(module, "QUIET", 1.0)
    builds = "import os, pathlib, sys, time\nos.chdir(sys.argv[1])\nfor n in range(int(sys.argv[2])):\n"
    builds += "    time.sleep(0.3)\n    pathlib.Path(sys.argv[3], f'{n}.o').touch()\nos.remove(sys.argv[4])\n"
    place, elsewhere = (lock.parents[1], lock.parent) if shared else (lock.parent, lock.parents[1])
    where = lock.parent if shared else elsewhere
    with subprocess.Popen([sys.executable, "-c", builds, place, "10", where, lock]) as builder:
        said = start()
    assert builder.returncode == 0 and not lock.exists() and "would load" in said


def test_whose_disk_a_folder_is_on():
    """The shared memory of a machine is its own; of what is no disk at all nothing is known."""
    assert module._is_ours_alone(Path("/dev/shm"))
    assert not module._is_ours_alone(Path("/proc"))


def test_nothing_to_compile_with(extensions, start, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    said = start()
    assert "ninja is missing (pip install ninja)" in said
    assert "there is no C++ compiler no-such-compiler: install one (g++), or name it in CXX" in said
    (extensions / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert "would load" in start()


def test_a_folder_that_cannot_be_made(tmp_path, start, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    assert "set TORCH_EXTENSIONS_DIR to a folder of yours" in start()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, []),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ["cpu_adam"]),
        ({"optimizer": {"type": "AdamW"}}, ["fused_adam"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["async_io"]),
    ],
)
def test_which_extensions_a_file_needs(config, names):
    assert needed_extensions(config, on_cpu=False) == names
    assert needed_extensions(config, on_cpu=True) == ["deepspeed_shm_comm", *names]


@pytest.mark.parametrize("path", sorted((ROOT / "finetune").glob("ds_config_*.json")), ids=lambda path: path.stem)
def test_shipped_files_compile_nothing_on_gpus(path):
    assert needed_extensions(json.loads(path.read_text()), on_cpu=False) == []


@pytest.mark.slow  # compiles
def test_two_processes_compile_once(tiny, data_file, tmp_path):
    variables = {"MODEL": tiny["llama3"], "DATA": data_file, "OUTPUT_DIR": tmp_path / "out", "GPUS_PER_NODE": 2}
    variables["TORCH_EXTENSIONS_DIR"] = tmp_path / "extensions"
    flags = ("--max_steps", "1", "--report_to", "none")
    first = launch("finetune_lora.sh", *flags, timeout=PATIENCE, **variables)
    assert first.stderr.count("DeepSpeed compiles its extension") == 1
    variables["OUTPUT_DIR"] = tmp_path / "again"
    assert "compiles" not in launch("finetune_lora.sh", *flags, timeout=PATIENCE, **variables).stderr
