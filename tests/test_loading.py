"""Loading under ZeRO-3: tensor by tensor, with what `from_pretrained` says of names and shapes that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "benchmarks"))
import load_memory

# Loads every folder named on the command line in the same two processes; rank 0 writes what it got.
PROGRAM = """
import json, sys
import torch
import finetune.finetune as toolkit
from transformers.utils import logging
arguments = ["--output_dir", "none", "--data_path", "none", "--deepspeed", "finetune/ds_config_zero3.json"]
for folder in sys.argv[1:]:
    model_args, _, args, lora_args = toolkit.parse_arguments(["--model_name_or_path", folder, *arguments])
    config = toolkit.load_config(folder, None)
    try:
        model = toolkit.load_model(model_args, args, lora_args, config)
    except RuntimeError as error:
        open(f"{folder}/error.{args.process_index}", "w").write(str(error))
        continue
    import deepspeed
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            tensors[name] = tensor.detach().clone()
    torch.save(tensors, f"{folder}/loaded.{args.process_index}")
"""


def variants(base: Path, folder: Path) -> dict[str, Path]:
    """Copies of a checkpoint: in several files, as .bin files, with names and shapes that do not fit."""
    tensors = load_file(base / "model.safetensors")
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    made = {}

    def copy(name: str) -> Path:
        made[name] = folder / name
        shutil.copytree(base, made[name], ignore=shutil.ignore_patterns("model.safetensors"))
        return made[name]

    def index(path: Path, names: list[str]) -> None:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, copy("sharded") / name if "sharded" not in made else made["sharded"] / name, {"format": "pt"})
    index(made["sharded"] / "model.safetensors.index.json", names)
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    copy("bin")
    torch.save(parts[0], made["bin"] / names[0])
    torch.save(parts[1], made["bin"] / names[1], _use_new_zipfile_serialization=False)  # PyTorch before 1.6
    index(made["bin"] / "pytorch_model.bin.index.json", names)
    bias = "vpm.encoder.layers.0.self_attn.q_proj.bias"
    other = {name: tensor for name, tensor in tensors.items() if name != bias} | {"stranger": torch.ones(2)}
    save_file(other, copy("other_names") / "model.safetensors", {"format": "pt"})
    wrong = tensors | {bias: torch.ones(3)}
    save_file(wrong, copy("wrong_shape") / "model.safetensors", {"format": "pt"})
    return made


def test_zero3_loads_what_the_files_hold(tiny, tmp_path):
    """Safetensors and .bin in several files, both kinds of .bin; missing, unexpected and misshapen tensors."""
    made = variants(tiny["llama3"], tmp_path)
    made["minicpm"] = shutil.copytree(tiny["minicpm"], tmp_path / "minicpm")  # has a buffer among its weights
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *map(str, made.values())], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"

    def loaded(name: str, rank: int) -> dict[str, torch.Tensor]:
        return torch.load(made[name] / f"loaded.{rank}")

    for name, base in (("sharded", "llama3"), ("bin", "llama3"), ("minicpm", "minicpm")):
        expected = load_file(tiny[base] / "model.safetensors")
        for rank in (0, 1):
            tensors = loaded(name, rank)
            assert tensors.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == [], (name, rank)
    expected = load_file(tiny["llama3"] / "model.safetensors")
    tensors = loaded("other_names", 0)
    changed = [key for key in expected if not torch.equal(tensors[key], expected[key])]
    assert set(changed) <= {"vpm.encoder.layers.0.self_attn.q_proj.bias"} and "stranger" not in tensors
    report = result.stdout + result.stderr
    for rank in (0, 1):  # or the one that saw nothing would wait for the other
        assert "ignore_mismatched_sizes" in (made["wrong_shape"] / f"error.{rank}").read_text()
    assert "stranger" in report and "UNEXPECTED" in report and "MISSING" in report and "MISMATCH" in report


@pytest.mark.slow
def test_no_process_holds_the_whole_model(monkeypatch, capsys):
    """The benchmark's table: under ZeRO-3 two processes each hold less than the model at any time, with mapped pages.

    transformers' own way reads 2.1 times the model. A plain run on a CPU holds nothing beside its one copy: here not
    even that, since weights of the files' dtype stay in the mapped files until they are written to.
    """
    arguments = ["--gigabytes", "0.4", "--layouts", "2 processes, ZeRO-3"]
    monkeypatch.setattr(sys, "argv", ["load_memory.py", *arguments])
    load_memory.main()
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    figures = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert float(figures["model, MB"]) == pytest.approx(400, rel=0.1)
    assert 0.5 < float(figures["own / model"]) <= float(figures["peak / model"]) < 1
