"""The extensions that DeepSpeed compiles at a first run, for minutes and without a word: said before, and what would
stop or hang the build is found before weights load."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from transformers import TrainingArguments

from finetune.errors import is_main_of_node

logger = logging.getLogger("finetune")

LOCK = "lock"
QUIET = 600.0  # seconds without a change after which a build that may be another machine's is over
QUIET_HERE = 10.0  # likewise, where all who build are processes that can be seen; they leave the folder for moments
LOOK_EVERY = 0.5  # seconds
OWN_DISKS = ("overlay", "tmpfs")  # of a container, which no other has
MACHINES_DISKS = ("ext4", "xfs", "ext3", "ext2", "f2fs")
FIRST_NAMESPACE = "pid:[4026531836]"  # <linux/proc_ns.h>: outside of containers, where all processes are seen


def needed_extensions(config: Mapping, on_cpu: bool) -> list[str]:
    """Names of the extensions that DeepSpeed (0.19.8) loads with a configuration.

    Args:
        on_cpu: the run is on CPUs, where processes talk through shared memory.
    """
    zero = config.get("zero_optimization", {})
    places = [(zero.get(part) or {}).get("device", "none") for part in ("offload_optimizer", "offload_param")]
    block = config.get("optimizer") or {}
    adam = str(block.get("type", "")).lower() in ("adam", "adamw") and not block.get("params", {}).get("torch_adam")
    forced = not block and config.get("zero_force_ds_cpu_optimizer", True)
    names = ["deepspeed_shm_comm"] if on_cpu and sys.platform == "linux" else []
    if places[0] != "none" and (adam or forced):
        names.append("cpu_adam")
    elif adam:
        names.append("fused_adam")
    return [*names, *(["async_io"] if "nvme" in places else [])]


def _unbuilt(args: TrainingArguments) -> dict[str, Path]:
    """Folders of the extensions that this run will compile, by name."""
    if not args.deepspeed:
        return {}
    # Only where DeepSpeed runs anyway: the imports are slow. A private name, since PyTorch (2.14) says in no other way
    # where it builds; to go when it does.
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    names = needed_extensions(args.hf_deepspeed_config.config, get_accelerator().device_name() == "cpu")
    folders = {name: Path(_get_build_directory(name, verbose=False)) for name in names if not installed_ops.get(name)}
    return {name: folder for name, folder in folders.items() if _is_locked(folder) or not _library(folder).is_file()}


def _library(folder: Path) -> Path:
    return folder / f"{folder.name}.so"


def build_problems(args: TrainingArguments) -> list[str]:
    """Why an extension could not be compiled, or would be waited for in vain, one line each."""
    if not args.deepspeed:
        return []
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    try:
        folders = _unbuilt(args)
    except OSError as error:
        return [f"DeepSpeed cannot compile its extensions: {error}; set TORCH_EXTENSIONS_DIR to a folder of yours"]
    problems = [
        f"{folder / LOCK}: DeepSpeed waits for ever for the build of {name} that this file stands for, which was "
        "killed: no process works on it, and nothing changes in its folder. Remove the file"
        for name, folder in folders.items()
        if _is_locked(folder) and _is_abandoned(name, folder)
    ]
    missing = [name for name, folder in folders.items() if not _library(folder).is_file()]
    if missing and not is_ninja_available():
        problems.append(f"DeepSpeed must compile {', '.join(missing)}, and ninja is missing (pip install ninja)")
    compiler = get_cxx_compiler()
    if missing and not shutil.which((shlex.split(compiler) or [""])[0]):
        problems.append(
            f"DeepSpeed must compile {', '.join(missing)}, and there is no C++ compiler {compiler}: install one (g++), "
            "or name it in CXX"
        )
    return problems


def say_builds(args: TrainingArguments) -> None:
    """Tell of what will be compiled."""
    for name, folder in _unbuilt(args).items():
        if is_main_of_node():
            logger.warning(
                "DeepSpeed compiles its extension %s in %s, once: this takes some minutes, or waits for a run that is "
                "at it",
                *(name, folder),
            )


def _is_locked(folder: Path) -> bool:
    """Whether PyTorch would wait as long as the lock's file is there. From 2.14 on it locks the file, and what a killed
    build leaves stands for nothing. Told by a name of theirs, since there is no other sign."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton") and (folder / LOCK).exists()


def _is_abandoned(name: str, folder: Path) -> bool:
    """Waits for the end of the build that a lock stands for, or until nobody can be at it any more: no process of this
    machine is in the folder, as ninja and its compilers are, and nothing has changed there for some time, which is long
    where processes may build that cannot be seen."""
    quiet = QUIET_HERE if _is_ours_alone(folder) else QUIET
    said, seen, since = False, None, time.monotonic()
    while _is_locked(folder):
        changed = _changed(folder)
        if changed != seen or _is_worked_in(folder):
            seen, since = changed, time.monotonic()
        if time.monotonic() - since >= quiet or (time.time() - changed >= QUIET and not _is_worked_in(folder)):
            return True
        if not said and is_main_of_node():
            logger.warning("%s is there: waiting for another run that compiles %s", folder / LOCK, name)
        said = True
        time.sleep(LOOK_EVERY)
    return False


def _changed(folder: Path) -> float:
    """When something in a folder last changed, as its files say."""
    times = [0.0]
    for path in [folder, *folder.glob("*")]:
        with suppress(OSError):  # gone meanwhile
            times.append(path.stat().st_mtime)
    return max(times)


def _is_worked_in(folder: Path) -> bool:
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # of other users, or gone
            if place.samefile(folder):
                return True
    return False


def _is_ours_alone(folder: Path) -> bool:
    """Whether whoever works in a folder is a process that is seen here: its disk is no other machine's, nor that of
    another container, as far as can be told."""
    disk = folder.stat().st_dev
    device = f"{os.major(disk)}:{os.minor(disk)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        outside = str(Path("/proc/self/ns/pid").readlink()) == FIRST_NAMESPACE
    except OSError:  # no Linux
        return False
    kinds = {line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == device}
    return bool(kinds) and kinds <= {*OWN_DISKS, *(MACHINES_DISKS if outside else ())}
