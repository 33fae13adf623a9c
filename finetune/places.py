"""Where a program writes: that nothing it reads lies there, that it can be written, and that there is room."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames, SaveStrategy

ADAM = (
    OptimizerNames.ADAMW_TORCH,
    OptimizerNames.ADAMW_TORCH_FUSED,
    OptimizerNames.ADAMW_TORCH_XLA,
    OptimizerNames.ADAMW_TORCH_NPU_FUSED,
)
MOMENTS, MASTER = 2 * 4, 4  # bytes of a trained parameter: Adam's two averages; the float32 copy that DeepSpeed keeps


def at_home(path: str) -> str:
    """The path with `~` as the home; as it is, where that is nobody's."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path


def contains(outer: str | os.PathLike, inner: str | os.PathLike) -> bool:
    """Whether `inner` is `outer` or lies in it, links followed; neither needs to be there. A link that lies in `outer`
    lies in it, wherever it leads."""
    whole = Path(os.path.realpath(at_home(os.fspath(outer))))
    inner = Path(at_home(os.fspath(inner)))
    link = Path(os.path.realpath(inner.parent), inner.name)
    for place in (Path(os.path.realpath(inner)), link):
        # samefile: a folder may have several names without links, where disks are mounted twice or do not tell case
        if any(parent == whole or _same(parent, whole) for parent in (place, *place.parents)):
            return True
    return False


def _same(left: Path, right: Path) -> bool:
    try:
        return left.samefile(right)
    except OSError:  # one of them is not there, or cannot be looked at
        return False


def model_conflicts(
    flag: str, output: str | os.PathLike, models: Iterable[tuple[str, str | os.PathLike | None]], around: bool = True
) -> list[str]:
    """Where an output folder is that of a model which the call reads, or lies in it, one line each.

    Args:
        flag: of the output.
        models: flags with their folders; names on the hub lie nowhere.
        around: also where the model lies in the output folder.
    """
    problems = []
    for other, model in models:
        if not model or not os.path.exists(at_home(os.fspath(model))):
            continue
        inside, outside = contains(model, output), contains(output, model)
        if not inside and not (outside and around):
            continue
        how = "is the folder of" if inside and outside else "lies in the folder of" if inside else "holds"
        problems.append(
            f"{flag} {output}: {how} {other} {model}, which is read and must stay as it is; name another folder"
        )
    return problems


def data_conflicts(flag: str, output: str | os.PathLike, data: Iterable[tuple[str, str | os.PathLike]]) -> list[str]:
    """Where an output folder holds data that the call reads, files or folders, one line each."""
    return [
        f"{flag} {output}: holds the data of {other} {path}; name another folder"
        for other, path in data
        if os.path.exists(path) and contains(output, path)
    ]


def writing_problem(path: str | os.PathLike) -> str | None:
    """Why a folder cannot be made or written in, in words that follow its name; tried with a temporary file in it, or
    in the folder above that is there."""
    path = Path(at_home(os.fspath(path)))
    there = _nearest(path)
    below = "" if there == path.absolute() else f"lies below {there}, which "
    if there.is_symlink() and not os.path.exists(there):
        return f"{below}is a link to {there.readlink()}, where there is nothing; name another folder"
    if not there.is_dir():
        return f"{below}is a file; name a folder, new or empty"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".written_by_finetune_"):
            pass
    except OSError as error:
        return f"cannot be written: {there} takes no new files ({error.strerror or error}); name another folder"
    return None


def _nearest(path: Path) -> Path:
    """The path, or the nearest one above it, that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place) or place == place.parent)


def room_problem(path: str | os.PathLike, needed: int, for_what: str, advice: str = "") -> str | None:
    """Why a folder's disk has no room, in words that follow its name.

    Args:
        needed: bytes.
        for_what: needs them, for the message.
        advice: what else could be done than to make room.
    """
    free = shutil.disk_usage(_nearest(Path(at_home(os.fspath(path))))).free
    if free >= needed:
        return None
    return (
        f"{for_what} needs {size_text(needed)}, but {size_text(free)} are free there; make room, or name a folder on "
        f"another disk{advice}"
    )


def size_text(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def checkpoint_bytes(model: nn.Module, args: TrainingArguments, source: str | os.PathLike) -> tuple[int, int]:
    """What one checkpoint of a run takes on a machine's disk at least: bytes of the weights with the tokenizer's files,
    and of what only resuming needs: the optimizer's state and DeepSpeed's copies.

    Args:
        model: with what is trained set to require gradients; on any device.
        args: the toolkit's.
        source: checkpoint that training begins from.
    """
    half = args.compute_dtype != torch.float32

    def width(parameter: nn.Parameter) -> int:
        # Without DeepSpeed what is trained is float32.
        return 2 if half and (args.deepspeed or not parameter.requires_grad) else 4

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if args.use_lora else model.parameters()
    weights = sum(parameter.numel() * width(parameter) for parameter in saved)
    tokenizer = sum(file.stat().st_size for file in Path(source).glob("tokenizer*") if file.is_file())
    if args.save_only_model or args.save_strategy == SaveStrategy.NO:
        return weights + tokenizer, 0
    each = MOMENTS if _is_adam(args) else 0
    copies = 0
    if args.deepspeed:
        stage = (args.deepspeed.get("zero_optimization") or {}).get("stage", 0)
        each += MASTER if half or stage else 0
        copies = weights if stage < 3 else 0  # DeepSpeed writes the weights too, but where they are partitioned
    # DeepSpeed's processes write their parts of it, each on its own machine's disk, which may or may not be shared.
    machines = max(1, args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))
    parts = machines if args.deepspeed else 1
    state = sum(parameter.numel() for parameter in trained) * each // parts
    return weights + tokenizer, copies + state


def _is_adam(args: TrainingArguments) -> bool:
    own = (args.deepspeed or {}).get("optimizer")
    if own is not None:
        return str(own.get("type", "")).lower() in ("adam", "adamw")
    return args.optim in ADAM


def checkpoint_room_problem(model: nn.Module, args: TrainingArguments, source: str | os.PathLike) -> list[str]:
    """Whether the disk of `--output_dir` has room for one checkpoint; one line, or none. Arguments: see
    `checkpoint_bytes`."""
    weights, optimizer = checkpoint_bytes(model, args, source)
    what = f"one checkpoint ({size_text(weights)} of weights, {size_text(optimizer)} of the optimizer's state)"
    if not optimizer:
        what = "the result" if args.save_strategy == SaveStrategy.NO else "one checkpoint, its weights alone,"
    advice = ", or save less (--save_only_model true, which cannot be resumed from)" if optimizer else ""
    why = room_problem(args.output_dir, weights + optimizer, what, advice)
    return [f"--output_dir {args.output_dir}: {why}"] if why else []


def output_problems(
    flag: str,
    output: str | os.PathLike,
    models: Sequence[tuple[str, str | os.PathLike | None]],
    data: Sequence[tuple[str, str | os.PathLike]] = (),
    around: bool = True,
) -> list[str]:
    """All that is wrong with the place of an output folder, one line each; arguments: see `model_conflicts`."""
    conflicts = [*model_conflicts(flag, output, models, around), *data_conflicts(flag, output, data)]
    if conflicts:  # nor is writing tried there
        return conflicts
    why = writing_problem(output)
    return [f"{flag} {output}: {why}"] if why else []
