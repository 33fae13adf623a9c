"""Every flag of transformers.TrainingArguments: what becomes of it here, and which of its values are refused.

`FLAGS` is the list. What is wrong with values is found before transformers sees them, which would stop at the first one
or, worse, train with it; what is wrong with several flags together, or with the environment, when all are resolved.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate.utils import str_to_bool
from huggingface_hub import constants, get_token, whoami
from torch.utils.checkpoint import checkpoint
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import AcceleratorConfig

from finetune.errors import shown
from finetune.metrics import METRICS

# Taken as transformers documents them; each is in a test that trains with it.
WORK = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha torch_empty_cache_steps logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context label_names train_sampling_strategy deepspeed debug skip_memory_metrics do_train
    do_eval resume_from_checkpoint
"""
# Accepted, since scripts pass them, though there is nothing here that they could change.
WITHOUT_EFFECT = {
    "prediction_loss_only": "an evaluation keeps no logits, those of the whole vocabulary would fill the memory",
    "include_for_metrics": "metrics are computed from answers, see --predict_with_generate",
    "batch_eval_metrics": "likewise",
    "eval_do_concat_batches": "an evaluation keeps no logits",
    "eval_accumulation_steps": "likewise",
    "eval_use_gather_object": "likewise",
    "use_cache": "training never keeps keys and values",
    "length_column_name": "lengths are counted from the samples",
    "local_rank": "torchrun says it in the environment",
}
# Given to transformers, torch or the reporting package as they are; no test of ours trains with them.
PASSED_ON = {
    "fp16": "needs a GPU",
    "tf32": "needs a GPU",
    "use_liger_kernel": "needs a GPU and its package",
    "dataloader_pin_memory": "needs a GPU",
    "dataloader_in_order": "false: batches as they come, so a resumed run is not the unbroken one",
    "ignore_data_skip": "true: a resumed run begins its epoch anew",
    "restore_callback_states_from_checkpoint": "for callbacks of your own",
    "optim_args": "for optimizers whose packages are not among the requirements; one that takes none says so",
    "optim_target_modules": "for optimizers whose packages are not among the requirements",
    "run_name": "for reporting packages",
    "project": "for trackio",
    "trackio_space_id": "likewise",
    "trackio_bucket_id": "likewise",
    "trackio_static_space_id": "likewise",
    "push_to_hub": "needs the hub",
    "hub_token": "likewise",
    "hub_private_repo": "likewise",
    "hub_model_id": "likewise",
    "hub_strategy": "likewise",
    "hub_always_push": "likewise",
    "hub_revision": "likewise",
    "ddp_find_unused_parameters": "for torch's DistributedDataParallel",
    "ddp_bucket_cap_mb": "likewise",
    "ddp_broadcast_buffers": "likewise",
    "ddp_static_graph": "likewise",
    "ddp_backend": "for torch.distributed",
    "ddp_timeout": "likewise",
}


class Refused(NamedTuple):
    """A flag of which only some values are taken."""

    taken: tuple
    why: str


