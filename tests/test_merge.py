"""merge_lora.py: merged checkpoints give the adapter's logits, wrong ones are refused; cards; other programs."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DATA, LLM_TYPES, ROOT, TESTS, golden_batch, launch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from finetune import merge_lora
from finetune.arguments import TrainingArguments, find_model
from finetune.checkpoints import copy_processor, fault
from finetune.data_files import load_samples
from finetune.dataset import SupervisedDataset, data_collator
from finetune.errors import UserError
from finetune.loading import EXTRA_WEIGHTS_NAME, SETTINGS_NAME, load_finetuned, sample_weights, weight_files
from finetune.merge_lora import merge, modernize
from finetune.minicpmv import MiniCPMV, MiniCPMVConfig
from finetune.minicpmv.tiny import MODELS, write_checkpoint
from finetune.model_card import CARD, is_edited, write_card
from finetune.trainer import CPMTrainer, extra_trained_tensors

HUB = {"llama3": "minicpm_llama3_v2_5", "minicpm": "minicpm_v2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QV = r"llm\..*(q_proj|v_proj)"
VISION = r"vpm\..*(q_proj|fc1|qkv)"
CASES = {  # settings of LoraConfig, and what is trained beside it
    "plain": ({}, "resampler."),
    "patterns and rslora": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
        "vpm.",
    ),
    "dora": ({"use_dora": True}, None),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, None),
    "biases": ({"bias": "all"}, None),
    "biases of LoRA layers, trained vision tower": ({"target_modules": VISION, "bias": "lora_only"}, "vpm."),
    "lora_bias": ({"target_modules": VISION, "lora_bias": True}, None),
    "modules_to_save": ({"modules_to_save": ["lm_head", "kv_proj"]}, "llm.model.embed_tokens"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "llm.model.embed_tokens"),
    "embeddings": ({"target_modules": rf"{QV}|llm\.model\.embed_tokens"}, None),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Golden checkpoints in every dtype, by model and dtype."""
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for llm_type in LLM_TYPES:
        for name, dtype in DTYPES.items():
            path = made[llm_type, name] = folder / f"{llm_type}-{name}"
            shutil.copytree(GOLDEN[llm_type], path, ignore=shutil.ignore_patterns("*.safetensors", "preproc*"))
            AutoModel.from_pretrained(GOLDEN[llm_type], dtype=dtype).save_pretrained(path)
    return made


