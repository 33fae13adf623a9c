"""Several adapters of one base: each alone, switched to and fro, combined; and training that goes on from one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LLM_TYPES, write_adapter
from PIL import Image
from transformers import TrainingArguments

from finetune import merge_lora
from finetune.adapters import Adapters, load_adapters
from finetune.data_files import load_samples
from finetune.dataset import SupervisedDataset, data_collator
from finetune.finetune import load_config, load_model, parse_arguments, train
from finetune.loading import EXTRA_WEIGHTS_NAME, load_finetuned
from finetune.trainer import CPMTrainer

# Other ranks, other targets, other tensors trained in full, another number of slices.
FLAGS = {
    "food": ("--lora_r", 4, "--lora_alpha", 8),
    "signs": (
        *("--lora_r", 2, "--lora_target_modules", "q_proj,up_proj", "--tune_vision", "false"),
        *("--tune_embed_tokens", "false", "--max_slice_nums", 4, "--lora_dropout", 0),
    ),
    # LoRA in the vision tower too: its weights, which `food` trains in full, get longer names
    "everywhere": ("--lora_r", 2, "--lora_target_modules", r".*(q_proj|qkv|fc1)", "--tune_vision", "false"),
    "saved": ("--lora_r", 2, "--lora_modules_to_save", "resampler", "--tune_vision", "false"),
}


@pytest.fixture(scope="module", params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(llm_type, tiny, tmp_path_factory) -> dict[str, Path]:
    """Adapter folders by name, and the base under None."""
    place = tmp_path_factory.mktemp(f"adapters-{llm_type}")
    made = {
        name: write_adapter(tiny[llm_type], place / name, *flags, seed=number)
        for number, (name, flags) in enumerate(FLAGS.items())
    }
    return {None: tiny[llm_type], **made}


def some(folders: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: folders[name] for name in names}


def logits(model, tokenizer) -> torch.Tensor:
    """Of the prompt of a question about a picture, with the model's own slicing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    picture = Image.linear_gradient("L").resize((400, 300))
    data = base.chat_inputs(picture, [{"role": "user", "content": "What is on the sign?"}], tokenizer)
    with torch.inference_mode():
        return model(data=data).logits


@pytest.fixture(scope="module")
def alone(folders) -> dict[str | None, torch.Tensor]:
    """Logits of each adapter loaded by itself, and of the base."""
    return {name: logits(*load_finetuned(folder)) for name, folder in folders.items()}


def now(adapters: Adapters) -> torch.Tensor:
    return logits(adapters.model, adapters.tokenizer)


def test_switching_gives_each_adapter_exactly(folders, alone):
    assert alone["food"].shape != alone["signs"].shape  # another number of slices
    adapters = load_adapters(some(folders, *FLAGS))
    assert adapters.active == "food" and adapters.names == list(FLAGS)
    for name in ("food", "signs", "everywhere", "food", None, "saved", "signs", None, "everywhere", "saved", "food"):
        adapters.switch(name)
        assert adapters.active == name
        assert torch.equal(now(adapters), alone[name]), name
    assert not any(parameter.requires_grad for name, parameter in adapters.model.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match="no adapter 'drinks'; there are food, signs"):
        adapters.switch("drinks")
    assert torch.equal(now(adapters), alone["food"])


def test_adapters_of_half_precision(folders):
    adapters = load_adapters(some(folders, "food", "signs"), dtype=torch.bfloat16)
    for name in ("signs", "food"):
        adapters.switch(name)
        assert torch.equal(now(adapters), logits(*load_finetuned(folders[name], dtype=torch.bfloat16))), name


def merged(folders: dict[str, Path], weights: dict[str, float], tokenizer) -> torch.Tensor:
    """Logits of base + sum of weight * (what an adapter makes of the base - base), tensor by tensor."""
    base, _ = load_finetuned(folders[None])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in before.items()}
    for name, weight in weights.items():
        changed = load_finetuned(folders[name])[0].merge_and_unload().state_dict()
        for key, tensor in total.items():
            tensor += weight * (changed[key] - before[key])
    base.load_state_dict(total)
    return logits(base, tokenizer)


