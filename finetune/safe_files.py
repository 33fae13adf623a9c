"""Weights and checkpoints from somewhere else, loaded without running what lies in them.

PyTorch's files are pickles, and a pickle can name any function to be called when it is loaded. Here they may hold
tensors, plain values and a few harmless classes, as torch.load(weights_only=True) has it; all else is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PICKLES = ("**/*.pt", "**/*.pth", "**/*.bin", "**/.metadata")  # the last one of FSDP's shards, unpickled by PyTorch
# What checkpoints hold beside tensors and plain values: found by saving at every ZeRO stage (DeepSpeed 0.19.8), and in
# the random states that Trainer saves.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.dtypes.UInt32DType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
)
# Trainer writes its arguments beside every checkpoint; nothing here reads them.
ARGUMENTS_NAME, ARGUMENTS_PACKAGES = "training_args.bin", ("finetune", "transformers", "accelerate")


def code_in(folder: str | os.PathLike, *patterns: str) -> list[str]:
    """What is wrong with the PyTorch files of a folder, one line each: files that would run code when unpickled, or
    that cannot be read. They are looked at, not unpickled, and their tensors stay on the disk.

    Args:
        patterns: of the files, as for `Path.glob`; none: all files of `PICKLES`.
    """
    files = sorted({file for pattern in patterns or PICKLES for file in Path(folder).glob(pattern) if file.is_file()})
    return [problem for problem in map(_problem_of, files) if problem]


def _problem_of(path: Path) -> str | None:
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # of a damaged file, or a pickle of another kind: of many kinds
        return _problem_of_other(path, error)
    names -= {*DEEPSPEED_CLASSES, *NUMPY_NAMES}
    if path.name == ARGUMENTS_NAME:
        names = {name for name in names if name.partition(".")[0] not in ARGUMENTS_PACKAGES}
    if not names:
        return None
    return (
        f"{path}: would run code when it is loaded ({', '.join(sorted(names))}); expected tensors and plain values. "
        "Delete the file's folder and take its content from where you trust it"
    )


def _problem_of_other(path: Path, seen: Exception) -> str | None:
    """Of a file that is not laid out as torch.save does it today; PyTorch's earlier layout can only be tried."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return (
            f"{path}: is damaged, or is a pickle that could run code ({str(seen).splitlines()[0]:.200}); expected "
            "tensors and plain values. Delete the file's folder and take its content from where you trust it"
        )
    return None


@contextmanager
def no_code_from_files(deepspeed: bool) -> Iterator[None]:
    """Makes every torch.load refuse code, also those of DeepSpeed (0.19.8), which ask for the opposite when they load
    a checkpoint. To go when DeepSpeed loads with weights_only=True.

    Args:
        deepspeed: DeepSpeed's classes may be among what is loaded.
    """
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes() if deepspeed else []):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_classes() -> list[type]:
    import importlib  # only where DeepSpeed runs anyway: its import is slow

    places = [name.rpartition(".") for name in DEEPSPEED_CLASSES]
    return [getattr(importlib.import_module(module), name) for module, _, name in places]
