"""Folders of models and adapters that are not what their files' names say: every program says it, before it loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import outcome, write_adapter
from safetensors.torch import load_file, save_file

from finetune import chat, evaluate, finetune, inspect_data, loading, merge_lora
from finetune.adapters import load_adapters
from finetune.loading import EXTRA_WEIGHTS_NAME, load_finetuned
from finetune.minicpmv import MiniCPMV
from finetune.model_folder import access_problem, checkpoint_problems, describe

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)
WEIGHTS, MATRICES, INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"
PROGRAMS = ("finetune", "chat", "evaluate", "merge_lora", "inspect_data")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    return write_adapter(tiny["llama3"], tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture
def said(tiny, adapter, data_file, tmp_path, capsys, monkeypatch) -> Callable[..., tuple[int, list[str]]]:
    """Calls a program with a model or an adapter, in which it may not load any weight; its exit status, and what it
    says, line by line."""

    def fails(*_, **__):
        pytest.fail("weights are loaded")

    monkeypatch.setattr(MiniCPMV, "from_pretrained", fails)
    monkeypatch.setattr(loading, "load_checkpoint", fails)

    def call(program: str, model: Path | str | None = None, lora: Path | None = None, *more: object):
        base, data, out = model or tiny["llama3"], ("--data_path", data_file), tmp_path / "out"
        train = ("--model_name_or_path", base, *data, "--report_to", "none", "--output_dir", out)
        calls = {
            "finetune": (*train, *(("--use_lora", "true", "--lora_weight_path", lora) if lora else ())),
            "chat": ("--model", lora or base, *(("--base", base) if lora else ()), "--question", "What?"),
            "evaluate": ("--model", lora or base, *(("--base", base) if lora else ()), *data, "--output", out),
            "merge_lora": ("--adapter", lora or adapter, "--base", base, "--output", out),
            "inspect_data": ("--model_name_or_path", base, *data, "--num_workers", 0),
        }
        main = {
            "finetune": finetune.train,
            "chat": chat.main,
            "evaluate": evaluate.main,
            "merge_lora": merge_lora.main,
            "inspect_data": inspect_data.main,
        }[program]
        status, lines = outcome(main, (*calls[program], *more), capsys)
        assert not os.path.exists(out)
        return status, [line for line in lines if "Warning" not in line]

    return call


def wrong_call(program: str) -> int:
    return 1 if program in ("finetune", "merge_lora") else 2


def changed(source: Path, target: Path, name: str, how: str) -> Path:
    folder = shutil.copytree(source, target)
    file = folder / name
    if how == "pointer":
        file.write_text(POINTER)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "dangling":
        file.unlink()
        file.symlink_to(folder / "blobs" / name)
    elif how == "text":
        file.write_text("{")
    return folder


EXPECTED = {
    "pointer": "is a git-lfs pointer, not the file itself",
    "cut": "cannot be read (",
    "empty": "is empty (0 bytes)",
    "dangling": "is a link to",
    "text": "is no JSON",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_broken_files_of_a_model(said, tiny, tmp_path, program):
    for name, hows in {
        WEIGHTS: ("pointer", "cut", "empty", "dangling"),
        "config.json": ("pointer", "empty", "dangling", "text"),
        "tokenizer.json": ("pointer", "empty"),
        "tokenizer_config.json": ("pointer", "text"),
        "generation_config.json": ("text",),
    }.items():
        for how in hows:
            model = changed(tiny["llama3"], tmp_path / f"{how} {name}", name, how)
            status, lines = said(program, model)
            assert status == wrong_call(program)
            about = [line for line in lines if f"{model / name}: " in line]
            assert len(about) == 1 and EXPECTED[how] in about[0], lines
            assert sum(str(model) in line for line in lines) == 1, lines  # nothing is said twice


@pytest.mark.parametrize("program", PROGRAMS)
def test_broken_sentencepiece_models(said, tiny, tmp_path, program):
    model = changed(tiny["minicpm"], tmp_path / "model", "tokenizer.model", "pointer")
    status, lines = said(program, model)
    assert status == wrong_call(program)
    assert sum(f"{model / 'tokenizer.model'}: {EXPECTED['pointer']}" in line for line in lines) == 1, lines


def as_shards(source: Path, target: Path) -> Path:
    folder = shutil.copytree(source, target, ignore=shutil.ignore_patterns(WEIGHTS))
    tensors = load_file(source / WEIGHTS)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = [dict(list(tensors.items())[n::2]) for n in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_shards(said, tiny, tmp_path, program):
    whole = as_shards(tiny["llama3"], tmp_path / "whole")
    assert checkpoint_problems(whole) == []
    second = "model-00002-of-00002.safetensors"
    for how in ("pointer", "cut", "empty"):
        model = changed(whole, tmp_path / how, second, how)
        status, lines = said(program, model)
        assert status == wrong_call(program)
        assert sum(f"{model / second}: " in line and EXPECTED[how] in line for line in lines) == 1, lines
    (whole / second).unlink()
    status, lines = said(program, whole)
    assert status == wrong_call(program)
    assert any(f"{whole / INDEX}: names files that are not beside it: {second}" in line for line in lines), lines
    (whole / INDEX).write_text("{}")
    assert any(f"{whole / INDEX}: is no index of weights" in line for line in said(program, whole)[1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_quantized_models(said, tiny, tmp_path, program):
    model = shutil.copytree(tiny["llama3"], tmp_path / "int4")
    config = json.loads((model / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    status, lines = said(program, model)
    assert status == wrong_call(program)
    told = [line for line in lines if "is quantized" in line]
    assert len(told) == 1 and "quant_method 'bitsandbytes'" in told[0] and "original weights" in told[0]
    with pytest.raises(ValueError, match="is quantized"):
        load_finetuned(model)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_folder_of_the_hubs_cache(said, tiny, tmp_path, program):
    root = tmp_path / "models--openbmb--MiniCPM-V-2"
    for number, revision in enumerate(("0" * 40, "1" * 40)):
        shutil.copytree(tiny["llama3"], root / "snapshots" / revision)
        os.utime(root / "snapshots" / revision, (number, number))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for path in (root, root / "snapshots"):
        status, lines = said(program, path)
        assert status == wrong_call(program)
        assert any(f"the model itself is in {root / 'snapshots' / ('0' * 40)}" in line for line in lines), lines
    (root / "refs" / "main").write_text("gone")
    assert any(str(root / "snapshots" / ("1" * 40)) in line for line in said(program, root)[1])


@contextmanager
def as_somebody() -> Iterator[Path]:
    """As a user who may not read everything, with a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    user, mode = os.geteuid(), path.stat().st_mode
    os.seteuid(os.getuid())
    path.chmod(0)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        path.chmod(mode)
        os.seteuid(user)


