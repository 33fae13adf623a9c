"""Flags and launchers: what each refuses, and that every shipped file is one that its reader accepts."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import LLM_TYPES, ROOT, TESTS, launch, write_adapter
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from finetune import arguments as arguments_module
from finetune.arguments import (
    check_arguments,
    checkpoint_to_resume,
    load_config,
    parse_arguments,
)
from finetune.checks import usable_cpus
from finetune.errors import UserError
from finetune.finetune import _trial_problems, load_model, prepare_trainable, train
from finetune.minicpmv import MiniCPMV
from finetune.reporting import parameter_table, plot_history

FINETUNE = ROOT / "finetune"
DEEPSPEED_FILES = sorted(FINETUNE.glob("ds_config_*.json"))

# What the original's scripts and FAQ pass, word for word.
ORIGINAL_FLAGS = (
    "--llm_type llama3 --remove_unused_columns false --label_names labels --prediction_loss_only false --bf16 false "
    "--bf16_full_eval false --fp16 false --fp16_full_eval false --do_train --do_eval --tune_vision true "
    "--model_max_length 1200 --max_slice_nums 9 --max_steps 10000 --eval_steps 1000 --logging_strategy steps "
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 1 "
    "--evaluation_strategy steps --save_strategy steps --save_steps 1000 --save_total_limit 10 --learning_rate 1e-6 "
    "--weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 "
    "--gradient_checkpointing true --report_to tensorboard --batch_size 2 --cache_dir cache"
).split()


@pytest.fixture
def given(tiny, data_file, tmp_path, monkeypatch):
    """Checks a command line on the 2.5 checkpoint; flags given later win."""
    # set, then deleted: so that what --logging_dir sets is taken back after the test
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")

    def check(*flags):
        needed = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", tmp_path / "out"]
        parsed = parse_arguments([str(word) for word in [*needed, *flags]])
        return parsed, check_arguments(*parsed, load_config(parsed[0].model_name_or_path))

    return check


def test_flags_of_the_original(given, data_file, tmp_path):
    (_, _, training, _), problems = given(
        *ORIGINAL_FLAGS, "--eval_data_path", data_file, "--logging_dir", tmp_path, "--tune_llm", "true"
    )
    assert problems == []
    assert training.per_device_train_batch_size == 2
    assert training.eval_strategy == "steps"
    assert training.warmup_steps == 0.01 and training.get_warmup_steps(1000) == 10
    assert training.max_steps == 10000


def test_lora_flags_reach_peft(given):
    (_, _, _, lora), problems = given(
        *("--use_lora", "true", "--lora_layers_to_transform", "0", "1", "--lora_layers_pattern", "layers"),
        *("--lora_layer_replication", "[[0, 1], [0, 2]]", "--lora_modules_to_save", "resampler,embed_tokens"),
        *("--lora_target_modules", "q_proj,v_proj"),
    )
    assert problems == []
    assert lora.layers_to_transform == [0, 1] and lora.layer_replication == [(0, 1), (0, 2)]
    assert lora.modules_to_save == ["resampler", "embed_tokens"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {f"layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"}),
        ("--lora_layers_to_transform 1", {f"layers.1.self_attn.{p}_proj" for p in "qkvo"}),
        ("--lora_target_modules q_proj", {f"layers.{n}.self_attn.q_proj" for n in (0, 1)}),
        ("--lora_target_modules q_proj,down_proj --lora_layers_to_transform 0,1 --lora_layers_pattern layers",
         {f"layers.{n}.{m}_proj" for n in (0, 1) for m in ("self_attn.q", "mlp.down")}),
        (r"--lora_target_modules vpm\..*layers\.\d+\..*fc1 --lora_layers_to_transform 0", {"layers.0.mlp.fc1"}),
    ],
)  # fmt: skip
def test_which_layers_get_lora(given, flags, expected):
    (model_args, _, training, lora), problems = given("--use_lora", "true", *flags.split())
    assert problems == []
    with torch.device("meta"):
        model = prepare_trainable(MiniCPMV(load_config(model_args.model_name_or_path)), training, lora)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert {name[name.index("layers.") :] for name in adapted} == expected
    assert all((".vpm." in name) == ("vpm" in flags) for name in adapted)


def trial_problems(model_args, training, lora) -> list[str]:
    """What a trial of the settings on a model without values finds."""
    config = load_config(model_args.model_name_or_path)
    return _trial_problems(model_args, training, lora, config, look_at_disk=False)[0]


@pytest.mark.parametrize("llm_type", LLM_TYPES)
@pytest.mark.parametrize("vision", ["true", "false"])
def test_all_linear_is_the_language_model_and_the_other_parts_obey_their_flags(given, tiny, llm_type, vision):
    """No matrix is trained both in full and by LoRA; the resampler's are in full, the tower's in full or not at all."""
    flags = ("--use_lora", "true", "--lora_target_modules", "all-linear", "--tune_vision", vision)
    (model_args, _, training, lora), problems = given("--model_name_or_path", tiny[llm_type], *flags)
    assert problems == [] and trial_problems(model_args, training, lora) == []
    with torch.device("meta"):
        plain = MiniCPMV(load_config(model_args.model_name_or_path))
        model = prepare_trainable(MiniCPMV(plain.config), training, lora)
    wanted = {name for name, module in plain.llm.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert adapted == {f"base_model.model.llm.model.layers.{name}" for name in wanted} and len(wanted) == 14
    in_full = {name.split(".")[2] for name in trained if ".lora_" not in name}
    assert in_full == {"resampler", "llm", *(["vpm"] if vision == "true" else [])}
    assert not [name for name in trained if ".base_layer." in name]


def test_all_linear_in_some_layers(given):
    flags = ("--use_lora", "true", "--lora_target_modules", "All-Linear", "--lora_layers_to_transform", "1")
    (model_args, _, training, lora), problems = given(*flags)
    assert problems == []
    with torch.device("meta"):
        model = prepare_trainable(MiniCPMV(load_config(model_args.model_name_or_path)), training, lora)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 7 and all(".layers.1." in name for name in adapted)


@pytest.mark.parametrize(
    ("targets", "flag", "first"),
    [
        (r".*(q_proj|fc1)", "--tune_vision", "vpm.encoder.layers.0"),
        (r".*kv_proj", "--tune_resampler", "resampler.kv_proj"),
        (r".*(embed_tokens|llm.*q_proj)", "--tune_embed_tokens", "llm.model.embed_tokens"),
    ],
)
def test_full_training_and_lora_of_one_matrix_is_refused(given, targets, flag, first, tmp_path):
    """Also where an adapter that has LoRA there is trained on."""
    flags = ("--use_lora", "true", "--lora_target_modules", targets)
    (model_args, _, training, lora), problems = given(*flags)
    [problem] = trial_problems(model_args, training, lora)
    assert problems == [] and "both in full and by LoRA" in problem and first in problem and flag in problem
    (_, _, frozen, _), _ = given(*flags, flag, "false")
    assert trial_problems(model_args, frozen, lora) == []
    adapter = write_adapter(Path(model_args.model_name_or_path), tmp_path / "adapter", *flags, flag, "false")
    (_, _, training, lora), _ = given("--use_lora", "true", "--lora_weight_path", adapter)
    assert "both in full and by LoRA" in trial_problems(model_args, training, lora)[0]


def test_layer_replication(given, tmp_path):
    """Layers 0, 0, 1 stacked from two, with an adapter for each; the adapter folder loads again."""
    parsed, problems = given("--use_lora", "true", "--lora_layer_replication", "[[0, 1], [0, 2]]")
    assert problems == []
    model = load_model(parsed[0], parsed[2], parsed[3], load_config(parsed[0].model_name_or_path)).eval()
    assert len(model.get_base_model().llm.model.layers) == 3
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    data = {"input_ids": torch.arange(12)[None]}
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(again(data=data).logits, model(data=data).logits)
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(
        model.generate(data=data, use_cache=True, **settings), model.generate(data=data, use_cache=False, **settings)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_lora true --tune_llm true", "LoRA keeps the language model frozen"),
        ("--tune_llm false --tune_vision false --tune_resampler false", "nothing would be trained"),
        ("--llm_type minicpm", "whose llm_type is llama3"),
        ("--llm_type qwen", "whose llm_type is llama3"),
        ("--data_path none.json", "--data_path none.json: there is no such file or folder"),
        ("--eval_data_path none.json", "--eval_data_path none.json: there is no such file or folder"),
        ("--deepspeed none.json", "--deepspeed none.json: there is no such file"),
        ("--deepspeed=none.json", "--deepspeed none.json: there is no such file"),
        ("--evaluation_strategy steps", "needs --eval_data_path"),
        ("--use_lora true --q_lora true", "comes with a later change"),
        ("--lora_r 8", "--lora_r only with --use_lora true"),
        ("--use_lora true --lora_weight_path nowhere", "holds no adapter_config.json"),
        ("--use_lora true --lora_target_modules (", "no regular expression"),
        ("--use_lora true --lora_bias some", "expected none, all or lora_only"),
        ("--use_lora true --lora_layer_replication 3", "expected JSON like"),
        ("--model_name_or_path ./nowhere", "there is no such folder"),
        ("--model_max_length 100000", "made for at most"),
        ("--max_slice_nums 0", "expected 1"),
        ("--warmup_ratio 1", "0 to below 1"),
        ("--use_lora true --lora_target_modules vpm\\..* --lora_layers_to_transform 1", "needs plain names"),
        ("--remove_unused_columns true", "leave it false"),
        ("--use_liger_kernel true", "run on GPUs only"),
        ("--use_liger_kernel true", "pip install liger-kernel"),
        ("--label_smoothing_factor 0.1", "plain cross entropy"),
        ("--resume_from_checkpoint nowhere", "is no complete checkpoint"),
        ("--max_bad_steps 0", "expected 1 or more"),
        ("--image_folder nowhere", "no such folder"),
        ("--fp16 true", "float16 trains on GPUs only"),
        ("--attn_implementation some", "expected sdpa, eager, flash_attention_2"),
        ("--attn_implementation flash_attention_2", "pip install flash-attn"),
        ("--batch_size 0", "--per_device_train_batch_size 0: expected 1 or more"),
        ("--report_to nothing", "--report_to nothing: is unknown, or its package is missing"),
        ("--vision_learning_rate -1", "expected 0 or more"),
        ("--vision_learning_rate 1e-5 --tune_vision false", "only with --tune_vision true"),
        ("--no_such_flag 1", "there is no such flag"),
    ],
)
def test_wrong_combinations(given, flags, message, monkeypatch):
    monkeypatch.setattr("finetune.arguments.is_liger_kernel_available", lambda: False)
    _, problems = given(*flags.split())
    assert any(message in problem for problem in problems), problems


def test_all_problems_at_once_and_before_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UserError) as caught:
        train(
            f"--model_name_or_path {tiny['minicpm']} --llm_type llama3 --data_path no.json --use_lora true "
            f"--tune_llm true --deepspeed no_ds.json --output_dir {tmp_path}".split()
        )
    for part in ("whose llm_type is minicpm", "no.json", "keeps the language model frozen", "no_ds.json"):
        assert part in str(caught.value)


def test_lora_target_is_reported_with_the_other_settings(tiny, tmp_path):
    base = f"--model_name_or_path {tiny['llama3']} --data_path no.json --output_dir {tmp_path} --use_lora true"
    with pytest.raises(UserError) as caught:
        train([*base.split(), "--lora_target_modules", "llm.none"])
    assert "no.json: there is no such file" in str(caught.value) and "LoRA cannot be set up" in str(caught.value)


def test_resuming_leaves_checkpoints_where_they_are(tiny, data_file, tmp_path, monkeypatch):
    """--overwrite_output_dir in a script, --resume_from_checkpoint behind it."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    torch.save({}, tmp_path / "checkpoint-3" / "optimizer.pt")
    monkeypatch.setattr("finetune.finetune.load_model", lambda *a, **k: (_ for _ in ()).throw(InterruptedError))
    flags = f"--model_name_or_path {tiny['llama3']} --data_path {data_file} --output_dir {tmp_path}".split()
    with pytest.raises(InterruptedError):
        train([*flags, "--overwrite_output_dir", "true", "--resume_from_checkpoint", "true"])
    assert (tmp_path / "checkpoint-3").is_dir()
    with pytest.raises(InterruptedError):
        train([*flags, "--overwrite_output_dir", "true"])
    assert not (tmp_path / "checkpoint-3").exists()