def write_adapter(
    base: Path, folder: Path, trained: str | None = "resampler.", scale: float = 0.05, **settings
) -> Path:
    """An adapter as training leaves it, with random matrices; `trained` is the start of the names of what else is."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModel.from_pretrained(base),
        LoraConfig(**{"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM", **settings}),
    )
    for name, parameter in model.named_parameters():
        if trained and name.startswith(f"base_model.model.{trained}") and ".lora_" not in name:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    torch.save(extra_trained_tensors(model), folder / EXTRA_WEIGHTS_NAME)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = model.get_base_model().config
    record = {"resolved": {"llm_type": config.llm_type, "slicing": {**config.slicing, "max_slice_nums": 4}}}
    (folder / SETTINGS_NAME).write_text(json.dumps({**record, "base_weights": sample_weights(base)}))
    return folder


def logits(folder: Path, llm_type: str, **kwargs) -> torch.Tensor:
    """Of the golden batch, with pictures, in the dtype of the checkpoint."""
    model, _ = load_finetuned(folder, device_map=None, **kwargs)
    data = golden_batch(llm_type)
    with torch.no_grad():
        return model(data=data).logits[data["attention_mask"]].float()


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Result]:
    """The program as it is called, within this process, where its imports are done."""

    def call(*flags: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, flags)])
        try:
            merge_lora.main()
        except SystemExit as ended:
            output = capsys.readouterr()
            return Result(1 if isinstance(ended.code, str) else ended.code, output.out, f"{output.err}{ended.code}")
        output = capsys.readouterr()
        return Result(0, output.out, output.err)

    return call


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("llm_type", LLM_TYPES)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_adapter(bases, tmp_path, llm_type, case):
    settings, trained = CASES[case]
    base = bases[llm_type, "float32"]
    adapter = write_adapter(base, tmp_path / "lora", trained, **settings)
    rounding = merge(adapter, tmp_path / "merged", max_shard_size="300KB")
    wanted = logits(adapter, llm_type)
    found = logits(tmp_path / "merged", llm_type)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - logits(base, llm_type)).abs().max() > 1e-2  # the adapter does something
    assert rounding["LoRA matrices"].changed > 0 and rounding["LoRA matrices"].loss < 1e-4
    if case != "layer_replication":  # the same names as the base, which are the hub's
        assert tensors_of(tmp_path / "merged").keys() == tensors_of(base).keys()


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_half_precision_is_kept_and_rounded_once(bases, tmp_path, llm_type):
    """Every tensor is the float32 merge, cast to the base's dtype; other tensors are the base's bits."""
    for name in ("bfloat16", "float16"):
        base = bases[llm_type, name]
        adapter = write_adapter(base, tmp_path / name, scale=0.02)
        merge(adapter, tmp_path / f"merged-{name}")
        merge(adapter, tmp_path / f"exact-{name}", dtype=torch.float32)
        before, merged, exact = (
            tensors_of(path) for path in (base, tmp_path / f"merged-{name}", tmp_path / f"exact-{name}")
        )
        assert {tensor.dtype for tensor in merged.values()} == {DTYPES[name]}
        assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
        matrices = load_file(adapter / "adapter_model.safetensors")
        key = "llm.model.layers.1.self_attn.q_proj"
        a, b = (matrices[f"base_model.model.{key}.lora_{side}.weight"].float() for side in "AB")
        by_hand = before[f"{key}.weight"].float() + b @ a * (8 / 4)  # alpha / rank
        torch.testing.assert_close(exact[f"{key}.weight"], by_hand, atol=1e-6, rtol=0)
        for key, tensor in merged.items():
            assert torch.equal(tensor, exact[key].to(DTYPES[name])), key
            touched = (key.startswith("resampler.") and "pos_embed" not in key) or "q_proj" in key or "v_proj" in key
            if not touched or "vpm." in key:
                assert torch.equal(tensor, before[key]), key
        config = MiniCPMVConfig.from_pretrained(tmp_path / f"merged-{name}")
        assert config.dtype == DTYPES[name]
        assert MiniCPMVConfig.from_pretrained(tmp_path / f"exact-{name}").dtype == torch.float32


@pytest.mark.parametrize("trained", ["llm.model.embed_tokens", "LoRA", None])
def test_tied_embeddings(bases, tmp_path, trained):
    """They stay tied, unless LoRA on one of them makes two of them."""
    base = tmp_path / "base"
    shutil.copytree(bases["minicpm", "float32"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = MiniCPMVConfig.from_pretrained(base)
    config.tie_word_embeddings = True
    model = MiniCPMV(config)
    model.load_state_dict(load_file(bases["minicpm", "float32"] / "model.safetensors"))
    model.save_pretrained(base)
    assert "llm.lm_head.weight" not in tensors_of(base)
    targets = {"target_modules": r"llm\.model\.embed_tokens"} if trained == "LoRA" else {}
    adapter = write_adapter(base, tmp_path / "lora", None if trained == "LoRA" else trained, **targets)
    merge(adapter, tmp_path / "merged")
    wanted = logits(adapter, "minicpm")
    torch.testing.assert_close(logits(tmp_path / "merged", "minicpm"), wanted, atol=1e-5, rtol=1e-5)
    assert ("llm.lm_head.weight" in tensors_of(tmp_path / "merged")) == (trained == "LoRA")


@pytest.mark.parametrize("form", ["bin", "old bin", "shards"])
def test_bases_in_other_files(bases, tmp_path, form):
    base = tmp_path / "base"
    shutil.copytree(bases["llama3", "float32"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(bases["llama3", "float32"] / "model.safetensors")
    if form == "shards":
        AutoModel.from_pretrained(bases["llama3", "float32"]).save_pretrained(base, max_shard_size="300KB")
    else:
        torch.save(weights, base / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    adapter = write_adapter(base, tmp_path / "lora")
    merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged", "llama3"), logits(adapter, "llama3"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_the_folder_is_complete(run, bases, tmp_path, llm_type):
    """With the slices of the training; nothing else is left beside it."""
    adapter = write_adapter(bases[llm_type, "float32"], tmp_path / "lora")
    result = run("--adapter", adapter, "--output", tmp_path / "out" / "merged", "--max_shard_size", "300KB")
    assert result.returncode == 0, result.stderr[-2000:]
    merged = tmp_path / "out" / "merged"
    assert f"chat.py --model {merged}" in result.stdout and "LoRA matrices: changed" in result.stdout
    assert "merging" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    names = {path.name for path in merged.iterdir()}
    assert {"generation_config.json", "tokenizer_config.json", CARD, "model.safetensors.index.json"} <= names
    assert not {name for name in names if name.startswith(".") or name in ("complete.json", "adapter_config.json")}
    config = json.loads((merged / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert MiniCPMVConfig.from_pretrained(merged).slicing["max_slice_nums"] == 4


def test_results_load_without_the_toolkit(bases, adapters, tmp_path):
    """Merged and modernized checkpoints, in a process that never saw it."""
    data, expected = {"input_ids": torch.arange(20)[None]}, {}
    for llm_type in LLM_TYPES:
        merge(adapters[llm_type], tmp_path / f"merged-{llm_type}")
        modernize(bases[llm_type, "float32"], tmp_path / f"modern-{llm_type}")
        for kind, wanted in (("merged", adapters[llm_type]), ("modern", bases[llm_type, "float32"])):
            model, _ = load_finetuned(wanted, device_map=None)
            expected[f"{kind}-{llm_type}"] = model(data=data).logits.detach()
    save_file(expected, tmp_path / "expected.safetensors")
    program = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
for folder, expected in load_file("expected.safetensors").items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found = model(data={"input_ids": torch.arange(20)[None]}).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model.chat(None, [{"role": "user", "content": "hello"}], tokenizer, max_new_tokens=3)
assert "finetune" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_lost_delta_is_said(run, bases, tmp_path):
    adapter = write_adapter(bases["llama3", "bfloat16"], tmp_path / "lora", None, scale=1e-5)
    text = run("--adapter", adapter, "--output", tmp_path / "merged").stdout
    assert "warning: most of what the LoRA matrices changed is lost" in text and "--dtype float32" in text
    rounding = merge(adapter, tmp_path / "exact", dtype=torch.float32)
    assert rounding["LoRA matrices"].loss < 1e-2


def test_rounding_is_counted():
    seen = merge_lora.Rounding()
    before = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.bfloat16)
    wanted = torch.tensor([1.0, 1.001, 1.5, 2.0])
    seen.see(before, wanted, wanted.to(torch.bfloat16))
    assert (seen.changed, seen.vanished) == (2, 1)
    assert seen.loss == pytest.approx(0.001 / (0.5**2 + 0.001**2) ** 0.5, rel=1e-3)


def test_what_does_not_fit_float16_is_refused(bases, tmp_path):
    adapter = write_adapter(bases["llama3", "float16"], tmp_path / "lora", scale=300)
    with pytest.raises(UserError, match=r"more than float16 can hold; merge with --dtype bfloat16"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.incomplete").exists()


def no_tensor_is_read(monkeypatch) -> None:
    monkeypatch.setattr(merge_lora.torch, "load", lambda *a, **k: pytest.fail("a tensor was read"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {llm_type: write_adapter(bases[llm_type, "float32"], folder / llm_type) for llm_type in LLM_TYPES}


@pytest.fixture
def adapter(adapters, tmp_path) -> Path:
    return shutil.copytree(adapters["llama3"], tmp_path / "lora")


def test_wrong_bases_are_refused(bases, adapter, tmp_path):
    narrow = MiniCPMVConfig.from_pretrained(bases["llama3", "float32"])
    narrow.hidden_size, narrow.num_attention_heads = 64, 2
    MiniCPMV(narrow).save_pretrained(tmp_path / "narrow")
    few = MiniCPMVConfig.from_pretrained(bases["llama3", "float32"])
    few.num_hidden_layers = 1
    MiniCPMV(few).save_pretrained(tmp_path / "few")
    other = AutoModel.from_pretrained(bases["llama3", "float32"])
    other.llm.model.layers[1].mlp.down_proj.weight.data += 1e-4
    other.save_pretrained(tmp_path / "other")
    incomplete = shutil.copytree(bases["llama3", "float32"], tmp_path / "incomplete")
    weights = load_file(incomplete / "model.safetensors")
    weights.pop("resampler.query")
    save_file(weights, incomplete / "model.safetensors")
    expected = {
        bases["minicpm", "float32"]: r"is MiniCPM-V 2\.0 .*, but the adapter was trained on MiniCPM-Llama3-V 2\.5",
        tmp_path / "narrow": r"has shape \(\d+, \d+\), on \S+narrow it would have",
        tmp_path / "few": "has no place for|does not have",
        tmp_path / "other": r"is not the base that the adapter was trained on: 1 of 14 matrices",
        incomplete: r"lacks 1 tensors of its config\.json: resampler\.query",
        tmp_path / "nowhere": "there is no such folder",
        adapter: "--base",
        tmp_path: "--base",
    }
    for base, message in expected.items():
        with pytest.raises(UserError) as caught:
            merge(adapter, tmp_path / "merged", base=base)
        assert re.search(message, str(caught.value)), f"{base}: {caught.value}"
        assert "--base" in str(caught.value)
        assert not (tmp_path / "merged").exists()
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"adapter_config\.json names .*moved.*there is no such folder.*--base DIR"):
        merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "merged", base=bases["llama3", "float32"])


def test_a_rounded_copy_of_the_base_is_the_base(bases, adapter, tmp_path):
    copy = AutoModel.from_pretrained(bases["llama3", "float32"], dtype=torch.bfloat16)
    copy.save_pretrained(tmp_path / "copy")
    merge(adapter, tmp_path / "merged", base=tmp_path / "copy")


def test_wrong_adapters_are_refused(bases, adapter, tmp_path):
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            merge(folder, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    refused(tmp_path / "none", "there is no such folder")
    refused(bases["llama3", "float32"], "is a complete checkpoint")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"expected adapter_config\.json, found nothing")
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-3")
    refused(tmp_path / "run", "holds checkpoint-3; name one of them")

    def broken(name: str) -> Path:
        return shutil.copytree(adapter, tmp_path / name)

    (broken("no extra") / EXTRA_WEIGHTS_NAME).unlink()
    refused(tmp_path / "no extra", f"{EXTRA_WEIGHTS_NAME} is missing")
    extra = torch.load(adapter / EXTRA_WEIGHTS_NAME)
    torch.save({**extra, "base_model.model.llm.gone": torch.ones(1)}, broken("unknown") / EXTRA_WEIGHTS_NAME)
    refused(tmp_path / "unknown", r"holds base_model\.model\.llm\.gone, which")
    torch.save(dict.fromkeys(extra, torch.ones(3)), broken("shapes") / EXTRA_WEIGHTS_NAME)
    refused(tmp_path / "shapes", r"has shape \(3,\)")
    change_json(broken("targets") / "adapter_config.json", target_modules=["nowhere"])
    refused(tmp_path / "targets", "nowhere")
    change_json(broken("rank") / "adapter_config.json", r=8)
    refused(tmp_path / "rank", r"it would have \(8, ")
    change_json(broken("bias") / "adapter_config.json", lora_bias=True)
    refused(tmp_path / "bias", "has LoRA biases .* for layers without one")
    change_json(broken("pissa") / "adapter_config.json", init_lora_weights="pissa")
    refused(tmp_path / "pissa", "cannot be merged here: init_lora_weights pissa")
    change_json(broken("tokens") / "adapter_config.json", trainable_token_indices=[1])
    refused(tmp_path / "tokens", "cannot be merged here: trainable_token_indices")
    change_json(broken("kind") / "adapter_config.json", peft_type="IA3")
    refused(tmp_path / "kind", "expected LORA")
    (broken("text") / "adapter_config.json").write_text("{")
    refused(tmp_path / "text", "cannot be read")
    for name in ("adapter_model.safetensors", EXTRA_WEIGHTS_NAME):
        whole = (broken(f"cut {name}") / name).read_bytes()
        (tmp_path / f"cut {name}" / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / f"cut {name}", "cannot be read|is damaged")
    matrices = load_file(adapter / "adapter_model.safetensors")
    matrices.pop(sorted(matrices)[0])
    save_file(matrices, broken("lacks") / "adapter_model.safetensors")
    refused(tmp_path / "lacks", "lacks 1 of the tensors")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["from anywhere", "inside finetune/"])
def test_all_that_is_wrong_is_said_at_once(adapter, tmp_path, how):
    (adapter / EXTRA_WEIGHTS_NAME).unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    folder = ROOT / "finetune"
    script, cwd = (folder / "merge_lora.py", tmp_path) if how == "from anywhere" else ("merge_lora.py", folder)
    flags = ("--adapter", adapter, "--output", tmp_path / "full", "--base", "./gone", "--max_shard_size", "five")
    result = subprocess.run(
        list(map(str, (sys.executable, script, *flags))), cwd=cwd, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 1 and result.stdout == ""
    for words in (EXTRA_WEIGHTS_NAME, "is not empty", "--base ./gone", "--max_shard_size five"):
        assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_full_disk_and_what_is_left_of_a_killed_call(adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"needs 0\.07 GB, but 0\.00 GB are free"):
            merge(adapter, tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(
            merge_lora, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("No space left on device"))
        )
        with pytest.raises(UserError, match="cannot be written: No space left"):
            merge(adapter, tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(merge_lora, "save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]
    aside = tmp_path / "merged.incomplete"
    aside.mkdir()
    (aside / "mine.txt").touch()
    with pytest.raises(UserError, match="is not ours; move it away"):
        merge(adapter, tmp_path / "merged")
    (aside / merge_lora.MARK).touch()
    merge(adapter, tmp_path / "merged")
    assert not aside.exists() and not (tmp_path / "merged" / "mine.txt").exists()


def test_files_are_read_back(adapter, tmp_path, monkeypatch):
    def damaged(tensors, path, metadata):
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] + 1}, path, metadata)

    monkeypatch.setattr(merge_lora, "save_file", damaged)
    with pytest.raises(UserError, match="was not written well"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_no_code_in_weights(bases, adapter, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    base = shutil.copytree(
        bases["llama3", "float32"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.save({"llm.lm_head.weight": Evil()}, base / "pytorch_model.bin")
    with pytest.raises(UserError, match="would run code"):
        merge(adapter, tmp_path / "merged", base=base)
    with pytest.raises(UserError, match="would run code"):
        modernize(base, tmp_path / "merged")
    torch.save({"x": Evil()}, adapter / EXTRA_WEIGHTS_NAME)
    with pytest.raises(UserError, match="would run code"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("llm_type", LLM_TYPES)
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_modernize(tmp_path, llm_type, form, monkeypatch):
    """As on the hub: config.json and tokenizer of old, with code that nobody runs."""
    source = tmp_path / "original"
    shutil.copytree(GOLDEN[llm_type], source, ignore=shutil.ignore_patterns("batch*", "expected*", "model*"))
    for name in ("modeling_minicpmv.py", "configuration_minicpm.py", "tokenization_minicpmv.py", "resampler.py"):
        (source / name).write_text("raise SystemExit('old code ran')")
    weights = load_file(GOLDEN[llm_type] / "model.safetensors")
    if form == "bin":
        torch.save(weights, source / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(weights, source / "model.safetensors", {"format": "pt"})
    else:
        half = {name: weights[name] for name in sorted(weights)[: len(weights) // 2]}
        parts = [half, {name: tensor for name, tensor in weights.items() if name not in half}]
        files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            save_file(part, source / file, {"format": "pt"})
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    if form == "shards":
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("another disk")))
    size, links = modernize(source, tmp_path / "modern")
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    assert links == {"hard link": 0 if form == "shards" else 1, "symbolic link": 2 if form == "shards" else 0}
    for file in weight_files(source):
        assert file.samefile(tmp_path / "modern" / file.name)
    assert size == sum(file.stat().st_size for file in weight_files(source))
    loaded = AutoModel.from_pretrained(tmp_path / "modern").state_dict()
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in loaded.items())
    assert not any("old code ran" in file.read_text() for file in (tmp_path / "modern").glob("*.py"))


def test_modernize_as_a_command(run, bases, adapter, tmp_path):
    result = run("--modernize", bases["llama3", "float32"], "--output", tmp_path / "modern")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "weights as 1 hard link," in result.stdout and "chat.py --model" in result.stdout
    for flags, message in (
        (("--modernize", adapter), "is an adapter"),
        (("--modernize", "./gone"), "there is no such folder"),
        (("--modernize", bases["llama3", "float32"], "--dtype", "float32"), "--dtype: only with --adapter"),
    ):
        result = run(*flags, "--output", tmp_path / "other")
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "other").exists()


def test_a_hub_name_is_taken_from_the_cache(bases, adapter, tmp_path, monkeypatch):
    """The only time that the network would be asked; here it is not there."""
    asked = []

    def snapshot(name, allow_patterns, **_):
        asked.append((name, tuple(allow_patterns)))
        return str(bases["llama3", "float32"])

    monkeypatch.setattr("finetune.loading.snapshot_download", snapshot)
    config = MiniCPMVConfig.from_pretrained(bases["llama3", "float32"])
    monkeypatch.setattr(
        merge_lora, "load_config", lambda path, *a: config if path == "openbmb/x" else pytest.fail(path)
    )
    change_json(adapter / "adapter_config.json", base_model_name_or_path="openbmb/x")
    merge(adapter, tmp_path / "merged")
    modernize("openbmb/x", tmp_path / "modern")
    assert {name for name, _ in asked} == {"openbmb/x"}
    assert all(
        not pattern.startswith("*.py") and "modeling" not in pattern for _, patterns in asked for pattern in patterns
    )


def test_cards(adapter, tmp_path):
    settings = {
        "resolved": {
            "llm_type": "llama3",
            "train_samples": 1234,
            "eval_samples": 5,
            "processes": 2,
            "dtype": "bfloat16",
        },
        "arguments": {
            "model": {"model_name_or_path": "openbmb/MiniCPM-Llama3-V-2_5"},
            "training": {
                "use_lora": True,
                "learning_rate": 1e-4,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
            },
            "lora": {"lora_r": 64, "lora_target_modules": r"a|b"},
        },
        "versions": {"torch": "2.14.0", "deepspeed": None},
    }
    history = [
        {"loss": 2.0, "step": 1},
        {"eval_loss": 1.5, "eval_runtime": 3.0, "step": 1},
        {"loss": 1.0, "step": 2},
        {"eval_loss": 0.5, "eval_exact_match": 0.75, "step": 2},
        {"train_loss": 1.5, "train_runtime": 9.0, "step": 2},
    ]
    assert write_card(adapter, "dogs", history=history, settings=settings)
    card = ModelCard.load(adapter / CARD)
    assert card.data.base_model == "openbmb/MiniCPM-Llama3-V-2_5" and card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license is None
    for words in (
        *(
            "# dogs",
            "1,234 samples",
            "| samples per step | 16 |",
            "| LoRA r | 64 |",
            r"`a\|b`",
            "| learning rate | 0.0001 |",
        ),
        *(
            "| evaluation loss | 0.5 | 2 |",
            "| evaluation exact match | 0.75 | 2 |",
            "| torch | 2.14.0 |",
            "mean since the run was last started",
        ),
    ):
        assert words in card.text
    assert "runtime" not in card.text and "deepspeed" not in card.text
    assert not is_edited(adapter / CARD)
    assert write_card(adapter, "cats", history=history, settings=settings)  # our own is written anew
    text = (
        (adapter / CARD)
        .read_text()
        .replace("# cats", "---\n\n# My dogs\n\nThey bark.")
        .replace("---\n", "---\nlicense: mit\n", 1)
    )
    (adapter / CARD).write_text(text)
    assert is_edited(adapter / CARD)
    assert not write_card(adapter, "cats", history=history, settings=settings)
    assert (adapter / CARD).read_text() == text
    (adapter / SETTINGS_NAME).write_text(json.dumps({**settings, "base_weights": {}}))
    merge(adapter, tmp_path / "merged")
    merged = ModelCard.load(tmp_path / "merged" / CARD)
    assert merged.data.license == "mit" and merged.data.library_name == "transformers"
    assert merged.data.base_model_relation == "finetune" and "custom_code" in merged.data.tags
    assert "# merged" in merged.text and "They bark." in merged.text and "1,234 samples" in merged.text


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_a_processor_travels_with_its_code_or_not_at_all(tmp_path, llm_type, bases, adapters):
    """preprocessor_config.json names code; without it, other programs would stop at what they do not find."""
    base = shutil.copytree(bases[llm_type, "float32"], tmp_path / "base")
    shutil.copyfile(GOLDEN["llama3"] / "preprocessor_config.json", base / "preprocessor_config.json")
    merge(adapters[llm_type], tmp_path / "without", base=base)
    assert not (tmp_path / "without" / "preprocessor_config.json").exists()
    (base / "processing_minicpmv.py").write_text("from .image_processing_minicpmv import MiniCPMVImageProcessor\n")
    (base / "image_processing_minicpmv.py").write_text("class MiniCPMVImageProcessor: ...\n")
    for folder, slices in ((tmp_path / "with", 4), (tmp_path / "modern", 9)):
        _ = merge(adapters[llm_type], folder, base=base) if slices == 4 else modernize(base, folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        assert settings["max_slice_nums"] == slices and settings["image_feature_size"] == 96
        assert (folder / "image_processing_minicpmv.py").read_text().startswith("class")
        assert "raise" not in (folder / "modeling_minicpmv.py").read_text()[:200]
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "processing_minicpmv.py").write_text("ours")
    copy_processor(base, tmp_path / "target", 9)
    assert (tmp_path / "target" / "processing_minicpmv.py").read_text() == "ours"


# What vLLM 0.33.0 (model_executor/models/minicpmv.py, minicpm.py, llama.py, idefics2_vision_model.py) and llama.cpp
# (as in llama-cpp-python 0.3.36: conversion/minicpm.py, tools/mtmd/legacy-models) read.
READ_FROM_CONFIG = {
    "llama3": "architectures model_type version hidden_size query_num image_size vision_config drop_vision_last_layer "
    "intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps hidden_act vocab_size "
    "max_position_embeddings rope_theta tie_word_embeddings torch_dtype attention_bias",
    "minicpm": "architectures model_type hidden_size query_num image_size drop_vision_last_layer scale_emb "
    "scale_depth dim_model_base intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "rms_norm_eps hidden_act vocab_size max_position_embeddings rope_theta tie_word_embeddings torch_dtype",
}
READ_FROM_VISION_CONFIG = (
    "hidden_size image_size intermediate_size model_type num_attention_heads num_hidden_layers patch_size"
)
READ_AS_ATTRIBUTES = "attention_dropout hidden_act layer_norm_eps num_channels"


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_config_is_what_other_programs_read(tmp_path, llm_type):
    """Of the real size: the hub's keys and values stay, and no key of the other model comes, not even as null."""
    path = TESTS / "hub" / f"{HUB[llm_type]}_config.json"
    hub, config = json.loads(path.read_text()), MiniCPMVConfig.from_pretrained(path)
    with torch.device("meta"):
        model = MiniCPMV(config)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name, value in hub.items():
        if name == "vision_config":
            assert value.items() <= written[name].items()
        elif name not in ("_name_or_path", "transformers_version"):
            assert written[name] == value, name
    assert set(written) - set(hub) == {"dtype"}
    assert config.get_text_config() is config  # vLLM reads the language model's fields there
    assert set(READ_FROM_CONFIG[llm_type].split()) <= written.keys()
    assert ("version" in written) == (llm_type == "llama3")  # vLLM takes one without for 2.0 by its sizes
    if llm_type == "llama3":
        assert set(READ_FROM_VISION_CONFIG.split()) <= written["vision_config"].keys()
        assert all(hasattr(config.vision_config, name) for name in READ_AS_ATTRIBUTES.split())
        assert model.llm.config.architectures is None and type(model.llm).__name__ == "LlamaForCausalLM"
    else:
        assert (config.hidden_size, config.query_num) == (2304, 64)
        # llama.cpp converts `model.llm`, saved on its own, by the name of its class and by these
        assert type(model.llm).__name__ == "MiniCPMForCausalLM"
        assert [getattr(model.llm.config, n) for n in ("scale_emb", "scale_depth", "dim_model_base")] == [12, 1.4, 256]


