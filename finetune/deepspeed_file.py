"""What a DeepSpeed file says: that it can be read, that DeepSpeed takes it, and what a run could not do with it."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from finetune.errors import is_main_of_node
from finetune.flags import DIVIDED

logger = logging.getLogger("finetune")

GATHER = "stage3_gather_16bit_weights_on_model_save"
# Blocks that transformers, accelerate and this toolkit look into; True: null stands for none.
BLOCKS = {
    **dict.fromkeys(("zero_optimization", "optimizer", "optimizer.params", "fp16", "bf16", "checkpoint"), False),
    **dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param"), True),
}
ADAM = ("adam", "adamw")  # types that DeepSpeed has its own kinds of
OF_DEEPSPEEDS_ADAM = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")  # taken out before it is made


def content_problem(path: str) -> str | None:
    """Why a file is no DeepSpeed file of this toolkit, in one line that begins with its flag."""
    named = f"--deepspeed {path}"
    if not Path(path).is_file():
        return f"{named}: there is no such file"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{named}: is not valid JSON ({error})"
    except OSError as error:
        return f"{named}: cannot be read: {error.strerror or error}"
    if not isinstance(config, dict):
        return f"{named}: is no DeepSpeed configuration, which is an object with objects in it"
    for block, may_be_null in BLOCKS.items():
        value = _value(config, block, {})
        if not isinstance(value, dict) and not (value is None and may_be_null):
            return f"{named}: {block}: found {json.dumps(value):.100}, expected an object"
    stage = _value(config, "zero_optimization.stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        return f"{named}: zero_optimization.stage: found {json.dumps(stage):.100}, expected 0, 1, 2 or 3"
    if "optimizer" in config and not isinstance(config["optimizer"].get("type"), str):
        return f'{named}: the "optimizer" block has no type, the name of an optimizer; add it, or remove the block'
    if "scheduler" in config:
        return (
            f'{named}: has a "scheduler" block, which would replace --lr_scheduler_type and --warmup_ratio without a '
            "word; remove the block"
        )
    for block, size in (("tensor_parallel", "autotp_size"), ("sequence_parallel_size", None)):
        value = config.get(block)
        if (value.get(size, 0) if isinstance(value, dict) else value) not in (None, 0, 1):
            return f'{named}: "{block}" is not supported: {DIVIDED}; remove it'
    return None


def _value(config: Mapping, name: str, default: object) -> object:
    """What stands under a name with dots; the default where a part of it is missing, or no object."""
    value: object = config
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def saving_models(config: dict) -> dict:
    """The content of a DeepSpeed file, with ZeRO-3 so that weights are gathered and saved: its default is not to, and
    of "auto" accelerate makes the same. A warning says what is set."""
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") != 3 or zero.get(GATHER) not in (None, False, "auto"):
        return config
    if is_main_of_node():
        logger.warning('the DeepSpeed file lacks "%s": true, without which no model is saved: it is set', GATHER)
    return {**config, "zero_optimization": {**zero, GATHER: True}}


def setting_problems(args: TrainingArguments, model: nn.Module) -> list[str]:
    """What DeepSpeed, or transformers in its name, would refuse in the DeepSpeed file of a run, one line each.

    Args:
        args: of a file without a `content_problem`.
        model: without values; settings "auto" go by its configuration.
    """
    if not args.deepspeed:
        return []
    from deepspeed.runtime.config import DeepSpeedConfig  # only where DeepSpeed runs anyway: its import is slow

    filled = copy.deepcopy(args.hf_deepspeed_config)
    if filled.mismatches:
        flags = [" ".join(mismatch.strip(" -").split()) for mismatch in filled.mismatches]
        return [
            f'--deepspeed: the file (ds) and the flags (hf) differ: {flag}; write "auto" in the file' for flag in flags
        ]
    try:
        filled.trainer_config_finalize(args, model, num_training_steps=1)
        filled.config.pop("train_batch_size", None)  # of all processes, of which DeepSpeed does not know yet
        DeepSpeedConfig(filled.config)
        if "optimizer" in filled.config:
            _try_optimizer(filled.config["optimizer"], filled.is_offload())
    except Exception as error:  # pydantic's, DeepSpeed's own, and those of whatever a wrong value leads to
        return [f"--deepspeed: DeepSpeed refuses the file: {' '.join(str(error).split()):.300}"]
    return []


def _try_optimizer(block: Mapping, on_cpu: bool) -> None:
    """Makes the optimizer of a DeepSpeed file of one number, as far as that compiles no extension.

    Args:
        on_cpu: its state is offloaded.

    Raises:
        ValueError, TypeError: of settings that it does not take.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind, settings = block["type"], dict(block.get("params", {}))
    one = [torch.zeros(1, requires_grad=True)]
    if kind.lower() in ADAM:
        adam = torch.optim.AdamW if settings.get("torch_adam") else DeepSpeedCPUAdam if on_cpu else FusedAdam
        settings = {name: value for name, value in settings.items() if name not in OF_DEEPSPEEDS_ADAM}
        inspect.signature(adam).bind(one, **settings)  # its values are those of flags
    elif kind.lower() not in DEEPSPEED_OPTIMIZERS:  # whose settings are theirs
        found = getattr(torch.optim, kind, None)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise ValueError(f'the type of its "optimizer", {kind}, is neither DeepSpeed\'s nor of torch.optim')
        found(one, **settings)