def test_wrong_lora_target_shows_before_weights(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    base = f"--model_name_or_path {tiny['llama3']} --data_path {data_file} --output_dir {tmp_path} --use_lora true"
    with pytest.raises(UserError, match="LoRA cannot be set up"):
        train([*base.split(), "--lora_target_modules", "llm.none"])


def test_data_problems_stop_before_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    data = tmp_path / "train.json"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data.write_text(json.dumps([{"id": "a7", "image": "gone.png", "conversations": turns}, {"id": "b8"}]))
    with pytest.raises(UserError) as caught:
        train(f"--model_name_or_path {tiny['llama3']} --data_path {data} --output_dir {tmp_path / 'out'}".split())
    assert re.search(r"sample 0 \(id 'a7'\): picture \S+ does not exist", str(caught.value))
    assert "sample 1 (id 'b8'): field 'conversations' is missing" in str(caught.value)


def test_scheduler_block_is_refused(given, tmp_path):
    config = {**json.loads(DEEPSPEED_FILES[0].read_text()), "scheduler": {"type": "WarmupLR"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    _, problems = given("--deepspeed", tmp_path / "ds.json")
    assert len(problems) == 1 and '"scheduler"' in problems[0]


def test_deepspeed_blocks_of_the_faq(given, tmp_path, caplog):
    """The original FAQ's blocks, pasted into the shipped files: weights are saved, and nothing has to be compiled."""
    offload = {"device": "cpu", "pin_memory": True}
    for block in (
        {"stage": 2, "offload_optimizer": offload},
        {"stage": 3, "offload_optimizer": offload, "offload_param": offload},
    ):
        file = tmp_path / "ds.json"
        shipped = json.loads((FINETUNE / f"ds_config_zero{block['stage']}.json").read_text())
        file.write_text(json.dumps({**shipped, "zero_optimization": block}))
        (_, _, training, _), problems = given("--deepspeed", file)
        assert problems == []
        assert training.hf_deepspeed_config.get_value("zero_force_ds_cpu_optimizer") is False
    assert training.hf_deepspeed_config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True
    assert "stage3_gather_16bit_weights_on_model_save" in caplog.text
    file.write_text("[]")
    assert any("is no DeepSpeed configuration" in problem for problem in given("--deepspeed", file)[1])
    file.write_text(json.dumps({**shipped, "optimizer": {"type": "AdamW"}}))
    assert any('"optimizer" block' in p for p in given("--deepspeed", file, "--vision_learning_rate", "1e-5")[1])


def test_an_empty_value_is_none(given, data_file, monkeypatch):
    """As a script passes it on whose variable is not set; and as the launchers' last word over their own."""
    monkeypatch.chdir(data_file.parent)
    (_, data, training, _), problems = given(
        *("--deepspeed", FINETUNE / "ds_config_zero2.json", "--deepspeed", "", "--llm_type", "", "--image_folder="),
        *("--eval_data_path", "", "--max_steps", "3"),
    )
    assert problems == [] and training.max_steps == 3
    found = (data.eval_data_path, data.image_folder, training.deepspeed, training.llm_type)
    assert found == (None, None, None, None)
    for flag in ("data_path", "output_dir"):
        assert any(f"--{flag} is missing" in problem for problem in given(f"--{flag}", "")[1])


def test_spellings_of_flags_and_paths(given, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(data_file.parent))
    (_, data, training, _), problems = given(
        *("--output-dir", tmp_path / "other", f"--data-path=~/{data_file.name}", "--image_folder", "~"),
        *("--warmup-ratio", "0.1", "--warmup_steps", "0"),
    )
    assert problems == []
    assert training.output_dir == str(tmp_path / "other") and data.data_path == [str(data_file)]
    assert data.image_folder == str(data_file.parent)
    assert training.get_warmup_steps(100) == 0
    assert given("--warmup_steps", "7", "--warmup_ratio", "0.1")[0][2].get_warmup_steps(100) == 10


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--fp16 true --bf16 true", "At most one of fp16 and bf16"),
        ("--lr_scheduler_type cosin", "--lr_scheduler_type cosin: expected one of linear, cosine"),
        ("--evaluation_strategy some", "--eval_strategy some: expected one of no, steps, epoch"),
        ("--optim some", "--optim some: invalid choice"),
        ("--max_steps few", "--max_steps few: invalid int value"),
        ("--tf32 true", "--tf32 requires Ampere"),
        ("--dataloader_prefetch_factor 2 --dataloader_num_workers 0", "--dataloader_prefetch_factor can only be set"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
        ("--load_best_model_at_end true --eval_strategy epoch", "requires the save and eval strategy to match"),
    ],
)
def test_what_transformers_refuses(tiny, tmp_path, flags, named):
    """Is reported together with all other problems, in one line that names the flag."""
    words = f"--model_name_or_path {tiny['llama3']} --data_path no.json --output_dir {tmp_path} --no_such_flag 1"
    with pytest.raises(UserError, match=r"(?s)These settings cannot work:.*no_such_flag") as caught:
        train([*words.split(), *flags.split()])
    lines = str(caught.value).splitlines()
    for part in (named, "no.json: there is no such file"):
        assert [line for line in lines if part in line], part


def test_an_optimizer_whose_package_is_missing_shows_before_weights(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    base = f"--model_name_or_path {tiny['llama3']} --data_path {data_file} --output_dir {tmp_path}"
    with pytest.raises(UserError, match="--optim adamw_bnb_8bit: "):
        train([*base.split(), "--optim", "adamw_bnb_8bit"])


def test_what_is_no_model_says_what_it_is(tmp_path):
    assert "neither config.json" in load_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in load_config(str(tmp_path)) and "--lora_weight_path" in load_config(str(tmp_path))


def test_no_batch_is_left(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    base = f"--model_name_or_path {tiny['llama3']} --data_path {data_file} --output_dir {tmp_path}"
    with pytest.raises(UserError, match=r"would leave out all \d+ samples"):
        train([*base.split(), "--dataloader_drop_last", "true", "--batch_size", "1000"])


def test_missing_output_dir(tiny, data_file):
    parsed = parse_arguments(["--model_name_or_path", str(tiny["llama3"]), "--data_path", str(data_file)])
    config = load_config(parsed[0].model_name_or_path)
    assert any("--output_dir is missing" in problem for problem in check_arguments(*parsed, config))


def test_earlier_run_is_not_overwritten(given, tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert any("checkpoint-3 of an earlier run" in problem for problem in given()[1])
    assert given("--overwrite_output_dir", "true")[1] == []
    (_, _, training, _), problems = given("--resume_from_checkpoint", "true")
    assert problems == [] and Path(checkpoint_to_resume(training)).name == "checkpoint-3"
    (_, _, training, _), problems = given("--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3")
    assert problems == [] and Path(checkpoint_to_resume(training)).name == "checkpoint-3"
    assert any("earlier run" in problem for problem in given("--resume_from_checkpoint", "false")[1])


def test_what_would_be_moved_away_is_not_started_from(given, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-3"
    for flags in (("--model_name_or_path",), ("--use_lora", "true", "--lora_weight_path")):
        for overwrite in ("true", "false"):
            _, problems = given(*flags, checkpoint, "--overwrite_output_dir", overwrite)
            assert any("would move away" in problem for problem in problems) == (overwrite == "true")
    assert given("--overwrite_output_dir", "true")[1] == []


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("said", ["true", "false"])
def test_either_name_of_checkpointing_is_heard_without_a_warning(given, name, said):
    """The old one, which the launchers and the original's scripts use, is deprecated in transformers from 5.23 on."""
    if not hasattr(arguments_module.TrainingArguments, name):
        pytest.skip("transformers before 5.23")
    own = '{"use_reentrant": true}'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (_, _, training, _), problems = given(f"--{name}", said, f"--{name}_kwargs", own)
        (_, _, one, _), _ = given("--vision_checkpointing", said)
    assert problems == []
    for whole in ("gradient_checkpointing", "activation_checkpointing"):
        assert getattr(training, whole, said == "true") == getattr(one, whole, said == "true") == (said == "true")
        assert getattr(training, f"{whole}_kwargs", json.loads(own)) == json.loads(own)
    assert (training.vision_checkpointing, training.llm_checkpointing) == (said == "true",) * 2
    assert (one.vision_checkpointing, one.llm_checkpointing) == (said == "true", False)


def test_defaults_that_follow_from_the_machine(given, monkeypatch):
    """No more loader processes than cores, and no search for parameters that take no part."""
    (_, _, training, _), _ = given()
    assert training.ddp_find_unused_parameters is False and training.dataloader_num_workers == min(4, usable_cpus())
    for cores, processes, wanted in ((16, 1, 4), (3, 1, 3), (16, 8, 2), (2, 8, 0)):
        monkeypatch.setattr("finetune.checks.usable_cpus", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert given()[0][2].dataloader_num_workers == wanted
        assert given("--dataloader_num_workers", 3)[0][2].dataloader_num_workers == 3
    assert given("--ddp_find_unused_parameters", "true")[0][2].ddp_find_unused_parameters is True


def test_precision_is_found(given, monkeypatch):
    assert given()[0][2].compute_dtype == torch.float32  # a CPU
    assert given("--bf16", "true")[0][2].compute_dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=has_bf16, **_: answer)
        assert arguments_module.found_precision(use_cpu=False) == (has_bf16, not has_bf16)
    assert arguments_module.found_precision(use_cpu=True) == (False, False)


def test_half_precision_keeps_trained_tensors_in_float32(given):
    parsed, _ = given("--bf16", "true", "--use_lora", "true", "--tune_vision", "false")
    model = load_model(parsed[0], parsed[2], parsed[3], load_config(parsed[0].model_name_or_path))
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    # DeepSpeed keeps its own copies in float32; ZeRO-3 fails over trained tensors of several dtypes.
    parsed[2].deepspeed = "file.json"
    model = load_model(parsed[0], parsed[2], parsed[3], load_config(parsed[0].model_name_or_path))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("frozen", ["tune_vision", "tune_embed_tokens", "tune_resampler", "tune_llm"])
def test_full_tuning_keeps_what_is_frozen_in_half_precision(given, data_file, tmp_path, frozen):
    """And computes with both: a step and an evaluation run, and what was frozen comes out as it was."""
    flags = ("--bf16", "true", f"--{frozen}", "false")
    parsed, problems = given(*flags)
    assert problems == []
    config = load_config(parsed[0].model_name_or_path)
    model = load_model(parsed[0], parsed[2], parsed[3], config)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(
        [
            *map(str, ("--model_name_or_path", parsed[0].model_name_or_path, "--data_path", data_file, *flags)),
            *map(str, ("--output_dir", tmp_path / "out", "--eval_data_path", data_file, "--eval_strategy", "steps")),
            *("--max_steps", "1", "--eval_steps", "1", "--batch_size", "4", "--report_to", "none"),
            *("--gradient_checkpointing", "true", "--dataloader_num_workers", "0"),
        ]
    )
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert before and all(torch.equal(saved[name], value) for name, value in before.items())


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_what_the_switches_train(given, tiny, llm_type):
    def trained(*flags: str) -> set[str]:
        (model_args, _, training, lora), problems = given("--model_name_or_path", tiny[llm_type], *flags)
        assert problems == []
        config = load_config(model_args.model_name_or_path)
        with torch.device("meta"):
            model = prepare_trainable(MiniCPMV(config), training, lora)
        names = (n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad)
        return {
            "lora" if ".lora_" in n else n.split(".")[2] if n.startswith("llm.model") else n.split(".")[0]
            for n in names
        }

    everything = {"llm", "embed_tokens", "layers", "norm", "vpm", "resampler"}
    assert trained() == everything
    assert trained("--tune_vision", "false") == everything - {"vpm"}
    assert trained("--tune_llm", "false") == {"vpm", "resampler"}
    assert trained("--tune_embed_tokens", "false") == everything - {"embed_tokens"}
    lora = ("--use_lora", "true")
    assert trained(*lora) == {"lora", "embed_tokens", "vpm", "resampler"}
    assert trained(*lora, "--tune_embed_tokens", "false") == {"lora", "vpm", "resampler"}
    assert trained(*lora, "--tune_vision", "false", "--tune_resampler", "false") == {"lora", "embed_tokens"}


def test_parameter_table():
    model = torch.nn.ModuleDict({"vpm": torch.nn.Linear(2, 3), "resampler": torch.nn.Linear(1, 1)})
    model["vpm"].requires_grad_(False)
    lines = parameter_table(model).splitlines()
    assert [line.split() for line in lines[1:]] == [["vpm", "0", "9"], ["resampler", "2", "0"], ["total", "2", "9"]]


def test_every_flag_has_help():
    for group in ("ModelArguments", "DataArguments", "TrainingArguments", "LoraArguments"):
        for field in fields(getattr(arguments_module, group)):
            assert field.metadata.get("help") or not field.init, field.name


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_deepspeed_files(path, given):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads(path.read_text())
    assert "scheduler" not in config
    assert config["zero_optimization"]["stage"] == int(path.stem.split("zero")[1][0])
    offloads = {"zero2": ["offload_optimizer"], "zero3": ["offload_optimizer", "offload_param"]}
    expected = offloads[path.stem.split("_")[2]] if "offload" in path.stem else []
    assert [key for key in config["zero_optimization"] if key.startswith("offload")] == expected
    (_, _, training, _), problems = given("--deepspeed", path)
    assert problems == []
    filled = training.hf_deepspeed_config
    filled.fill_only("zero_optimization.reduce_bucket_size", 1)
    filled.fill_only("zero_optimization.stage3_prefetch_bucket_size", 1)
    filled.fill_only("zero_optimization.stage3_param_persistence_threshold", 1)
    DeepSpeedConfig(filled.config)


def test_shipped_files_are_all_looked_at():
    assert [path.name for path in DEEPSPEED_FILES] == [
        "ds_config_zero2.json",
        "ds_config_zero2_offload.json",
        "ds_config_zero3.json",
        "ds_config_zero3_offload.json",
    ]
    scripts = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.sh"), *FINETUNE.glob("*.sh")])
    assert scripts == [
        *(
            "finetune/finetune_ds.sh",
            "finetune/finetune_lora.sh",
            "finetune/launch.sh",
            "finetune/slurm.sh",
            "quickstart.sh",
            "run_tests.sh",
        ),
    ]
    for script in scripts:
        subprocess.run(["sh", "-n", str(ROOT / script)], check=True)


def test_launchers_start_torchrun_as_told(tmp_path):
    """The command that a launcher would run, with a python that prints its arguments."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && { echo 3; exit 0; }\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def command(script: str, *flags: str, **variables) -> list[str]:
        place = {"VIRTUAL_ENV": tmp_path, "MODEL": "a model", "DATA": "d.json", **variables}
        return launch(script, *flags, cwd=tmp_path, **place).stdout.splitlines()

    too_many = {"VIRTUAL_ENV": tmp_path, "DATA": "d.json", "GPUS_PER_NODE": 8, "DS_ACCELERATOR": ""}
    result = launch("finetune_lora.sh", cwd=tmp_path, check=False, **too_many)
    assert result.returncode == 1 and "GPUS_PER_NODE is 8, but 3 can be seen here" in result.stderr
    words = command("finetune_lora.sh", "--max_steps", "10")
    assert words[words.index("--nproc_per_node") + 1] == "3" and "--standalone" in words
    assert words[words.index("--model_name_or_path") + 1] == "a model"
    assert words[-2:] == ["--max_steps", "10"]
    assert words[words.index("--deepspeed") + 1] == str(FINETUNE / "ds_config_zero2.json")
    assert "--eval_data_path" not in words and "--llm_type" not in words
    assert words[words.index("--learning_rate") + 1] == "1e-4"
    words = command(
        "finetune_ds.sh",
        **{"EVAL_DATA": "e.json", "LLM_TYPE": "llama3", "GPUS_PER_NODE": 2, "NNODES": 2, "NODE_RANK": 1},
        **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 7000, "DS_CONFIG": "ds_config_zero3_offload.json"},
    )
    for flag, value in {
        "--nnodes": "2",
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
        "--master_port": "7000",
        "--nproc_per_node": "2",
        "--eval_data_path": "e.json",
        "--llm_type": "llama3",
        "--tune_llm": "true",
        "--deepspeed": str(FINETUNE / "ds_config_zero3_offload.json"),
    }.items():
        assert words[words.index(flag) + 1] == value, flag
    assert "--deepspeed" not in command("finetune_ds.sh", DS_CONFIG="")


@pytest.mark.parametrize(
    ("flags", "given", "threads"),
    [
        (["--nproc_per_node", "2"], None, "6"),
        (["--nproc-per-node=5"], None, "2"),
        (["--nproc_per_node", "16"], None, "1"),
        (["--nproc_per_node", "2"], "3", "3"),
        (["--nproc_per_node", "1"], None, None),
        ([], None, None),
    ],
)
def test_processes_share_the_cores(monkeypatch, flags, given, threads):
    """Of a node with 12; torchrun alone would give each of several processes one thread."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("OMP_NUM_THREADS", None)
    if given:
        os.environ["OMP_NUM_THREADS"] = given
    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr("torch.distributed.run.main", lambda: found.append(os.environ.get("OMP_NUM_THREADS")))
    monkeypatch.setattr(sys, "argv", ["launch.py", *flags, "program.py", "--nproc_per_node", "7"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it changes
    runpy.run_path(str(FINETUNE / "launch.py"), run_name="__main__")
    assert found == [threads]


def test_launcher_fails_with_the_training_and_says_why(tiny, tmp_path):
    result = launch("finetune_lora.sh", MODEL=tiny["llama3"], DATA="no.json", OUTPUT_DIR=tmp_path, check=False)
    assert result.returncode != 0
    assert "--data_path no.json: there is no such file" in result.stderr
    assert "finetune/finetune.py" in result.stderr


PROGRAMS = sorted(path.name for path in FINETUNE.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_modules_of_other_packages_are_not_taken_for_ours(program, safe_path, tmp_path):
    """A package that is called as one of our files: what the program imports first looks for it.

    Python 3.11 and later leave the program's folder out with PYTHONSAFEPATH, so that the first one is another.
    """
    ours = {path.stem for path in FINETUNE.glob("*.py")} - {"__init__", "finetune"}
    look = f"""
import sys
from importlib.util import find_spec
found = {{name: find_spec(name).origin for name in {sorted(ours)}}}
sys.exit(str(sorted(name for name, origin in found.items() if not origin.startswith({str(tmp_path)!r}))))
"""
    for name in ours:
        (tmp_path / f"{name}.py").touch()
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(look)
    command = [sys.executable, str(FINETUNE / program), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": safe_path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == "[]"


def test_modules_import_and_run_inside_their_folder():
    """As the original's did; the imports from the repository root are those of these tests."""
    program = "from dataset import SupervisedDataset; from trainer import CPMTrainer"
    subprocess.run([sys.executable, "-c", program], cwd=FINETUNE, check=True, capture_output=True)
    command = [sys.executable, "finetune.py", "--help"]
    shown = subprocess.run(command, cwd=FINETUNE, check=True, capture_output=True, text=True)
    assert "--tune_embed_tokens" in shown.stdout


@pytest.mark.slow  # quickstart.sh runs them too
def test_tiny_checkpoints_and_sample_task_are_commands(tmp_path):
    tiny = [sys.executable, "-m", "finetune.minicpmv.tiny", "--model", "minicpm-v-2", "--output", str(tmp_path / "m")]
    subprocess.run(tiny, cwd=ROOT, check=True, capture_output=True)
    assert sum(file.stat().st_size for file in (tmp_path / "m").iterdir()) < 10e6
    again = subprocess.run(tiny, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr
    task = [
        sys.executable,
        "finetune/sample_task.py",
        "--output",
        str(tmp_path / "t"),
        "--train",
        "4",
        "--held_out",
        "2",
    ]
    subprocess.run(task, cwd=ROOT, check=True, capture_output=True)
    assert len(json.loads((tmp_path / "t" / "train.json").read_text())) == 4
    assert len(list((tmp_path / "t" / "images").iterdir())) == 6


def test_loss_picture(tmp_path):
    history = [{"step": n, "loss": 1 / n, "learning_rate": 1e-4, "grad_norm": 1.0} for n in range(1, 5)]
    plot_history([*history, {"step": 4, "eval_loss": 0.5}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_no_word_of_a_path_of_this_machine():
    for file in [ROOT / "README.md", *FINETUNE.rglob("*.py"), *FINETUNE.glob("*.sh"), *TESTS.glob("*.py")]:
        assert str(ROOT) not in file.read_text(), file


def test_the_default_length_fits_the_model(given, tiny, tmp_path):
    """--model_max_length; only what is given can be too much."""
    for positions in (256, 1024, 4096):
        model = shutil.copytree(tiny["llama3"], tmp_path / str(positions))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        (_, _, training, _), problems = given("--model_name_or_path", model)
        assert problems == [] and training.model_max_length == min(2048, positions)
        (_, _, training, _), problems = given("--model_name_or_path", model, "--model_max_length", 200)
        assert problems == [] and training.model_max_length == 200
        _, problems = given("--model_name_or_path", model, "--model-max-length", positions + 1)
        assert len(problems) == 1 and f"--model_max_length {positions + 1}: " in problems[0]


@pytest.mark.parametrize("script", ["finetune_lora.sh", "finetune_ds.sh"])
def test_launchers_leave_the_length_to_its_default(script, tmp_path):
    """Which fits the model."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && { echo 1; exit 0; }\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    words = launch(script, cwd=tmp_path, VIRTUAL_ENV=tmp_path, MODEL="m", DATA="d.json").stdout.splitlines()
    assert "--num_train_epochs" in words and "--model_max_length" not in words