def test_peft_loads_what_merging_reads(adapters, bases):
    """The adapters of these tests are those that PEFT itself takes, extra tensors included."""
    for llm_type in LLM_TYPES:
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(bases[llm_type, "float32"]), adapters[llm_type])
        extra = torch.load(adapters[llm_type] / EXTRA_WEIGHTS_NAME)
        assert extra and model.load_state_dict(extra, strict=False).unexpected_keys == []


@pytest.fixture
def dataset() -> SupervisedDataset:
    config = MiniCPMVConfig.from_pretrained(GOLDEN["llama3"])
    config.set_max_slice_nums(1)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN["llama3"])
    samples = list(load_samples(GOLDEN_DATA / "samples.json"))[:2]
    return SupervisedDataset.for_checkpoint(config, tokenizer, samples, 2048, GOLDEN_DATA)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_writes_cards(bases, dataset, tmp_path, method):
    """Beside the result and every checkpoint, with the figures logged until then; what a user wrote stays."""
    base = shutil.copytree(bases["llama3", "float32"], tmp_path / "base")
    shutil.copyfile(GOLDEN["llama3"] / "preprocessor_config.json", base / "preprocessor_config.json")
    for name in ("processing_minicpmv.py", "image_processing_minicpmv.py"):
        (base / name).touch()
    model = AutoModel.from_pretrained(base)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM"))
    output = tmp_path / "pets"
    args = {"per_device_train_batch_size": 1, "max_steps": 2, "save_steps": 1, "eval_steps": 1, "logging_steps": 1}
    args |= {"eval_strategy": "steps", "use_cpu": True, "report_to": "none", "dataloader_num_workers": 0}
    trainer = CPMTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **args),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=data_collator,
        settings={"resolved": {"llm_type": "llama3", "train_samples": 2}},
    )
    trainer.train()
    trainer.save_model()
    result, first = (ModelCard.load(folder / CARD) for folder in (output, output / "checkpoint-1"))
    assert result.data.library_name == ("peft" if method == "lora" else "transformers")
    assert result.data.base_model == "openbmb/MiniCPM-Llama3-V-2_5"
    for words in (
        "# pets",
        "2 samples",
        "| evaluation loss |",
        "| training loss, mean since the run was last started |",
    ):
        assert words in result.text, words
    assert "# pets" in first.text and "mean since the run was last started" not in first.text
    evaluations = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert f"| evaluation loss | {evaluations[1]:.4g} | 1 |" in first.text
    assert f"| evaluation loss | {evaluations[2]:.4g} | 2 |" in result.text
    trainer.save_model()  # our own card is written anew
    (output / CARD).write_text("mine")
    trainer.save_model()
    trainer.save_model(_internal_call=True)  # as push_to_hub does
    trainer.create_model_card(model_name="x")
    assert (output / CARD).read_text() == "mine"
    assert (output / "preprocessor_config.json").exists() == (method == "full")
    assert fault(output / "checkpoint-2") is None


