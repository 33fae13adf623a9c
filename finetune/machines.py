"""Runs over several machines (nodes): whether OUTPUT_DIR is one folder for all, and what that means for saving.

On a shared disk one process writes what is the same for all. On disks of their own every node writes all that it needs
to go on from there, DeepSpeed's and Trainer's files alike, and a complete result.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from finetune.arguments import TrainingArguments
from finetune.errors import UserError, is_main_of_node, nodes, over_processes

logger = logging.getLogger("finetune")

PATIENCE = 2.0  # seconds for a file of another node to appear on a shared disk


def say_threads() -> None:
    """Say in the environment how many threads this process has, or accelerate (1.15) would set and announce another
    number for processes that torchrun starts on CPUs."""
    if "LOCAL_RANK" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def output_is_shared(output_dir: str | os.PathLike) -> bool:
    """Whether `output_dir` is the same folder on all nodes; called by every process, with the same answer in each.

    The first process of each node writes a file of its own there, and looks for those of the others.

    Raises:
        UserError: in every process, when only some of the nodes share it, or some cannot write there.
    """
    if nodes() == 1:
        return True
    first = is_main_of_node()
    folder = Path(output_dir)
    (token, *_) = over_processes(uuid.uuid4().hex)
    mark = folder / f".node-{token}-{torch.distributed.get_rank()}"
    failure = None
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            failure = f"--output_dir {folder} on {os.uname().nodename}: cannot be written: {error.strerror}"
    written = over_processes((first, mark.name, failure))
    marks = [name for is_first, name, _ in written if is_first]
    seen = _waited_for(folder, marks) if first else None
    views = [view for view in over_processes(seen) if view is not None]
    if first and not failure:
        mark.unlink(missing_ok=True)
    if failures := [failure for _, _, failure in written if failure]:
        raise UserError("\n".join(failures))
    if all(len(view) == len(marks) for view in views):
        return True
    if all(len(view) == 1 for view in views):
        return False
    raise UserError(
        f"--output_dir {folder}: is one folder on some of the {len(views)} nodes and another on others; expected one "
        "on a disk that all nodes share, or one on each node's own disk"
    )


def _waited_for(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the files that are there, some of them after a moment."""
    end = time.monotonic() + PATIENCE
    while True:
        seen = [name for name in names if (folder / name).exists()]
        if len(seen) == len(names) or time.monotonic() > end:
            return seen
        time.sleep(0.1)


def save_where_all_can_read(args: TrainingArguments) -> None:
    """Settings of Trainer and DeepSpeed for the disks of this run; before the trainer is made.

    Raises:
        UserError: as `output_is_shared`.
    """
    count = nodes()
    if count == 1:
        return
    shared = output_is_shared(args.output_dir)
    args.save_on_each_node = not shared
    if args.deepspeed:
        args.hf_deepspeed_config.config.setdefault("checkpoint", {})["use_node_local_storage"] = not shared
    kind = "one folder for all: written once" if shared else "a folder on each node's own disk: written on each"
    logger.info("%d nodes; --output_dir %s is %s", count, args.output_dir, kind)


def end_together() -> None:
    """Wait for all processes, then take down what connects them: its threads, still alive when Python ends, can abort a
    process that has nothing left to do, and torchrun then stops the one that is still writing the result."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def write_on_each_node(model: nn.Module) -> None:
    """Let `save_pretrained` write where it is told that it is the main process: transformers (5.23) lets only the first
    process of the run write, though Trainer's `save_on_each_node` calls it on each node. To go when it does not."""
    model.should_save_on_this_rank = bool


def name_deepspeeds_step(folder: str | os.PathLike) -> None:
    """Write `latest`, without which DeepSpeed (0.19.8) loads nothing: it writes that file on the first node alone, also
    where every node has its own disk. To go when it does so by itself."""
    steps = [path.name for path in Path(folder).glob("global_step*") if path.is_dir()]
    if len(steps) == 1:
        Path(folder, "latest").write_text(steps[0], encoding="utf-8")


def whole_state_dict(engine, keep: bool, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """Tensors of a model that ZeRO-3 has partitioned, on the CPU; called by all processes of the run.

    DeepSpeed's own `_zero3_consolidated_16bit_state_dict` gives them to the first process of the run alone.

    Args:
        engine: DeepSpeed's, around the model.
        keep: this process wants them; the others get None.
        trained_only: leave out parameters that are not trained.
    """
    import deepspeed  # only where DeepSpeed runs anyway: its import is slow and may probe for compilers

    names = dict(engine.module.named_parameters(remove_duplicate=False))
    wanted = [name for name, parameter in names.items() if parameter.requires_grad or not trained_only]
    copies: dict[nn.Parameter, torch.Tensor] = {}  # tied parameters stay one tensor
    engine.optimizer.checkpoint_event_prologue()  # all parameters partitioned, as DeepSpeed has it when it saves
    for parameter in dict.fromkeys(names[name] for name in wanted):
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                copies[parameter] = parameter.detach().to("cpu", copy=True)
    engine.optimizer.checkpoint_event_epilogue()
    if not keep:
        return None
    buffers = {name: tensor.cpu() for name, tensor in engine.module.state_dict().items() if name not in names}
    return {**{name: copies[names[name]] for name in wanted}, **buffers}