DIVIDED = "parameters are divided over GPUs by DeepSpeed's ZeRO-3 (--deepspeed finetune/ds_config_zero3.json)"
COMPILED = "batches of changing shapes and gradient checkpointing are not made for torch.compile; leave it out"
AS_IN_TRAINING = "an evaluation while training computes as the training does (--bf16, --fp16); leave it out"
REFUSED = {
    "fsdp": Refused((None,), f"FSDP is not supported: {DIVIDED}; leave it out"),
    "fsdp_config": Refused((None,), f"FSDP is not supported: {DIVIDED}; leave it out"),
    "parallelism_config": Refused((None,), f"is not supported: {DIVIDED}; leave it out"),
    "enable_jit_checkpoint": Refused(
        (False,), "SIGTERM and Ctrl-C save a checkpoint here without it, at the end of the step; leave it out"
    ),
    "torch_compile": Refused((False,), COMPILED),
    "torch_compile_backend": Refused((None,), COMPILED),
    "torch_compile_mode": Refused((None,), COMPILED),
    "bf16_full_eval": Refused((False,), AS_IN_TRAINING),
    "fp16_full_eval": Refused((False,), AS_IN_TRAINING),
    "auto_find_batch_size": Refused(
        (False,), "the samples of a step would change while it trains; out of memory, a run says what to give instead"
    ),
    "average_tokens_across_devices": Refused(
        (True,), "the loss is the mean over the tokens of all processes; leave it out"
    ),
    "label_smoothing_factor": Refused((0,), "the loss is plain cross entropy over the answers; leave it out"),
    "remove_unused_columns": Refused((False,), "would empty every batch; leave it false"),
    "label_names": Refused((None, ["labels"]), "the labels of these batches are named labels; leave it out"),
    "train_sampling_strategy": Refused(
        ("random", "sequential", "group_by_length"), "would decode every picture; use group_by_length"
    ),
    "liger_kernel_config": Refused((None,), "which of its kernels fit these models is decided here; leave it out"),
    "do_predict": Refused((False,), "evaluate.py writes answers: --model OUTPUT_DIR --data_path DATA --output FOLDER"),
}
# Refused by the trainer itself, whatever program it is used in.
NOT_FOR_THE_TRAINER = ("fsdp", "enable_jit_checkpoint", "torch_compile", "label_smoothing_factor")
FLAGS = frozenset(WORK.split()) | WITHOUT_EFFECT.keys() | PASSED_ON.keys() | REFUSED.keys()


class Range(NamedTuple):
    """Numbers that a flag takes; never infinite ones, or what is no number."""

    holds: Callable[[float], bool]
    expected: str