def copy_for_all(source: Path, target: Path) -> Path:
    user = os.geteuid()
    os.seteuid(os.getuid())
    shutil.copytree(source, target)
    for path in (target, *target.iterdir()):
        path.chmod(0o755)
    os.seteuid(user)
    return target


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_may_not_be_read(said, tiny, adapter, program):
    """By a user without the right: the file or folder is there, so that it is not called missing."""
    with as_somebody() as place:
        models = copy_for_all(tiny["llama3"], place / "models" / "model").parent
        lora = copy_for_all(adapter, place / "lora")
        model = models / "model"
        for path in (model / WEIGHTS, model / "config.json", model / "tokenizer.json", model, models):
            with locked(path):
                status, lines = said(program, model)
            assert status == wrong_call(program)
            assert any("may not be read: Permission denied" in line and "chmod" in line for line in lines), (
                path,
                lines,
            )
            about = [line for line in lines if str(place) in line]
            assert not any("No such file" in line or "there is no such" in line for line in about), lines
        if program == "inspect_data":
            return
        # what else the call reads and writes is the administrator's here, and is not what this is about
        for path in (lora / MATRICES, lora / EXTRA_WEIGHTS_NAME, lora / "adapter_config.json", lora):
            with locked(path):
                status, lines = said(program, model, lora)
            assert status == wrong_call(program)
            assert any("may not be read: Permission denied" in line for line in lines), (path, lines)


def test_a_folder_whose_files_are_out_of_reach(tiny):
    with as_somebody() as place:
        model = copy_for_all(tiny["llama3"], place / "model")
        for mode in (0o444, 0o111):  # listed, but not entered; entered, but not listed
            os.seteuid(os.getuid())
            model.chmod(mode)
            os.seteuid(65534 if os.getuid() == 0 else os.getuid())
            assert "may not be read: Permission denied" in access_problem(model)
        os.seteuid(os.getuid())
        model.chmod(0o755)


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "inspect_data"])
def test_broken_files_of_an_adapter(said, adapter, tmp_path, program):
    for name, hows in {
        MATRICES: ("pointer", "cut", "empty"),
        EXTRA_WEIGHTS_NAME: ("pointer", "empty"),
        "adapter_config.json": ("pointer", "empty", "dangling", "text"),
    }.items():
        for how in hows:
            lora = changed(adapter, tmp_path / f"{how} {name}", name, how)
            status, lines = said(program, None, lora)
            assert status == wrong_call(program)
            about = [line for line in lines if f"{lora / name}: " in line]
            assert about and EXPECTED[how] in about[0], lines
            with pytest.raises(ValueError, match=rf"{name}: ") as error:
                load_finetuned(lora)
            assert EXPECTED[how] in str(error.value)
            with pytest.raises(ValueError, match=rf"{name}: "):
                load_adapters({"one": lora})