def test_the_card_is_of_the_step_that_was_loaded(adapter, tmp_path):
    """Of a run that ended with its best step: the result's, and what is merged from it; a checkpoint's is its own."""
    history = [{"eval_loss": 1.0, "step": 1}, {"eval_loss": 0.5, "step": 2}, {"eval_loss": 0.75, "step": 3}]
    (adapter / "trainer_state.json").write_text(json.dumps({"log_history": history, "best_global_step": 2}))

    def shown(folder: Path, best: bool) -> str:
        change_json(folder / SETTINGS_NAME, arguments={"training": {"load_best_model_at_end": best}})
        merge(folder, tmp_path / f"merged {folder.name} {best}")
        return (tmp_path / f"merged {folder.name} {best}" / CARD).read_text()

    assert "| evaluation loss | 0.5 | 2 |" in shown(adapter, True)
    assert "| evaluation loss | 0.75 | 3 |" in shown(adapter, False)
    checkpoint = shutil.copytree(adapter, tmp_path / "checkpoint-3")
    assert "| evaluation loss | 0.75 | 3 |" in shown(checkpoint, True)
    assert write_card(adapter, "x", history=history, settings={}, loaded_step=2)
    assert "| evaluation loss | 0.5 | 2 |" in (adapter / CARD).read_text()


