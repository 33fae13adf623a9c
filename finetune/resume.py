"""What of a checkpoint holds when a run goes on from it, and what the flags given now decide.

Weights, the optimizer's moments, the place in the data and in the schedule are the checkpoint's. Learning rates, the
schedule's form and length, and every other setting of the optimizer are those of the flags: Trainer would take over the
checkpoint's without a word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainerState, TrainingArguments

from finetune.errors import is_main_of_node
from finetune.loading import SETTINGS_NAME, read_record

logger = logging.getLogger("finetune")

OF_THE_STATE = ("params", "step")  # of a parameter group; some optimizers count their steps there
BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""schedules whose rate follows from the evaluations so far"""
OF_THE_CALL = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank")
"""flags that are no setting of the training"""


def settings_of_groups(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Rate, weight decay, betas and so on of each parameter group; no state."""
    return [
        {name: value for name, value in group.items() if name not in OF_THE_STATE} for group in optimizer.param_groups
    ]


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: object, asked: Sequence[Mapping]) -> None:
    """Put the settings of the flags in the place of those that a checkpoint has brought. The rate is that of the
    schedule at the step that it has reached, so that the next one learns as in an unbroken run with these flags.

    Args:
        scheduler: with the checkpoint's state loaded.
        asked: `settings_of_groups` before anything was loaded.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's around DeepSpeed's
    follows_metric = not isinstance(scheduler, LambdaLR)
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update({name: value for name, value in settings.items() if not (name == "lr" and follows_metric)})
    if follows_metric:  # the rate is what evaluations have made of it
        return
    scheduler.base_lrs = [settings["initial_lr"] for settings in asked]
    scheduler.last_epoch -= 1
    scheduler.step()


def recorded_flags(checkpoint: str | os.PathLike) -> dict:
    """Flags by name of the run that wrote a checkpoint, as far as its `training_settings.json` has them."""
    return flags_of(read_record(Path(checkpoint, SETTINGS_NAME)))


def flags_of(settings: Mapping) -> dict:
    """All flags of a run by name, as JSON has them; of an earlier version's settings those that are there.

    Args:
        settings: as in `training_settings.json`.
    """
    groups = settings.get("arguments")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    flags = {name: value for group in groups if isinstance(group, Mapping) for name, value in group.items()}
    return json.loads(json.dumps(flags, default=str))


def schedule_problems(before: Mapping, args: TrainingArguments) -> list[str]:
    """Flags of the schedule that a checkpoint's state leaves no way to obey, one line each.

    Args:
        before: the flags of the run that wrote the checkpoint.
    """
    then, rate, now = before.get("lr_scheduler_type"), before.get("learning_rate"), args.lr_scheduler_type
    if then not in (None, now) and (then in BY_METRIC or now in BY_METRIC):
        return [
            f"--lr_scheduler_type {SchedulerType(now).value}: the checkpoint's rate follows {then}, and one of them "
            f"goes by evaluations, the other by steps; go on with --lr_scheduler_type {then}"
        ]
    if now in BY_METRIC and rate not in (None, args.learning_rate):
        return [
            f"--learning_rate {args.learning_rate}: the checkpoint's rate is what {SchedulerType(now).value} has made "
            f"of {rate}; go on with --learning_rate {rate}"
        ]
    return []


def say_changes(before: Mapping, now: Mapping) -> None:
    """One line on each machine with the flags that are not those of the run so far; arguments: flags by name."""
    changed = [
        f"--{name} {now[name]} (was {value})"
        for name, value in before.items()
        if name in now and now[name] != value and name not in OF_THE_CALL
    ]
    if changed and is_main_of_node():
        logger.warning("the run goes on with other flags than it had: %s", ", ".join(changed))


def forget_best_of_another_metric(state: TrainerState, metric: str | None) -> None:
    """Drop the best evaluation so far where another metric chose it: its value cannot be compared.

    Args:
        state: with the history of the run so far.
        metric: name of the metric that chooses now, with or without eval_.
    """
    if state.best_metric is None or metric is None:
        return
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[name] for entry in state.log_history if name in entry and entry["step"] == state.best_global_step]
    if state.best_metric in values:
        return
    logger.warning(
        "the best checkpoint so far, of step %s, was chosen by another metric than %s: the choice begins anew",
        *(state.best_global_step, name),
    )
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
