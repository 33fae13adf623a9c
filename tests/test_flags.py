"""The flags of transformers.TrainingArguments: each works, changes nothing, is passed on or is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PATIENCE, ROOT, TESTS, launch, losses, outcome

from finetune import finetune
from finetune.arguments import LoraArguments, TrainingArguments
from finetune.deepspeed_file import GATHER, saving_models
from finetune.flags import FLAGS, PASSED_ON, RANGES, REFUSED, WITHOUT_EFFECT, WORK, wrong_values
from finetune.minicpmv import MiniCPMV
from finetune.trainer import CPMTrainer

SHIPPED = ROOT / "finetune" / "ds_config_zero2.json"
EVALUATES = "--eval_data_path {data} --eval_strategy steps --eval_steps 1"


@pytest.fixture
def run(tiny, data_file, tmp_path, capsys) -> Callable[..., tuple[int, list[str]]]:
    """Two steps of the 2.5 checkpoint with these flags, in this process."""
    base = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", tmp_path / "out"]
    base += "--report_to none --dataloader_num_workers 0 --max_steps 2 --logging_steps 1 --save_strategy no".split()

    def call(flags: str) -> tuple[int, list[str]]:
        return outcome(finetune.train, [*base, *shlex.split(flags.format(data=data_file))], capsys)

    return call


@pytest.fixture
def refusals(run, monkeypatch) -> Callable[[str], list[str]]:
    """What is said of flags that cannot work, before weights load."""
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))

    def call(flags: str) -> list[str]:
        status, lines = run(flags)
        assert status == 1 and "These settings cannot work:" in lines, lines
        return lines[lines.index("These settings cannot work:") + 1 :]

    return call


def test_every_flag_of_transformers_is_in_the_table():
    """Once. A flag that a new version brings is to be tried, and put into the table."""
    classes = [*WORK.split(), *WITHOUT_EFFECT, *PASSED_ON, *REFUSED]
    both = {"label_names", "train_sampling_strategy"}  # work, but for some values
    assert {name for name in classes if classes.count(name) > 1} == both
    assert {field.name for field in fields(transformers.TrainingArguments) if field.init} - FLAGS == set()


def test_every_flag_that_works_is_in_a_test():
    """Or in a launcher, which tests run."""
    files = [*TESTS.glob("*.py"), *(ROOT / "finetune").glob("*.sh")]
    text = "".join(file.read_text() for file in files)
    spelled = {"activation_checkpointing_kwargs"}  # put together in test_command_line.py
    assert {name for name in WORK.split() if not re.search(rf"\b{name}\b", text)} - spelled == set()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_numbers_out_of_range(value):
    """Every flag that takes a number has a range, and none has these in it."""
    numbers = {
        field.name
        for group in (TrainingArguments, LoraArguments)
        for field in fields(group)
        if any(kind in str(field.type) for kind in ("int", "float")) and "interval" not in str(field.type).lower()
    }
    assert numbers - RANGES.keys() - {"local_rank", "label_smoothing_factor"} == set()
    plain = {"do_train": True, "do_eval": False, "optim_args": None, "evaluation_strategy": None}
    strategies = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "steps")
    found = wrong_values(Namespace(**plain, **strategies, **dict.fromkeys(RANGES, value)), [])
    taken = {"max_steps"} if value == -1 else set()
    assert {problem.flag for problem in found} == RANGES.keys() - taken


def test_all_wrong_flags_are_reported_together(refusals):
    lines = refusals(
        "--adam_beta1 1.5 --logging_steps nan --seed -1 --optim some --tf32 true --lr_scheduler_kwargs nonsense "
        "--fsdp full_shard --enable_jit_checkpoint true --do_train false --use_lora true --tune_llm true "
        "--load_best_model_at_end true --accelerator_config nowhere.json --push_to_hub true --no_such_flag 1"
    )
    for flag in "adam_beta1 logging_steps seed optim lr_scheduler_kwargs fsdp enable_jit_checkpoint do_train".split():
        assert [line for line in lines if line.startswith(f"--{flag} ")], flag
    for flag in "tf32 use_lora load_best_model_at_end accelerator_config push_to_hub no_such_flag".split():
        assert [line for line in lines if line.startswith(f"--{flag}")], flag


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--fsdp full_shard", "FSDP is not supported: parameters are divided over GPUs by DeepSpeed's ZeRO-3"),
        ("--fsdp_config '{{\"a\": 1}}'", "--fsdp_config"),
        ("--parallelism_config some", "--parallelism_config some: is not supported"),
        ("--liger_kernel_config some", "--liger_kernel_config some: which of its kernels"),
        ("--eval_on_start true", "--eval_on_start true needs --eval_data_path"),
        ("--enable_jit_checkpoint true", "SIGTERM and Ctrl-C save a checkpoint here without it"),
        ("--torch_compile true", "are not made for torch.compile"),
        ("--torch_compile_mode default", "are not made for torch.compile"),
        ("--bf16_full_eval true", "computes as the training does"),
        ("--auto_find_batch_size true", "says what to give instead"),
        ("--average_tokens_across_devices false", "mean over the tokens of all processes"),
        ("--no_average_tokens_across_devices", "mean over the tokens of all processes"),
        ("--label_names some", "--label_names some: "),
        ("--do_predict true", "evaluate.py writes answers"),
        ("--do_train false --do_eval true", "python finetune/evaluate.py --model"),
        ("--do_eval true", "--do_eval true needs --eval_data_path, and --eval_strategy"),
        ("--do_eval true --eval_strategy epoch", "--eval_strategy epoch needs --eval_data_path"),
        ("--do_eval true --eval_data_path {data}", "--do_eval true needs --eval_data_path, and --eval_strategy"),
        (f"--do_eval false {EVALUATES}", "--do_eval false with --eval_strategy steps: leave one of them out"),
        ("--save_strategy best", "--save_strategy best needs --eval_data_path"),
        ("--load_best_model_at_end true", "--load_best_model_at_end true needs --eval_data_path"),
        ("--greater_is_better true", "--greater_is_better true needs a choice: --load_best_model_at_end true"),
        (f"{EVALUATES} --greater_is_better false", "--greater_is_better false needs a choice"),
        ("--metric_for_best_model loss", "--metric_for_best_model loss needs --eval_data_path, and --eval_strategy"),
        (f"{EVALUATES} --save_strategy best --greater_is_better true", "the least loss is the best"),
        (
            f"{EVALUATES} --save_strategy best --greater_is_better false --predict_with_generate true "
            "--metric_for_best_model anls",
            "the greatest anls is the best",
        ),
        (
            f"{EVALUATES} --save_strategy steps --save_steps 3 --eval_steps 2 --load_best_model_at_end true",
            "not a round multiple of 2",
        ),
        (
            f"{EVALUATES} --save_strategy steps --save_steps 1 --save_only_model true --load_best_model_at_end true "
            f"--deepspeed {SHIPPED}",
            "leave one of them out",
        ),
        ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
        ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
        ("--lr_scheduler_type polynomial --learning_rate 1e-9", "must be smaller than initial lr"),
        ("--lr_scheduler_kwargs '{{\"some\": 1}}'", 'cosine --lr_scheduler_kwargs {"some": 1}: '),
        ("--lr_scheduler_kwargs '{{\"num_cycles\": \"x\"}}'", '--lr_scheduler_kwargs {"num_cycles": "x"}: '),
        ("--lr_scheduler_kwargs '{{\"some\"'", "cannot be taken: Expecting ':'"),
        ("--lr_scheduler_type constant --lr_scheduler_kwargs '{{\"a\": 1}}'", "this schedule takes none"),
        ("--optim_args momentum", "expected NAME=VALUE"),
        ("--optim_args some=1", "this optimizer takes no some"),
        ("--optim adafactor --optim_args scale_parameter=False", "this optimizer takes no scale_parameter"),
        ("--optim sgd --optim_args momentum=0.5,nestrov=true", "this optimizer takes no nestrov; leave it out"),
        ("--optim sgd --optim_args momentum=half", "could not convert string to float: 'half'"),
        ("--gradient_checkpointing true --gradient_checkpointing_kwargs '{{\"a\": 1}}'", "cannot be taken: "),
        ("--gradient_checkpointing_kwargs some", "expected JSON like"),
        ("--accelerator_config '{{\"split_batches\": true}}'", "deals out the samples itself"),
        ("--accelerator_config '{{\"some\": true}}'", "cannot be taken: "),
        ("--accelerator_config {data}", "expected a JSON object"),
        ("--dataloader_persistent_workers true", "needs --dataloader_num_workers 1 or more"),
        ("--dataloader_multiprocessing_context fork", "needs --dataloader_num_workers 1 or more"),
        ("--push_to_hub true", "--push_to_hub true: HF_HUB_OFFLINE is set"),
        ("--max_steps 0", "1 or more, or -1 for the steps of --num_train_epochs"),
        ("--save_strategy steps --save_steps 1.5", "a number of steps, 1 or more, or a part of all steps"),
    ],
)  # fmt: skip
def test_what_is_refused(refusals, flags, said):
    lines = refusals(flags)
    assert len(lines) == 1 and said in lines[0], lines


def test_the_trainer_alone_refuses_too(tiny, tmp_path):
    """As in a notebook, with transformers' own arguments."""
    args = transformers.TrainingArguments(tmp_path, enable_jit_checkpoint=True, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="enable_jit_checkpoint: SIGTERM and Ctrl-C save a checkpoint"):
        CPMTrainer(model=MiniCPMV.from_pretrained(tiny["llama3"]), args=args)