def test_python_says_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_checkpoint", lambda *a, **k: pytest.fail("weights are loaded"))
    for how in ("pointer", "cut", "empty"):
        model = changed(tiny["llama3"], tmp_path / how, WEIGHTS, how)
        with pytest.raises(ValueError) as error:
            load_finetuned(model)
        assert [str(error.value)] == checkpoint_problems(model) and EXPECTED[how] in str(error.value)


def rename(folder: Path, name: str, part: str, other: str, share: int = 2) -> int:
    """Rename tensors of a file, one of `share`; returns how many."""
    tensors = load_file(folder / name)
    chosen = [key for key in tensors if part in key][::share]
    save_file(
        {(key.replace(part, other) if key in chosen else key): value for key, value in tensors.items()}, folder / name,
        {"format": "pt"},
    )  # fmt: skip
    return len(chosen)


def test_training_needs_all_tensors(said, tiny, tmp_path):
    """transformers would make up what is missing."""
    model = shutil.copytree(tiny["llama3"], tmp_path / "model")
    count = rename(model, WEIGHTS, "q_proj", "query")
    status, lines = said("finetune", model)
    told = [line for line in lines if f"--model_name_or_path {model}: lacks {count} tensors" in line]
    assert status == 1 and len(told) == 1 and "q_proj" in told[0]
    for program in ("chat", "evaluate", "merge_lora"):
        status, lines = said(program, model)
        assert status == 1 and any(f"lacks {count} tensors of its config.json" in line for line in lines), lines
    _, lines = said("finetune", model, None, "--batch_size", 0)  # with all other problems
    assert told[0] in lines and any("--per_device_train_batch_size 0" in line for line in lines)


def test_shapes_that_do_not_fit(said, tiny, tmp_path):
    model = shutil.copytree(tiny["llama3"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 9999}))
    for program in ("finetune", "chat", "evaluate", "merge_lora"):
        status, lines = said(program, model)
        told = [line for line in lines if "2 tensors in its weight files have other shapes" in line]
        assert status == 1 and len(told) == 1 and "by its config.json (9999, 128)" in told[0], lines