@pytest.mark.parametrize(
    "weights", [{"food": 0.5, "signs": 0.5}, {"food": 0.7, "signs": -0.4, "everywhere": 1.2}, {"food": 0.3}]
)
def test_a_combination_is_the_weighted_sum(folders, alone, weights, caplog):
    adapters = load_adapters(some(folders, *FLAGS))
    with caplog.at_level(logging.WARNING):
        adapters.combine(weights, name="both")
    assert ("different --max_slice_nums" in caplog.text) == ("signs" in weights)
    assert adapters.active == "food"
    assert torch.equal(now(adapters), alone["food"])  # until it is switched on
    adapters.switch("both")
    expected = merged(folders, weights, adapters.tokenizer)
    assert adapters.model.get_base_model().config.slicing["max_slice_nums"] == 9
    torch.testing.assert_close(now(adapters), expected, atol=1e-4, rtol=0)
    assert (expected - alone[None]).abs().max() > 0.1
    for name in ("signs", None):
        adapters.switch(name)
        assert torch.equal(now(adapters), alone[name])
    adapters.switch("both")
    torch.testing.assert_close(now(adapters), expected, atol=1e-4, rtol=0)


def test_one_adapter_of_weight_one_is_itself(folders, alone):
    adapters = load_adapters(some(folders, "food"))
    adapters.combine({"food": 1.0}, name="same")
    adapters.switch("same")
    torch.testing.assert_close(now(adapters), alone["food"], atol=1e-5, rtol=0)


def test_what_cannot_be_combined(folders):
    adapters = load_adapters(some(folders, "food", "saved"))
    for weights, name, message in (
        ({"food": 1.0, "drinks": 1.0}, "both", "no adapter 'drinks'"),
        ({"food": 1.0}, "saved", "adapter 'saved' already"),
        ({}, "both", "expected a number"),
        ({"food": float("nan")}, "both", "expected a number"),
        ({"food": 0.5, "saved": 0.5}, "both", "'saved' cannot be combined"),
        ({"food": 1.0}, "a.b", "cannot name an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.combine(weights, name)
    assert adapters.names == ["food", "saved"]


def changed_copy(folder: Path, target: Path, **fields: object) -> Path:
    """The adapter with other fields in its adapter_config.json."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


def test_what_cannot_be_loaded_together(folders, tiny, llm_type, tmp_path):
    other = tiny[next(other for other in LLM_TYPES if other != llm_type)]
    elsewhere = changed_copy(folders["food"], tmp_path / "elsewhere", base_model_name_or_path=str(other))
    with pytest.raises(ValueError, match="different base models") as error:
        load_adapters({"food": folders["food"], "elsewhere": elsewhere})
    assert str(other) in str(error.value) and str(folders[None]) in str(error.value)
    moved = changed_copy(folders["signs"], tmp_path / "moved", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"gone, where there is no folder.*--base"):
        load_adapters({"moved": moved})
    adapters = load_adapters({"food": folders["food"], "moved": moved}, base=folders[None])
    assert adapters.active == "food"
    with pytest.raises(ValueError, match="does not fit its base model"):
        load_adapters({"food": folders["food"]}, base=other)
    biased = changed_copy(folders["food"], tmp_path / "biased", bias="all")
    with pytest.raises(ValueError, match="--lora_bias"):
        load_adapters({"biased": biased})
    assert load_adapters({"a": folders["food"], "lora": folders["signs"]}).names == ["a", "lora"]
    for name in ("keys", "a.b", ""):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            load_adapters({name: folders["food"]})
    with pytest.raises(ValueError, match="no adapters"):
        load_adapters({})
    (moved / EXTRA_WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_adapters({"moved": moved}, base=folders[None])


def test_training_goes_on_from_an_adapter(folders, alone, tmp_path):
    """The model that --lora_weight_path trains further is the adapter's, LoRA and all other tensors."""
    flags = ("--use_lora", "true", "--lora_weight_path", folders["food"], "--report_to", "none")
    call = ["--model_name_or_path", folders[None], "--output_dir", tmp_path, *flags]
    model_args, _, args, lora_args = parse_arguments([*map(str, call)])
    model = load_model(model_args, args, lora_args, load_config(str(folders[None])))
    _, tokenizer = load_finetuned(folders["food"])
    torch.testing.assert_close(logits(model.eval(), tokenizer), alone["food"], atol=1e-6, rtol=0)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_first_loss_is_the_adapters(folders, llm_type, data_file, tmp_path, caplog):
    """One step without learning over all samples; the adapter wants its own number of slices."""
    if llm_type == "minicpm":
        pytest.skip("the same code")
    model, tokenizer = load_finetuned(folders["signs"])
    config = model.get_base_model().config
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(data_file), 2048)
    settings = {"per_device_eval_batch_size": 24, "report_to": "none", "remove_unused_columns": False, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), **settings)
    trainer = CPMTrainer(model=model, args=arguments, eval_dataset=dataset, data_collator=data_collator)
    expected = trainer.evaluate()["eval_loss"]
    first = []
    for flags in ((), ("--max_slice_nums", 4)):
        out = tmp_path / str(len(flags))
        call = ["--model_name_or_path", folders[None], "--output_dir", out, "--data_path", data_file, *flags]
        call += ["--use_lora", "true", "--lora_weight_path", folders["signs"], "--learning_rate", 0, "--max_steps", 1]
        call += ["--batch_size", 24, "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none"]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train([*map(str, call), "--dataloader_num_workers", "0"])
        assert ("was trained with --max_slice_nums 4" in caplog.text) == (not flags)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        first.append(next(entry["loss"] for entry in history if "loss" in entry))
    assert first[1] == pytest.approx(expected, rel=1e-5)