def test_numbers_of_steps_that_are_not_used_may_be_anything(run):
    status, lines = run("--save_steps -1 --eval_steps 0 --logging_strategy epoch --logging_steps 0 --do_eval false")
    assert status == 0, lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "differ: ds train_micro_batch_size_per_gpu=4 vs hf per_device_train"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: found 7, expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "some": 1}}, "DeepSpeed refuses the file"),
        ({"tensor_parallel": {"autotp_size": 2}}, '"tensor_parallel" is not supported'),
        ({"sequence_parallel_size": 2}, '"sequence_parallel_size" is not supported'),
        ({"zero_optimization": None}, "zero_optimization: found null, expected an object"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage: found "2", expected 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'offload_optimizer: found "cpu", expected'),
        ({"zero_optimization": {"stage": 3, "offload_param": ["cpu"]}}, 'offload_param: found ["cpu"], expected'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "DeepSpeed refuses the file"),
        ({"optimizer": "AdamW"}, 'optimizer: found "AdamW", expected an object'),
        ({"optimizer": None}, "optimizer: found null, expected an object"),
        ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params: found null, expected an object"),
        ({"optimizer": {"params": {}}}, 'the "optimizer" block has no type'),
        ({"fp16": True}, "fp16: found true, expected an object"),
        ({"bf16": "auto"}, 'bf16: found "auto", expected an object'),
        ({"optimizer": {"type": "AdamW"}}, 'the "optimizer" block of the DeepSpeed file would replace it'),
    ],
)
def test_a_deepspeed_file_that_does_not_fit(refusals, tmp_path, content, said):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**json.loads(SHIPPED.read_text()), **content}))
    lines = refusals(f"--deepspeed {file} --optim adamw_torch")
    assert len(lines) == 1 and said in lines[0], lines


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"type": "Some"}, 'the type of its "optimizer", Some, is neither'),
        ({"type": "lr_scheduler"}, 'the type of its "optimizer", lr_scheduler, is neither'),
        ({"type": "AdamW", "params": {"some": 1}}, "unexpected keyword argument 'some'"),
        ({"type": "AdamW", "params": {"torch_adam": True, "bias_correction": True}}, "bias_correction"),
        ({"type": "SGD", "params": {"momentum": -1}}, "Invalid momentum value"),
    ],
)
def test_an_optimizer_that_deepspeed_would_refuse(refusals, tmp_path, block, said):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**json.loads(SHIPPED.read_text()), "optimizer": block}))
    lines = refusals(f"--deepspeed {file}")
    assert len(lines) == 1 and "DeepSpeed refuses the file" in lines[0] and said in lines[0], lines


