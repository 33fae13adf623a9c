"""What of a checkpoint holds when a run goes on from it, and what the flags given now decide.

Weights, the optimizer's moments, the place in the data and in the schedule are the checkpoint's. Learning rates, the
schedule's form and length, and every other setting of the optimizer are those of the flags: Trainer would take over the
checkpoint's without a word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainerState, TrainingArguments

from finetune.checkpoints import STATE, checkpoint_steps, fault
from finetune.errors import is_main_of_node, over_processes
from finetune.flags import BY_METRIC
from finetune.loading import SETTINGS_NAME, read_record

logger = logging.getLogger("finetune")

KERNELS = ("fused", "foreach", "capturable")  # ways to compute a step, which are settings of a parameter group too
OF_ALL = ("lr", "initial_lr", "weight_decay", *KERNELS)  # settings of every optimizer's groups
OF_THE_CALL = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank")
"""flags that are no setting of the training"""
OF_THE_MACHINE = ("bf16", "fp16")  # flags that are set by what it can, where they are not given
GIVEN = "flags_given"  # in training_settings.json: flags of the command line, with their dashes


def settings_of_groups(optimizer: torch.optim.Optimizer, names: Collection[str]) -> list[dict]:
    """Rate, weight decay, betas and so on of each parameter group; what else stands there is the optimizer's state.

    Args:
        names: settings that the flags give this kind of optimizer.
    """
    wanted = {*OF_ALL, *names}
    return [{name: value for name, value in group.items() if name in wanted} for group in optimizer.param_groups]


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
        _place_steps(optimizer, group)
    if follows_metric:  # the rate is what evaluations have made of it
        return
    scheduler.base_lrs = [settings["initial_lr"] for settings in asked]
    scheduler.last_epoch -= 1
    scheduler.step()


def _place_steps(optimizer: torch.optim.Optimizer, group: Mapping) -> None:
    """Put the step counts of a parameter group where its kernel reads them: PyTorch (2.14) goes by the checkpoint's
    kernel when it loads them, and its fused one ends in an error over counts on the CPU."""
    on_device = group.get("fused") or group.get("capturable")
    for parameter in group["params"]:
        count = optimizer.state.get(parameter, {}).get("step")
        if isinstance(count, torch.Tensor):
            optimizer.state[parameter]["step"] = count.to(parameter.device if on_device else "cpu", torch.float32)


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


def step_problem(step: int, last: int, args: TrainingArguments, checkpoint: str | os.PathLike) -> str | None:
    """Why a run cannot go on from a checkpoint of `step` when it is to end after step `last`."""
    if step <= last:
        return None
    epochs = f"--num_train_epochs {args.num_train_epochs:g} ({last} steps)"
    flag = f"--max_steps {last}" if args.max_steps > 0 else epochs
    return (
        f"{flag}: {checkpoint} is at step {step} already; give more, or the path of an earlier checkpoint "
        "(--resume_from_checkpoint)"
    )


def say_changes(before: Mapping, now: Mapping) -> None:
    """One line on each machine with the flags that are not those of the run so far: of those that were given to one of
    the runs, the others are defaults, which may be made to fit (lengths, loader processes).

    Args:
        before, now: as in `training_settings.json`; of an earlier version's, any flag may have been given.
    """
    old, new = flags_of(before), flags_of(now)
    given = {*old, *new}
    if GIVEN in before:
        given = {*OF_THE_MACHINE, *(flag.removeprefix("--") for flag in (*before[GIVEN], *now[GIVEN]))}
    changed = [
        _change(name, value, new[name])
        for name, value in old.items()
        if name in new and new[name] != value and name in given and name not in OF_THE_CALL
    ]
    if changed and is_main_of_node():
        logger.warning("the run goes on with other flags than it had: %s", ", ".join(changed))


def _change(name: str, then: object, now: object) -> str:
    if isinstance(then, Mapping) and isinstance(now, Mapping):  # the content of a DeepSpeed file
        return f"--{name} (another {', '.join(key for key in {**then, **now} if then.get(key) != now.get(key))})"
    return f"--{name} {now} (was {then})"


def find_best(state: TrainerState, args: TrainingArguments, checkpoint: str | os.PathLike) -> None:
    """Finds the best checkpoint of the run so far where it now is: beside the one that is gone on from, by its step. In
    the state stands a path, which is another's where the folder was moved or copied, and is not told from the folder's
    other checkpoints, of which some are removed, where it is spelled otherwise.

    Where it is not there, not whole, or was chosen by another metric, the best of those that are takes its place, which
    a warning says. All processes must call it.

    Args:
        state: of the checkpoint; what it says of the best is set.
        args: whose metric chooses from now on.
    """
    metric = args.metric_for_best_model and f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if metric is None:
        return
    parent = run_folder(checkpoint, args)
    folders = {step: Path(folder) for step, folder in checkpoint_steps(parent).items()}
    found = {entry["step"]: entry[metric] for entry in state.log_history if metric in entry}
    whole = {step for step in found if step in folders and fault(folders[step]) is None}
    usable = set.intersection(*over_processes(whole))
    step, value = state.best_global_step, state.best_metric
    recorded = state.best_model_checkpoint  # None where there is no such folder
    if step not in usable and all(over_processes(_is_best(recorded, step, value, metric))):
        folders[step] = Path(recorded)  # of a run that went on in another folder
        usable.add(step)
    # Without --load_best_model_at_end evaluations may come at steps that have no checkpoint.
    lost = args.load_best_model_at_end and step not in usable
    if lost or (step is not None and found.get(step) != value):
        choose = max if args.greater_is_better else min
        best = choose(sorted(usable), key=found.__getitem__, default=None)
        state.best_global_step, state.best_metric = best, found.get(best)
        if step is not None and is_main_of_node():
            why = f"is not in {parent}, or not whole" if found.get(step) == value else "was chosen by another metric"
            now = f"by {metric} it is that of step {best} now" if best else f"the choice by {metric} begins anew"
            logger.warning("the best checkpoint so far, of step %d, %s: %s", step, why, now)
    elif state.best_model_checkpoint is None and step in usable and is_main_of_node():
        logger.warning("the best checkpoint so far is %s", folders[step])
    best = state.best_global_step
    state.best_model_checkpoint = str(folders[best]) if best in usable else None


def _is_best(folder: str | None, step: int | None, value: float | None, metric: str) -> bool:
    """Whether a folder is the checkpoint of the best step: another run may have written one of the same name."""
    if folder is None or fault(Path(folder)) is not None:
        return False
    history = read_record(Path(folder, STATE)).get("log_history", ())
    return any(entry.get("step") == step and entry.get(metric) == value for entry in history)


def run_folder(checkpoint: str | os.PathLike, args: TrainingArguments) -> Path:
    """Where the checkpoints of the run so far are, spelled as `--output_dir` is, where it is that: by this spelling
    Trainer knows the one that it must not remove."""
    folder, output_dir = Path(checkpoint).absolute().parent, Path(args.output_dir)
    return output_dir if output_dir.is_dir() and output_dir.samefile(folder) else folder