AT_LEAST_ZERO = Range(lambda value: value >= 0, "0 or more")
AT_LEAST_ONE = Range(lambda value: value >= 1, "1 or more")
ABOVE_ZERO = Range(lambda value: value > 0, "more than 0")
PART = Range(lambda value: 0 <= value < 1, "0 to below 1")
STEPS = Range(
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
    "a number of steps, 1 or more, or a part of all steps, above 0 and below 1",
)
RANGES = {
    **dict.fromkeys(
        (
            *("learning_rate", "vision_learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"),
            *("neftune_noise_alpha", "dataloader_num_workers"),
        ),
        AT_LEAST_ZERO,
    ),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "batch_size"),
            *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"),
            *("ddp_bucket_cap_mb", "model_max_length", "max_bad_steps", "predict_samples", "predict_max_new_tokens"),
            *("lora_r", "lora_alpha"),
        ),
        AT_LEAST_ONE,
    ),
    **dict.fromkeys(("num_train_epochs", "adam_epsilon"), ABOVE_ZERO),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), PART),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), STEPS),
    **dict.fromkeys(
        ("seed", "data_seed"), Range(lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
    ),
    "warmup_ratio": Range(PART.holds, "a part of all steps, 0 to below 1"),
    "max_steps": Range(lambda value: value >= 1 or value == -1, "1 or more, or -1 for the steps of --num_train_epochs"),
    "save_total_limit": Range(AT_LEAST_ONE.holds, "1 or more; leave it out to keep every checkpoint"),
    "max_slice_nums": Range(AT_LEAST_ONE.holds, "1 (overview alone) or more"),
    "max_bad_fraction": Range(lambda value: 0 <= value <= 1, "a part of all samples, 0 to 1"),
}
CHOICES = {
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "evaluation_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
}
OBJECTS = (
    *("lr_scheduler_kwargs", "accelerator_config"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
OTHER_NAMES = {"batch_size": "per_device_train_batch_size", "evaluation_strategy": "eval_strategy"}
# `every_n_layers` and `offload` are transformers' own, the rest is torch's.
NOT_TORCHS = ("every_n_layers", "offload")
# Schedules whose rate follows from the evaluations so far.
BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
TAKES_NO_KWARGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
MADE_OF_MODEL = ("model", "params", "optimizer_dict")  # settings of optimizers that cannot be tried without its values
TRIED_STEPS = 100


class WrongValue(NamedTuple):
    """A flag to be left out, so that what else is wrong is found too."""

    flag: str
    problem: str


def wrong_values(values: Namespace, given: Collection[str]) -> Iterator[WrongValue]:
    """What is wrong with single flags, by name without the dashes.

    Args:
        values: of all flags, as they are parsed and before anything is made of them.
        given: names of flags on the command line, with their dashes.
    """
    for name, value in vars(values).items():
        if value is None:
            continue
        named = f"--{OTHER_NAMES.get(name, name)} {_shown(value)}"
        if name in REFUSED and value not in REFUSED[name].taken:
            yield WrongValue(name, f"{named}: {REFUSED[name].why}")
        elif name in RANGES and _counts(name, values) and not _within(value, RANGES[name]):
            yield WrongValue(name, f"{named}: expected {RANGES[name].expected}")
        elif name in CHOICES and value not in (choices := [choice.value for choice in CHOICES[name]]):
            yield WrongValue(name, f"{named}: expected one of {', '.join(choices)}")
        elif name in OBJECTS and (why := _object_problem(name, value)):
            yield WrongValue(name, f"{named}: {why}")
    if "--do_train" in given and not values.do_train:
        yield WrongValue(
            "do_train",
            "--do_train false: this program trains. To evaluate alone: python finetune/evaluate.py --model "
            f"{values.model_name_or_path} --data_path EVAL_DATA --output FOLDER",
        )
    elif "--do_eval" in given and (why := _evaluation_problem(values)):
        yield WrongValue("do_eval", why)
    if values.optim_args and not all("=" in part for part in values.optim_args.split(",")):
        yield WrongValue("optim_args", f"--optim_args {values.optim_args}: expected NAME=VALUE, several with commas")


def refusal(name: str) -> str | None:
    """Why a flag is not taken, whatever its value."""
    return REFUSED[name].why if name in REFUSED and REFUSED[name].taken == (None,) else None


def _counts(name: str, values: Namespace) -> bool:
    """Whether a number of steps is used: --save_steps -1 may stand beside --save_strategy no."""
    if RANGES[name] is not STEPS or math.isnan(getattr(values, name)):
        return True
    strategy = name.replace("_steps", "_strategy")
    if name == "eval_steps" and values.evaluation_strategy is not None:
        strategy = "evaluation_strategy"
    return getattr(values, strategy) == "steps"


def _within(value: float, wanted: Range) -> bool:
    return math.isfinite(value) and wanted.holds(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return shown(str(value), quotes=False)


def _evaluation_problem(values: Namespace) -> str | None:
    strategy = values.evaluation_strategy or values.eval_strategy
    if values.do_eval and strategy == "no":
        return (
            "--do_eval true needs --eval_data_path, and --eval_strategy steps or epoch, or nothing would be evaluated"
        )
    if not values.do_eval and strategy != "no":
        return f"--do_eval false with --eval_strategy {strategy}: leave one of them out"
    return None  # data that a strategy lacks are missed with or without the flag


def _object_problem(name: str, value: str) -> str | None:
    """What is wrong with the JSON of a flag, or of the file that it names."""
    try:
        if not value.startswith("{"):
            if name != "accelerator_config":
                return 'expected JSON like {"name": 1}'
            if not Path(value).is_file():
                return 'expected JSON like {"non_blocking": true}, or a file of it; there is no such file'
            value = Path(value).read_text(encoding="utf-8")
        content = json.loads(value)
        if not isinstance(content, dict):
            return "expected a JSON object"
        if name == "accelerator_config":
            return _accelerator_problem(content)
        if name.endswith("checkpointing_kwargs"):
            _try_checkpointing(content)
    except (OSError, ValueError, TypeError) as error:  # of json too
        return f"cannot be taken: {_one_line(error)}"
    return None


def _accelerator_problem(content: dict) -> str | None:
    asked, default = AcceleratorConfig(**content), AcceleratorConfig()
    changed = [name for name in content if name != "non_blocking" and getattr(asked, name) != getattr(default, name)]
    if not changed:
        return None
    return (
        f"{', '.join(changed)}: this toolkit deals out the samples itself, so that all processes learn from each once; "
        "leave it out"
    )


def _try_checkpointing(settings: dict) -> None:
    ours = {name: value for name, value in settings.items() if name not in NOT_TORCHS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that stand aside for this trial alone
        checkpoint(torch.sin, torch.ones(1, requires_grad=True), **{"use_reentrant": False, **ours})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def combination_problems(args: transformers.TrainingArguments, given: Collection[str]) -> list[str]:
    """What is wrong with several flags of transformers together, when all are resolved.

    Args:
        given: names of flags on the command line, with their dashes.
    """
    problems = []
    best, evaluates = args.metric_for_best_model, args.eval_strategy != IntervalStrategy.NO
    by_best = args.save_strategy == SaveStrategy.BEST
    if (args.load_best_model_at_end or by_best) and not evaluates:
        flag = "--save_strategy best" if by_best else "--load_best_model_at_end true"
        problems.append(f"{flag} needs --eval_data_path, and --eval_strategy steps or epoch")
    elif "--metric_for_best_model" in given and not evaluates:
        problems.append(f"--metric_for_best_model {best} needs --eval_data_path, and --eval_strategy steps or epoch")
    if args.eval_on_start and not evaluates:
        problems.append("--eval_on_start true needs --eval_data_path, and --eval_strategy steps or epoch")
    name = (best or "loss").removeprefix("eval_")
    if best is None and args.greater_is_better is not None:
        problems.append(
            f"--greater_is_better {_shown(args.greater_is_better)} needs a choice: --load_best_model_at_end true, "
            "--save_strategy best or --metric_for_best_model"
        )
    if best and name in ("loss", *METRICS) and args.greater_is_better != (name != "loss"):
        better = "least" if name == "loss" else "greatest"
        problems.append(f"--greater_is_better {_shown(args.greater_is_better)}: the {better} {name} is the best")
    if args.deepspeed and args.save_only_model and args.load_best_model_at_end:
        problems.append(
            "--save_only_model true with --load_best_model_at_end true: DeepSpeed loads the best model from a whole "
            "checkpoint; leave one of them out"
        )
    if "--optim" in given and "optimizer" in (args.deepspeed or {}):
        problems.append(
            f'--optim {args.optim.value}: the "optimizer" block of the DeepSpeed file would replace it; leave one of '
            "them out"
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        problems.append("--dataloader_persistent_workers true needs --dataloader_num_workers 1 or more")
    if args.dataloader_multiprocessing_context and not args.dataloader_num_workers:
        problems.append(
            f"--dataloader_multiprocessing_context {args.dataloader_multiprocessing_context} needs "
            "--dataloader_num_workers 1 or more"
        )
    return problems


def environment_problems(args: transformers.TrainingArguments) -> list[str]:
    """What `accelerate launch` asks for in the environment, and would get without a word, or not at all."""
    problems = []
    for what, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
        ("a parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ):
        if _is_on(variable):
            problems.append(f"{variable}={os.environ[variable]}: {what} is not supported: {DIVIDED}; unset it")
    if _is_on("ACCELERATE_USE_DEEPSPEED") and not args.deepspeed:
        problems.append("ACCELERATE_USE_DEEPSPEED is set: name the DeepSpeed file with --deepspeed, or unset it")
    if _is_on("ACCELERATE_USE_CPU") and not args.use_cpu:
        problems.append("ACCELERATE_USE_CPU is set: give --use_cpu true, or unset it")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no"):
        problems.append(f"ACCELERATE_DYNAMO_BACKEND={compiler}: {COMPILED.replace('leave it out', 'unset it')}")
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("", "no", precision):
        flag = f"give --{asked} true, or " if asked in ("bf16", "fp16") else ""
        problems.append(f"ACCELERATE_MIXED_PRECISION={asked}: this run's precision is {precision}; {flag}unset it")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps.isdecimal() and int(steps) not in (1, args.gradient_accumulation_steps):
        problems.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}: give --gradient_accumulation_steps {steps}, or unset it"
        )
    return problems


def _is_on(variable: str) -> bool:
    try:
        return bool(str_to_bool(os.environ.get(variable) or "false"))
    except ValueError:
        return True


def hub_problem(args: transformers.TrainingArguments) -> str | None:
    """Why the result could not be pushed to the hub, which is asked only where `--push_to_hub` is given."""
    if not args.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        return "--push_to_hub true: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave the flag out"
    if not (token := args.hub_token or get_token()):
        return "--push_to_hub true: there is no token; log in (hf auth login), set HF_TOKEN, or give --hub_token"
    if args.process_index != 0:  # one of them asks
        return None
    try:
        whoami(token)
    except Exception as error:  # of the network, of the hub and of the token, each of several libraries
        return f"--push_to_hub true: the hub cannot be used: {_one_line(error):.300}"
    return None


def optimizer_problem(args: transformers.TrainingArguments, model: torch.nn.Module) -> str | None:
    """Makes the optimizer of one number, as Trainer would of the model.

    Args:
        model: without values.
    """
    named = f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    try:
        kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not any(name in settings for name in MADE_OF_MODEL):
            kind([torch.zeros(1, requires_grad=True)], **settings)
        if unread := [name for name in _names_of(args.optim_args) if not _is_read(name, args, model)]:
            return f"{named}: this optimizer takes no {', '.join(unread)}; leave it out of --optim_args"
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, AssertionError) as error:
        return f"{named}: {_one_line(error)}"  # a package that it needs, among others
    return None


def _names_of(optim_args: str | None) -> list[str]:
    return [part.partition("=")[0].strip() for part in (optim_args or "").split(",") if part]


def _is_read(name: str, args: transformers.TrainingArguments, model: torch.nn.Module) -> bool:
    """Whether transformers looks at a setting of `--optim_args`: of two values, a number and none, one must make a
    difference, or be refused."""
    without = _optimizer_of(None, args, model)
    for value in ("1", "none"):
        try:
            if _optimizer_of(f"{name}={value}", args, model) != without:
                return True
        except (ValueError, TypeError, KeyError, AttributeError):
            return True
    return False


def _optimizer_of(optim_args: str | None, args: transformers.TrainingArguments, model: torch.nn.Module) -> tuple:
    given, args.optim_args = args.optim_args, optim_args
    try:
        return transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    finally:
        args.optim_args = given


def scheduler_problem(args: transformers.TrainingArguments) -> str | None:
    """Takes two steps of the learning rate's schedule, with an optimizer of one number."""
    kind, settings = args.lr_scheduler_type, args.lr_scheduler_kwargs
    named = f"--lr_scheduler_type {kind.value}" + (f" --lr_scheduler_kwargs {json.dumps(settings)}" if settings else "")
    if settings and kind in TAKES_NO_KWARGS:
        return f"{named}: this schedule takes none; leave --lr_scheduler_kwargs out"
    steps = args.max_steps if args.max_steps > 0 else TRIED_STEPS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run gives them too
            schedule = transformers.get_scheduler(
                kind, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=settings
            )
            for _ in range(2):
                optimizer.step()
                schedule.step(*([1.0] if kind in BY_METRIC else []))
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
        return f"{named}: {_one_line(error)}"
    return None