COMBINATIONS = {
    "mean": {"food": 0.5, "signs": 0.5},
    "three": {"food": 1.5, "signs": -0.25, "everywhere": 0.5},
    "one": {"signs": 1.0},
}


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Folders of combinations, and of a loaded adapter of each kind, with their logits in memory."""
    place, found = tmp_path_factory.mktemp("written"), {}
    adapters = load_adapters(some(folders, *FLAGS))
    for name, weights in COMBINATIONS.items():
        adapters.combine(weights, name)
    for name in (*COMBINATIONS, *FLAGS):
        adapters.switch(name)
        found[name] = (place / name, now(adapters))
    for name, (folder, _) in found.items():  # whichever is active
        adapters.save(name, folder)
    return found


@pytest.mark.parametrize("name", [*COMBINATIONS, *FLAGS])
def test_a_saved_adapter_is_that_in_memory(name, written, folders, alone):
    folder, expected = written[name]
    torch.testing.assert_close(logits(*load_finetuned(folder)), expected, atol=1e-5, rtol=1e-5)
    if name in FLAGS:
        assert torch.equal(logits(*load_finetuned(folder)), alone[name])
    trained = {file.name for file in folders["food"].iterdir()} | {"README.md"}
    assert {file.name for file in folder.iterdir()} == trained
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["inference_mode"] and config["base_model_name_or_path"] == str(folders[None].resolve())


@pytest.mark.parametrize("name", ["mean", "three"])
def test_a_saved_combination_can_be_merged(name, written, tmp_path):
    folder, expected = written[name]
    merge_lora.main(["--adapter", str(folder), "--output", str(tmp_path / "merged")])
    torch.testing.assert_close(logits(*load_finetuned(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


def test_a_saved_combination_is_an_adapter_like_others(written, folders, alone, data_file, tmp_path):
    """It can be loaded beside others, combined with them, and trained on."""
    folder, expected = written["mean"]
    adapters = load_adapters({"both": folder, "food": folders["food"]})
    torch.testing.assert_close(now(adapters), expected, atol=1e-5, rtol=1e-5)
    adapters.switch("food")
    assert torch.equal(now(adapters), alone["food"])
    adapters.combine({"both": 2.0, "food": -1.0}, "signs_again")
    flags = ("--data_path", data_file, "--output_dir", tmp_path / "more", "--use_lora", "true", "--max_steps", 1)
    flags += ("--lora_weight_path", folder, "--report_to", "none", "--dataloader_num_workers", 0)
    train([str(word) for word in ("--model_name_or_path", folders[None], *flags, "--disable_tqdm", "true")])
    assert (tmp_path / "more" / "adapter_model.safetensors").exists()


def test_settings_of_a_combination(written):
    """What the parts agree on, so that a wrong base is known; and which parts they were."""
    resolved = json.loads((written["mean"][0] / "training_settings.json").read_text())["resolved"]
    assert resolved["combined_from"] == COMBINATIONS["mean"] and resolved["dtype"] == "float32"
    assert resolved["slicing"]["max_slice_nums"] == 9


def test_names_of_adapters_that_are_parts_of_tensors_names(folders, tmp_path):
    """peft takes tensors with the name of another adapter in theirs for that adapter's."""
    adapters = load_adapters({"llm": folders["food"], "q_proj": folders["signs"]})
    adapters.combine({"llm": 0.5, "q_proj": 0.5}, "layers")
    for name in ("llm", "q_proj", "layers"):
        adapters.switch(name)
        adapters.save(name, tmp_path / name)
        torch.testing.assert_close(logits(*load_finetuned(tmp_path / name)), now(adapters), atol=1e-5, rtol=1e-5)


def test_nothing_is_overwritten_by_saving(folders, tmp_path):
    adapters = load_adapters(some(folders, "signs"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for folder in (tmp_path / "full", folders["food"], tmp_path / "full" / "mine.txt"):
        with pytest.raises(ValueError, match="nothing is overwritten"):
            adapters.save("signs", folder)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        adapters.save("other", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    adapters.save("signs", tmp_path / "empty")
    load_finetuned(tmp_path / "empty")