def test_a_run_that_ends_with_its_best_step_shows_it(bases, dataset, tmp_path):
    """Checkpoints show their own figures."""
    model = get_peft_model(
        AutoModel.from_pretrained(bases["llama3", "float32"]),
        LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM"),
    )
    args = {"per_device_train_batch_size": 1, "max_steps": 3, "save_steps": 1, "eval_steps": 1, "logging_steps": 1}
    args |= {"eval_strategy": "steps", "use_cpu": True, "report_to": "none", "dataloader_num_workers": 0}
    args |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-2}
    args |= {"greater_is_better": True}  # so that the best step is the first
    trainer = CPMTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **args),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=data_collator,
        settings={"resolved": {"llm_type": "llama3"}},
    )
    trainer.train()
    trainer.save_model()
    best = trainer.state.best_global_step
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert best < 3 and losses[best] != losses[3]
    assert f"| evaluation loss | {losses[best]:.4g} | {best} |" in (tmp_path / CARD).read_text()
    assert f"| evaluation loss | {losses[3]:.4g} | 3 |" in (tmp_path / "checkpoint-3" / CARD).read_text()


def test_cards_leave_out_seconds(adapter):
    history = [{"eval_generation_seconds": 3.0, "eval_loss": 1.0, "step": 1}]
    assert write_card(adapter, "x", history=history, settings={})
    text = (adapter / CARD).read_text()
    assert "| evaluation loss | 1 | 1 |" in text and "seconds" not in text


