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


@pytest.mark.parametrize("old_torch", [True, False])
def test_a_lock_that_nobody_holds(extensions, start, monkeypatch, old_torch):
    """PyTorch before 2.14 waits for ever for a file that a killed build leaves; later ones do not."""
    if old_torch:
        monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    else:
        monkeypatch.delattr(cpp_extension, "FileBaton", raising=False)
    folder = extensions / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    assert "would load" in start(), "another process of the same run may hold it"
    for path in (folder / "lock", folder):
        os.utime(path, (LONG_AGO, LONG_AGO))
    said = start()
    assert (f"{folder / 'lock'}: DeepSpeed waits for ever" in said and "Remove the file" in said) == old_torch
    assert ("would load" in said) == (not old_torch)
    builder = subprocess.Popen([sys.executable, "-c", "input()"], cwd=folder, stdin=subprocess.PIPE)
    try:
        assert "would load" in start()
    finally:
        builder.communicate(b"\n")


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