@pytest.mark.parametrize("said", [{}, {GATHER: False}, {GATHER: None}, {GATHER: "auto"}])
def test_weights_are_gathered_to_be_saved(said, caplog):
    assert saving_models({"zero_optimization": {"stage": 3, **said}}) == {
        "zero_optimization": {"stage": 3, GATHER: True}
    }
    assert f'lacks "{GATHER}"' in caplog.text
    for config in ({}, {"zero_optimization": {"stage": 3, GATHER: True}}, {"zero_optimization": {"stage": 2, **said}}):
        assert saving_models(config) is config


@pytest.mark.slow
def test_the_optimizer_of_a_deepspeed_file(tiny, data_file, tmp_path):
    """With ZeRO-2, whose parameter groups are otherwise made here."""
    file = tmp_path / "ds.json"
    block = {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto"}}
    file.write_text(json.dumps({**json.loads(SHIPPED.read_text()), "optimizer": block}))
    variables = {"MODEL": tiny["llama3"], "DATA": data_file, "OUTPUT_DIR": tmp_path / "out", "GPUS_PER_NODE": 1}
    flags = ("--max_steps", "2", "--logging_steps", "1", "--report_to", "none")
    launch("finetune_lora.sh", *flags, timeout=PATIENCE, DS_CONFIG=file, **variables)
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism_config is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "name the DeepSpeed file with --deepspeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile; unset it"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "this run's precision is no; give --bf16 true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "give --gradient_accumulation_steps 4"),
    ],
)
def test_what_accelerate_launch_asks_for_is_not_ignored(refusals, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    lines = refusals("")
    assert len(lines) == 1 and variable in lines[0] and said in lines[0], lines


def test_plain_accelerate_launch_is_no_problem(run, monkeypatch):
    """With what it sets where nothing is asked for, or the same as by flags."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert run("--bf16 true --gradient_accumulation_steps 2")[0] == 0


def test_the_hub_is_asked_before_training_and_only_then(refusals, monkeypatch):
    asked = []
    monkeypatch.setattr("finetune.flags.whoami", lambda token: asked.append(token) or 1 / 0)
    monkeypatch.setattr("finetune.flags.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("finetune.flags.get_token", lambda: None)
    [line] = refusals("--push_to_hub true")
    assert "there is no token" in line and not asked
    [line] = refusals("--push_to_hub true --hub_token mine")
    assert "the hub cannot be used: division by zero" in line and asked == ["mine"]
    refusals("--hub_token mine --max_steps 0")
    assert asked == ["mine"]


@pytest.mark.parametrize(
    ("flags", "evaluations"),
    [
        # of the optimizer, its course, and what is done around a step
        ("--optim adafactor --learning_rate 1e-3 --max_grad_norm 0 --seed 7 "
         "--data_seed 3 --torch_empty_cache_steps 1 --full_determinism true --neftune_noise_alpha 5 "
         "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{{\"min_lr_rate\": 0.1}}' --warmup_steps 1 "
         "--debug underflow_overflow --skip_memory_metrics false --logging_nan_inf_filter true", 0),
        # of evaluations, and those that change nothing
        (f"{EVALUATES} --eval_on_start true --eval_delay 1 --prediction_loss_only false --include_for_metrics inputs "
         "--batch_eval_metrics true --eval_do_concat_batches false --eval_use_gather_object true "
         "--eval_accumulation_steps 1 --per_device_eval_batch_size 3 --save_strategy best --save_only_model true "
         "--do_train true --do_eval true", 3),
        (f"{EVALUATES} --lr_scheduler_type reduce_lr_on_plateau --save_strategy steps --save_steps 1 --do_train "
         "--load_best_model_at_end true --save_total_limit 1 --save_on_each_node true --use_cache true "
         "--optim sgd --optim_args momentum=0,nesterov=false", 2),  # values that it has by itself
        # of loaders and logs
        ("--dataloader_num_workers 1 --dataloader_prefetch_factor 1 --dataloader_persistent_workers false "
         "--dataloader_multiprocessing_context fork --dataloader_drop_last true --dataloader_in_order true "
         "--train_sampling_strategy sequential --log_level error --log_level_replica error --log_on_each_node false "
         "--logging_first_step true --disable_tqdm true --include_num_input_tokens_seen true --use_cpu true "
         "--accelerator_config '{{\"non_blocking\": false}}' --label_names labels --length_column_name some "
         "--adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-6 --weight_decay 0.1", 0),
    ],
)  # fmt: skip
def test_what_works(run, tmp_path, monkeypatch, flags, evaluations):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # --full_determinism writes there
    verbosity = transformers.logging.get_verbosity()
    try:
        status, lines = run(flags)
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert status == 0, lines
    assert len(losses(tmp_path / "out")) == 2
    history = json.loads(Path(tmp_path, "out", "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in history) == evaluations