def test_a_mounted_folder_cannot_be_the_output(adapter, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    for output in (disk, tmp_path / "link"):
        with pytest.raises(UserError, match=rf"--output {output}: is where a disk is mounted.*folder within it"):
            merge(adapter, output)
    asked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage._replace(free=0))
    with pytest.raises(UserError, match="GB are free"):
        merge(adapter, tmp_path / "link" / "merged")
    assert asked == [disk]


def test_dtype_auto_is_the_default(run, bases, tmp_path):
    adapter = write_adapter(bases["llama3", "bfloat16"], tmp_path / "lora")
    result = run("--adapter", adapter, "--output", tmp_path / "merged", "--dtype", "auto")
    assert result.returncode == 0, result.stderr[-2000:]
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "merged").values()} == {torch.bfloat16}


def test_an_adapter_without_a_tokenizer_is_merged(adapter, tmp_path):
    for path in adapter.glob("token*"):
        path.unlink()
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()


def test_merged_checkpoints_keep_the_settings_of_the_training(adapter, tmp_path):
    settings = json.loads((adapter / SETTINGS_NAME).read_text())
    change_json(adapter / SETTINGS_NAME, resolved={**settings["resolved"], "dtype": "bfloat16"})
    for folder, dtype, expected in (("merged", None, "bfloat16"), ("wide", torch.float32, "float32")):
        merge(adapter, tmp_path / folder, dtype=dtype)
        record = json.loads((tmp_path / folder / SETTINGS_NAME).read_text())
        assert record["merged_from"] == str(adapter) and record["base_weights"] == settings["base_weights"]
        found = find_model(str(tmp_path / folder))
        assert (found.kind, found.trained_in) == ("full checkpoint", expected)
    (adapter / SETTINGS_NAME).unlink()
    merge(adapter, tmp_path / "unknown")
    assert find_model(str(tmp_path / "unknown")).kind == "full checkpoint"
    assert write_card(tmp_path / "unknown", "x") and "MiniCPM-Llama3" in (tmp_path / "unknown" / CARD).read_text()


