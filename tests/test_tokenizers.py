"""Tokenizers of early copies of both checkpoints, whose class was one of transformers' or lay in their code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOLDEN, GOLDEN_DATA, LLM_TYPES, write_adapter

from finetune import finetune
from finetune.data_files import load_samples
from finetune.dataset import SupervisedDataset
from finetune.loading import load_finetuned, load_tokenizer
from finetune.minicpmv import MiniCPMVConfig, MiniCPMVTokenizer, MiniCPMVTokenizerFast

OURS = {"llama3": MiniCPMVTokenizerFast, "minicpm": MiniCPMVTokenizer}
CODE = {"auto_map": {"AutoTokenizer": ["modeling_minicpmv.LlamaTokenizerWrapper", "modeling_minicpmv.Wrapper"]}}
EARLY = [
    ("llama3", "PreTrainedTokenizerFast"),
    ("llama3", "PreTrainedTokenizerFastWrapper"),
    ("llama3", "TokenizersBackend"),
    ("llama3", "LlamaTokenizerFast"),
    ("llama3", None),
    ("minicpm", "LlamaTokenizer"),
    ("minicpm", "LlamaTokenizerFast"),
    ("minicpm", "LlamaTokenizerWrapper"),
    ("minicpm", "PreTrainedTokenizerFast"),
    ("minicpm", None),
]


@pytest.fixture
def early(tmp_path) -> Callable[..., Path]:
    """A copy of a checkpoint as it once was: other class, code that would say so if it ran, no unknown token."""

    def make(source: Path, named: str | None, *, auto_map: bool = True, unk: bool = False) -> Path:
        folder = shutil.copytree(source, tmp_path / "early", ignore=shutil.ignore_patterns("*.py"))
        (folder / "modeling_minicpmv.py").write_text(f"open({str(tmp_path / 'code was run')!r}, 'w')\n")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if not (folder / name).is_file():
                continue
            content = json.loads((folder / name).read_text())
            content.pop("tokenizer_class", None)
            content.pop("auto_map", None)
            if not unk:
                content.pop("unk_token", None)
            if named is not None and name == "tokenizer_config.json":
                content["tokenizer_class"] = named
            if auto_map and name == "tokenizer_config.json":
                content |= CODE
            (folder / name).write_text(json.dumps(content))
        return folder

    yield make
    assert not (tmp_path / "code was run").exists()


@pytest.mark.parametrize("auto_map", [True, False], ids=["code", "no code"])
@pytest.mark.parametrize(("llm_type", "named"), EARLY)
def test_ids_are_the_golden_ones(early, tmp_path, llm_type, named, auto_map):
    golden = load_tokenizer(GOLDEN[llm_type])
    folder = early(GOLDEN[llm_type], named, auto_map=auto_map)
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer) is OURS[llm_type]
    for name in ("bos_id", "eos_id", "unk_id", "im_start_id", "im_end_id", "slice_start_id", "slice_end_id"):
        assert getattr(tokenizer, name) == getattr(golden, name) is not None, name
    config = MiniCPMVConfig.from_pretrained(GOLDEN[llm_type])
    samples = load_samples(GOLDEN_DATA / "samples.json")
    old, new = (SupervisedDataset.for_checkpoint(config, t, samples, None) for t in (golden, tokenizer))
    for index in range(len(samples)):
        assert old[index]["input_ids"].tolist() == new[index]["input_ids"].tolist()
        assert old[index]["labels"].tolist() == new[index]["labels"].tolist()
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == OURS[llm_type].__name__
    assert "modeling_minicpmv" not in json.dumps(saved)
    assert type(load_tokenizer(tmp_path / "saved")) is OURS[llm_type]


@pytest.mark.parametrize(("llm_type", "named"), [EARLY[1], EARLY[7]])
def test_what_training_saves_has_our_class(early, tiny, data_file, tmp_path, llm_type, named):
    model = early(tiny[llm_type], named)
    words = ("--model_name_or_path", model, "--data_path", data_file, "--output_dir", tmp_path / "out")
    short = ("--max_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0)
    finetune.train([*map(str, (*words, *short, "--use_lora", "true"))])
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == OURS[llm_type].__name__
    model, tokenizer = load_finetuned(tmp_path / "out")
    assert isinstance(model.chat(None, [{"role": "user", "content": "What?"}], tokenizer, max_new_tokens=2), str)


def test_the_files_decide_where_nothing_else_does(early, tiny, tmp_path):
    """In an adapter's folder, which has no config.json."""
    for llm_type in LLM_TYPES:
        lora = write_adapter(tiny[llm_type], tmp_path / llm_type)
        folder = early(lora, None)
        assert type(load_tokenizer(folder)) is OURS[llm_type]
        shutil.rmtree(folder)


@pytest.mark.parametrize("named", ["BertTokenizer", "Qwen2TokenizerFast", "EvilTokenizer"])
@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_other_tokenizers_stay_refused(early, llm_type, named):
    with pytest.raises(ValueError, match="expected tokenizer_class MiniCPMVTokenizer or MiniCPMVTokenizerFast"):
        load_tokenizer(early(GOLDEN[llm_type], named))


def test_a_foreign_vocabulary_under_a_known_class(early):
    folder = early(GOLDEN["llama3"], "PreTrainedTokenizerFast")
    text = (folder / "tokenizer.json").read_text().replace("<|eot_id|>", "<|im_end|>")
    (folder / "tokenizer.json").write_text(text)
    config = (folder / "tokenizer_config.json").read_text().replace("<|eot_id|>", "<|im_end|>")
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"which lacks <\|eot_id\|>; expected tokenizer_class"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_is_told_in_one_line(early):
    for llm_type, name in (("llama3", "tokenizer.json"), ("minicpm", "tokenizer.model")):
        folder = early(GOLDEN[llm_type], EARLY[0 if llm_type == "llama3" else 5][1])
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
        with pytest.raises(ValueError, match="the tokenizer cannot be loaded") as error:
            load_tokenizer(folder)
        assert len(str(error.value).splitlines()) == 1
        shutil.rmtree(folder)
