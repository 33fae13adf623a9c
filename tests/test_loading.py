"""Loading: what is refused; and under ZeRO-3, tensor by tensor, what is said of names and shapes that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN_DATA, ROOT, write_adapter
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "benchmarks"))
import load_memory

from finetune import finetune, loading
from finetune.adapters import load_adapters
from finetune.arguments import find_model
from finetune.errors import UserError
from finetune.loading import (
    EXTRA_WEIGHTS_NAME,
    SETTINGS_NAME,
    describe,
    load_checkpoint,
    load_finetuned,
    missing_in_adapter,
    sample_weights,
    tensor_reader,
)
from finetune.minicpmv.tiny import MODELS, write_checkpoint

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


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """With a record of its base, as a run leaves it."""
    folder = write_adapter(tiny["llama3"], tmp_path_factory.mktemp("adapter") / "lora", "--max_slice_nums", 4)
    change_settings(folder, base_weights=sample_weights(tiny["llama3"]))
    return folder


def change_settings(folder: Path, **values: object) -> None:
    path = folder / SETTINGS_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(loading, "load_checkpoint", lambda *a, **k: pytest.fail("weights are loaded"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_file_that_was_cut_off_is_named(tiny, adapter, tmp_path):
    base = shutil.copytree(tiny["llama3"], tmp_path / "base")
    cut(base / "model.safetensors")
    for read in (load_checkpoint, describe, lambda path: tensor_reader(path)("llm.lm_head.weight")):
        place = base if read is load_checkpoint else base / "model.safetensors"
        with pytest.raises(ValueError, match=r"base/model\.safetensors: cannot be read \("):
            read(place)
    lora = shutil.copytree(adapter, tmp_path / "lora")
    cut(lora / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora/adapter_model\.safetensors: cannot be read \("):
        load_finetuned(lora)


def test_wrong_shapes_are_told(tiny, tmp_path):
    base = shutil.copytree(tiny["llama3"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 9999}))
    with pytest.raises(ValueError) as error:
        load_checkpoint(base)
    size = config["vocab_size"]
    assert f"llm.lm_head.weight has shape ({size}, " in str(error.value) and "expected (9999, " in str(error.value)
    assert "2 tensors" in str(error.value) and "ignore_mismatched_sizes" not in str(error.value)


def test_another_base_is_refused_before_it_is_loaded(tiny, adapter, tmp_path, monkeypatch):
    other = write_checkpoint(MODELS[0], tmp_path / "other", seed=1)
    load_finetuned(adapter, tiny["llama3"])
    message = rf"{other}: is not the base that the adapter was trained on: \d+ of 14 matrices"
    with monkeypatch.context() as patch:
        nothing_is_loaded(patch)
        with pytest.raises(ValueError, match=message):
            load_finetuned(adapter, base=other)
        with pytest.raises(ValueError, match=message):
            load_adapters({"food": adapter}, base=other)
        patch.setattr(finetune, "load_model", lambda *a: pytest.fail("weights are loaded"))
        flags = ("--data_path", GOLDEN_DATA / "samples.json", "--output_dir", tmp_path / "more", "--use_lora", "true")
        call = ["--model_name_or_path", other, *flags, "--lora_weight_path", adapter, "--report_to", "none"]
        with pytest.raises(UserError, match=rf"--model_name_or_path {message}"):
            finetune.train([*map(str, call)])
    # of a hub name, whose files are here only once they are loaded
    looks = iter([OSError("not in the cache"), other])

    def folder(*_, **__):
        if isinstance(found := next(looks), OSError):
            raise found
        return found

    monkeypatch.setattr(loading, "checkpoint_folder", folder)
    monkeypatch.setattr(loading, "load_checkpoint", lambda *a, **k: None)
    with pytest.raises(ValueError, match="openbmb/x: is not the base"):
        loading.load_base([adapter], "openbmb/x")


def test_an_adapter_without_a_tokenizer_takes_its_bases(tiny, adapter, tmp_path, monkeypatch):
    lora = shutil.copytree(adapter, tmp_path / "lora", ignore=shutil.ignore_patterns("token*", "special*"))
    names = loading.load_tokenizer(tiny["llama3"]).get_vocab()
    assert loading.load_tokenizer(lora).get_vocab() == names
    assert load_finetuned(lora)[1].get_vocab() == names
    assert load_adapters({"food": lora}).tokenizer.get_vocab() == names
    base = shutil.copytree(tiny["llama3"], tmp_path / "base", ignore=shutil.ignore_patterns("token*", "special*"))
    nothing_is_loaded(monkeypatch)
    with pytest.raises(ValueError, match=rf"{base}: the tokenizer cannot be loaded"):
        load_finetuned(lora, base=base)


@pytest.mark.parametrize("text", ["[]", "{", '{"resolved": 3}', '{"resolved": {"slicing": {}}}'])
def test_settings_of_another_kind_are_named(adapter, tmp_path, text):
    lora = shutil.copytree(adapter, tmp_path / "lora")
    (lora / SETTINGS_NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"{lora / SETTINGS_NAME}: "):
        load_finetuned(lora)


def test_settings_may_say_little(tiny, adapter, tmp_path):
    lora = shutil.copytree(adapter, tmp_path / "lora")
    slices = load_finetuned(tiny["llama3"])[0].config.slicing["max_slice_nums"]
    for text in ("{}", '{"resolved": {}}', '{"resolved": {"dtype": "bfloat16"}}'):
        (lora / SETTINGS_NAME).write_text(text)
        assert load_finetuned(lora)[0].get_base_model().config.slicing["max_slice_nums"] == slices
        assert find_model(str(lora)).config.slicing["max_slice_nums"] == slices


def test_what_an_adapter_lacks_is_told_alike(adapter, tmp_path):
    lora = shutil.copytree(adapter, tmp_path / "lora")
    (lora / EXTRA_WEIGHTS_NAME).unlink()
    (lora / "adapter_model.safetensors").unlink()
    told = "\n".join(missing_in_adapter(lora))
    assert "adapter_model.safetensors is missing" in told and f"{EXTRA_WEIGHTS_NAME} is missing" in told
    for use in (load_finetuned, lambda path: load_adapters({"food": path}), lambda path: find_model(str(path))):
        with pytest.raises(ValueError) as error:
            use(lora)
        assert all(line in str(error.value) for line in told.splitlines())