def test_what_settings_do_not_tell_of_the_base_is_said(adapter, tmp_path, caplog):
    change_json(adapter / SETTINGS_NAME, base_weights={})
    merge(adapter, tmp_path / "merged")
    assert f"{adapter / SETTINGS_NAME} records no values of its base" in caplog.text
    caplog.clear()
    (adapter / SETTINGS_NAME).unlink()
    merge(adapter, tmp_path / "again")
    assert f"{adapter / SETTINGS_NAME} is missing" in caplog.text
    (adapter / SETTINGS_NAME).write_text("[]")
    with pytest.raises(UserError, match=f"{adapter / SETTINGS_NAME}: expected a JSON object, found list"):
        merge(adapter, tmp_path / "never")


@pytest.mark.slow
def test_from_training_to_a_merged_checkpoint(run, tiny, data_file, tmp_path):
    """As a user does it; the settings of the run tell the base from another of the same shape."""
    other = write_checkpoint(MODELS[0], tmp_path / "other", seed=1)
    flags = ("--max_steps", 2, "--save_steps", 1, "--max_slice_nums", 3, "--learning_rate", 1e-2)
    launch("finetune_lora.sh", *flags, MODEL=tiny["llama3"], DATA=data_file, OUTPUT_DIR=tmp_path / "lora")
    for adapter in (tmp_path / "lora", tmp_path / "lora" / "checkpoint-1"):
        merged = tmp_path / f"merged-{adapter.name}"
        result = run("--adapter", adapter, "--output", merged)
        assert result.returncode == 0, result.stderr[-3000:]
        data = {"input_ids": torch.arange(20)[None]}
        (first, _), (second, _) = (load_finetuned(folder, device_map=None) for folder in (adapter, merged))
        torch.testing.assert_close(second(data=data).logits, first(data=data).logits, atol=1e-5, rtol=1e-5)
        assert second.config.slicing["max_slice_nums"] == 3
    assert "24 samples" in (tmp_path / "merged-lora" / CARD).read_text()
    result = run("--adapter", tmp_path / "lora", "--output", tmp_path / "wrong", "--base", other)
    assert result.returncode == 1 and "is not the base that the adapter was trained on" in result.stderr