def test_a_config_without_a_model(said, tiny, tmp_path):
    model = shutil.copytree(tiny["llama3"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for wrong in ({"num_attention_heads": 3}, {"hidden_act": "none"}, {"hidden_size": "wide"}):
        (model / "config.json").write_text(json.dumps({**config, **wrong}))
        for program in ("finetune", "chat", "evaluate", "merge_lora"):
            status, lines = said(program, model)
            assert status != 0 and any(str(model) in line for line in lines), lines


def test_files_of_old_pytorch(tiny, tmp_path):
    """Before 1.6: no table of contents; they are read all the same, and tensors that are missing are told."""
    model = shutil.copytree(tiny["llama3"], tmp_path / "old", ignore=shutil.ignore_patterns(WEIGHTS))
    tensors = load_file(tiny["llama3"] / WEIGHTS)
    torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert checkpoint_problems(model) == []
    loaded, _ = load_finetuned(model)
    assert torch.equal(loaded.llm.lm_head.weight, tensors["llm.lm_head.weight"])
    tensors.pop("resampler.query")
    torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its config\.json: resampler\.query"):
        load_finetuned(model)


def test_inspection_needs_no_weights(said, tiny, tmp_path):
    model = shutil.copytree(tiny["llama3"], tmp_path / "model", ignore=shutil.ignore_patterns(WEIGHTS))
    assert said("inspect_data", model) == (0, [])
    status, lines = said("finetune", model)
    assert status == 1 and sum("holds no weights" in line for line in lines) == 1


def test_tensors_are_not_read(tiny):
    """Only described: on the device "meta"."""
    found = describe(tiny["llama3"] / WEIGHTS)
    assert all(tensor.is_meta for tensor in found.values())


# ---- adapters to be trained further


def renamed_adapter(adapter: Path, target: Path) -> tuple[Path, int]:
    lora = shutil.copytree(adapter, target)
    return lora, rename(lora, MATRICES, "lora_A", "lora_X")


def test_training_refuses_an_adapter_with_other_names(said, adapter, tmp_path):
    lora, count = renamed_adapter(adapter, tmp_path / "lora")
    status, lines = said("finetune", None, lora, "--batch_size", 0)
    told = [line for line in lines if "does not fit its base model" in line]
    assert status == 1 and len(told) == 1 and told[0].startswith(f"--lora_weight_path {lora}: ")
    assert f"lacks {count} of the tensors" in told[0] and "lora_X" in told[0]
    assert any("--per_device_train_batch_size 0" in line for line in lines)
    with pytest.raises(ValueError, match="does not fit its base model"):
        load_finetuned(lora)


@pytest.mark.parametrize("change", ["name", "shape"])
def test_training_refuses_other_tensors_that_do_not_fit(said, adapter, tmp_path, change):
    lora = shutil.copytree(adapter, tmp_path / "lora")
    extra = torch.load(lora / EXTRA_WEIGHTS_NAME)
    names = [name for name in extra if ".resampler." in name]
    for name in names:
        value = extra.pop(name)
        extra[name if change == "shape" else name.replace("resampler", "sampler")] = value.flatten()[:3].clone()
    torch.save(extra, lora / EXTRA_WEIGHTS_NAME)
    status, lines = said("finetune", None, lora)
    told = [line for line in lines if f"{lora / EXTRA_WEIGHTS_NAME}: " in line]
    assert status == 1 and len(told) == 1
    assert str(len(names)) in told[0] and ("sampler." if change == "name" else "has shape (3,)") in told[0]


def test_loading_for_training_refuses_it_too(tiny, adapter, tmp_path):
    """Also where the files were not looked at before, such as on a base that had to be downloaded."""
    lora, _ = renamed_adapter(adapter, tmp_path / "lora")
    flags = ["--model_name_or_path", tiny["llama3"], "--output_dir", tmp_path / "out", "--use_lora", "true"]
    model_args, _, args, lora_args = finetune.parse_arguments([*map(str, [*flags, "--lora_weight_path", lora])])
    with pytest.raises(ValueError, match="LoRA tensors are missing, or the model has no place for them"):
        finetune.load_model(model_args, args, lora_args, finetune.load_config(str(tiny["llama3"])))
    lora_args.lora_weight_path = str(adapter)
    model = finetune.load_model(model_args, args, lora_args, finetune.load_config(str(tiny["llama3"])))
    matrices = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert matrices and all(p.requires_grad and p.dtype == torch.float32 for p in matrices.values())
    stored = load_file(adapter / MATRICES)
    assert all(torch.equal(p, stored[name.replace(".default.", ".")]) for name, p in matrices.items())


# ---- names on the hub: what is in the cache


@pytest.fixture
def cached(tiny, tmp_path) -> Path:
    """The snapshot of somebody/model in a cache that --cache_dir may name."""
    root = tmp_path / "cache" / "models--somebody--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(tiny["llama3"], root / "snapshots" / ("0" * 40))


def test_what_the_cache_holds_is_looked_at(said, cached):
    call = ("finetune", "somebody/model", None, "--cache_dir", cached.parents[2])
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):  # all is well
        said(*call)
    count = rename(cached, WEIGHTS, "q_proj", "query")
    status, lines = said(*call)
    assert status == 1 and any(f"--model_name_or_path somebody/model: lacks {count} tensors" in line for line in lines)
    (cached / WEIGHTS).unlink()  # not here yet
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        said(*call)


def test_what_was_downloaded_is_looked_at(said, cached, tiny, monkeypatch):
    """Before any step: transformers has made up what is missing."""

    def download(*_, **__):
        shutil.copy(tiny["llama3"] / WEIGHTS, cached)
        rename(cached, WEIGHTS, "q_proj", "query")

    (cached / WEIGHTS).unlink()
    monkeypatch.setattr(finetune, "load_model", download)
    status, lines = said("finetune", "somebody/model", None, "--cache_dir", cached.parents[2])
    assert status == 1 and any("--model_name_or_path somebody/model: lacks" in line for line in lines), lines


@pytest.mark.parametrize("program", PROGRAMS)
def test_broken_files_in_the_cache(program, said, cached):
    """Of a name on the hub; what is not there at all may still be fetched."""
    whole = (cached / WEIGHTS).read_bytes()
    for content, why in ((whole[: len(whole) // 2], "cannot be read"), (POINTER.encode(), "is a git-lfs pointer")):
        (cached / WEIGHTS).write_bytes(content)
        status, lines = said(program, "somebody/model", None, "--cache_dir", cached.parents[2])
        assert status == wrong_call(program) and any(WEIGHTS in line and why in line for line in lines), lines


def test_a_model_that_cannot_be_fetched(said, cached):
    (cached / WEIGHTS).unlink()

    def fetch(*_, **__):
        raise OSError("somebody/model does not appear\nto have a file named model.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "load_model", fetch)
        status, lines = said("finetune", "somebody/model", None, "--cache_dir", cached.parents[2])
    wanted = "--model_name_or_path somebody/model: cannot be loaded: somebody/model does not appear to have a file"
    assert status == 1 and any(line.startswith(wanted) for line in lines), lines


def test_a_quantized_model_on_the_hub(said, cached):
    config = json.loads((cached / "config.json").read_text())
    (cached / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for program in PROGRAMS:
        status, lines = said(program, "somebody/model", None, "--cache_dir", cached.parents[2])
        assert status == wrong_call(program) and any("quant_method 'gptq'" in line for line in lines), lines