@pytest.mark.slow
def test_memory_stays_far_below_the_model(tmp_path):
    """A part of the benchmark: 250 MB of weights in shards of 6 MB. Some 50 MB are the heap's, whatever the model."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import merge_memory

    figures = merge_memory.run(0.25, "2.5", torch.float32, "6MB", tmp_path)
    assert figures["model"] > 50e6
    assert figures["own"] < 0.6 * figures["model"]


@pytest.mark.parametrize("which", ["weights of the base", "settings of the base", "the output"])
def test_what_cannot_be_read_is_not_called_unwritable(bases, adapter, tmp_path, monkeypatch, which):
    """And the other way round; both while files are being written."""
    base = shutil.copytree(bases["llama3", "float32"], tmp_path / "base")
    lost = {"weights of the base": base / "model.safetensors", "settings of the base": base / "generation_config.json"}
    save = merge_lora.save_file

    def saved(*arguments, **settings):
        if which == "the output":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(*arguments, **settings)
        if which == "weights of the base":
            lost[which].unlink(missing_ok=True)  # between two files, as a disk of the network goes away

    def copied(source, target, copy=shutil.copyfile, **settings):
        if which == "settings of the base" and Path(source) == lost[which]:
            raise OSError(errno.EIO, "Input/output error", str(source))
        return copy(source, target, **settings)

    monkeypatch.setattr(merge_lora, "save_file", saved)
    monkeypatch.setattr(merge_lora.shutil, "copyfile", copied)
    with pytest.raises(UserError) as caught:
        merge(adapter, tmp_path / "merged", base=base, max_shard_size="200KB")
    told = str(caught.value)
    if which == "the output":
        assert told.startswith(f"--output {tmp_path / 'merged'}: cannot be written: ") and "No space left" in told
    else:
        assert told.startswith(f"{lost[which]}: cannot be read: ") and "--output" not in told
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.incomplete").exists()
