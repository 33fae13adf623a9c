"""Checkpoints that are complete or not there: written aside, looked over, renamed; and the newest complete one found.

OUTPUT_DIR/_incomplete/checkpoint-N    while it is written
OUTPUT_DIR/checkpoint-N                when all of it is on the disk; complete.json lists its files and their sizes

Trainer's upload to the hub leaves out names that begin with an underscore.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files

from finetune.errors import ProcessError, UserError, is_main_of_node, over_processes
from finetune.result_folder import lacking_in_result, replaced_by

logger = logging.getLogger("finetune")

ASIDE = "_incomplete"
MANIFEST = "complete.json"
STATE = "trainer_state.json"
PROCESSOR = "preprocessor_config.json"
NAMED = 4  # of what is moved, in its warning
OS_ERROR = "(os error "  # in the plain exceptions of libraries that are written in Rust, tokenizers among them
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # in the RuntimeErrors of torch.save


@contextmanager
def written_aside(
    folder: Path, writes: bool, into: bool = False, lacks: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """Yields a folder to write in; afterwards its files are checked, brought to the disk and put in the place of
    `folder`, which is thus whole or not there, wherever the run is killed. All processes must call it.

    Args:
        folder: what is to be written; a folder of this name, of an earlier run, is moved aside.
        writes: whether this process makes and moves the folder (one on each disk).
        into: `folder` stays, with what else it holds: the files go into it one by one, over those of the same names.
        lacks: names of what is not there and has to be.

    Raises:
        UserError: when writing fails, or not all was written; what was written is removed, older checkpoints stay as
            they are.
    """
    parent = folder if into else folder.parent
    aside = parent / ASIDE / folder.name
    with _failures(folder, aside, writes):
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        over_processes(None)
        yield aside
        over_processes(None)
        missing = lacks(aside) if writes and lacks is not None else []
        if everyones := sorted({name for of_process in over_processes(missing) for name in of_process}):
            if writes:
                shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"{folder} could not be saved: {', '.join(everyones)} were not written to {aside}, where Trainer was "
                "told to write; what was saved before stays as it was. Take a version of transformers that "
                "requirements.txt allows, and a Trainer that writes where _get_output_dir says"
            )
        problem = None
        if writes:
            try:
                write_manifest(aside)
            except (OSError, ValueError) as error:
                problem = error
        for found in over_processes(problem):
            if found is not None:
                raise _Agreed(str(found)) from found
        if writes:
            if into:
                (aside / MANIFEST).unlink()  # of a checkpoint, not of a folder that holds more
                _move_aside(replaced_by(folder, aside), folder)
                _move_files(aside, folder)
            else:
                if folder.exists():
                    _move_aside([folder], parent)
                os.replace(aside, folder)
            _flush(parent)
            with suppress(OSError):  # holds what is left of another save
                aside.parent.rmdir()


class _Agreed(OSError):
    """A failure that all processes know of."""


@contextmanager
def _failures(folder: Path, aside: Path, writes: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        torchs = isinstance(error, RuntimeError) and any(word in str(error) for word in TORCH_WRITER)
        if not (isinstance(error, OSError | SafetensorError) or torchs or OS_ERROR in str(error)):
            raise
        if writes:  # it would only take room
            shutil.rmtree(aside, ignore_errors=True)
        output_dir = aside.parent.parent
        free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
        before = newest_complete(output_dir)
        kept = f"the newest complete checkpoint is {before}" if before else "no checkpoint is complete yet"
        cause = f"torch.save could not write all of it ({error})" if torchs else str(error)
        kind = UserError if isinstance(error, _Agreed) else ProcessError
        raise kind(
            f"{folder} could not be saved: {cause}. {free / 2**20:,.0f} MiB are free there; {kept}. Make room (or "
            "lower --save_total_limit) and go on with --resume_from_checkpoint true"
        ) from error


def write_manifest(folder: Path, leave_out: Sequence[Path] = ()) -> None:
    """Check every file of a folder, bring it to the disk, and write `complete.json`.

    Weights get the mode that the user's umask gives to new files: safetensors makes them readable for the user alone.

    Args:
        leave_out: files that are not looked at, such as links to what was there before.

    Raises:
        ValueError: naming a file that is not whole.
        OSError: when the disk does not take it.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in leave_out)
    (folder / MANIFEST).touch()
    mode = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    sizes = {}
    for path in files:
        check_file(path)
        if path.suffix == ".safetensors":
            path.chmod(mode)
        _flush(path)
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps({"files": sizes}, indent=1) + "\n", encoding="utf-8")
    _flush(folder / MANIFEST)


def check_file(path: Path) -> None:
    """Whether a file has all that its own table of contents names; tensors are not read.

    Raises:
        ValueError: when it is cut off or no such file.
    """
    size = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, size)))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            if 8 + length + end != size:
                raise ValueError(f"has {size} bytes, expected {8 + length + end}")
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:  # its table of contents stands at its end
                if any(entry.header_offset + entry.file_size > size for entry in archive.infolist()):
                    raise ValueError("is cut off")
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not whole: {error}") from error


def lacking(folder: Path, resumable: bool = True) -> list[str]:
    """Names of what a checkpoint needs and has not.

    Args:
        resumable: with what only resuming needs (else as with `--save_only_model`).
    """
    names = [*lacking_in_result(folder), *([] if (folder / STATE).is_file() else [STATE])]
    if resumable:
        kind = optimizer_kind(folder)
        names += [] if kind else ["the optimizer's state"]
        # DeepSpeed has its own schedulers in its states
        names += ["scheduler.pt"] if kind == "plain" and not (folder / "scheduler.pt").is_file() else []
        names += [] if any(folder.glob("rng_state*.pth")) else ["rng_state.pth"]
    return names


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: it has all its files, of the size they were written with.

    Checkpoints of earlier versions of this toolkit have no `complete.json`; `trainer_state.json` was written last.
    """
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    try:
        sizes = {}
        if (folder / MANIFEST).is_file():
            sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
        for path in [folder / name for name in sizes] or folder.iterdir():
            if path.is_file():
                check_file(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def newest_complete(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint of a folder, on this process's disk; newer ones that are not are named in a
    warning."""
    found = checkpoint_steps(output_dir)
    return next((found[step] for step in sorted(found, reverse=True) if _usable(found[step])), None)


def newest_in_words(output_dir: str | os.PathLike) -> tuple[str, bool]:
    """The newest complete checkpoint for a message, and whether a command must begin anew: what `--save_only_model`
    saves cannot be resumed from."""
    newest = newest_complete(output_dir)
    if newest is None:
        return "there is no checkpoint", False
    found = f"the newest checkpoint is {newest}"
    if optimizer_kind(newest) is None:
        return f"{found}, which cannot be resumed from (--save_only_model): the command begins anew", True
    return found, False


def newest_everywhere(output_dir: str | os.PathLike, writes: bool) -> str | None:
    """The newest checkpoint that is complete for every process of the run, whose machines may have disks of their
    own; all processes must call it. One that a kill kept from its place, with all of it on the disk, is put there.

    Args:
        writes: whether this process may move folders (one on each disk).

    Raises:
        UserError: in all of them, when each machine has one, but none that all have, or when a folder cannot be moved.
    """
    problem = None
    if writes:
        try:
            _put_in_place(Path(output_dir))
        except OSError as error:
            problem = f"--resume_from_checkpoint: a checkpoint that was saved whole cannot be put in its place: {error}"
    for why in filter(None, over_processes(problem)):
        raise UserError(why)
    found = checkpoint_steps(output_dir)
    faults = {step: fault(Path(folder)) for step, folder in found.items()}
    everyone = over_processes({step for step, why in faults.items() if why is None})
    newest = max(set.intersection(*everyone), default=None)
    if newest is None and any(everyone):
        steps = "; ".join(f"process {rank}: {sorted(steps) or 'none'}" for rank, steps in enumerate(everyone))
        raise UserError(
            f"--resume_from_checkpoint: the machines have no complete checkpoint in common in {output_dir} (steps of "
            f"{steps}). Copy one to the machines that lack it, or start anew with --overwrite_output_dir true"
        )
    for step in sorted(found, reverse=True):
        if newest is None or step > newest:
            _warn_of(found[step], faults[step] or "another machine does not have all of it")
    for folder in sorted(Path(output_dir, ASIDE).glob("checkpoint-*")):
        _warn_of(str(folder), "its save was cut off")
    return None if newest is None else found[newest]


def _put_in_place(output_dir: Path) -> None:
    for whole in sorted((output_dir / ASIDE).glob("checkpoint-*")):
        folder = output_dir / whole.name
        if (whole / MANIFEST).is_file() and fault(whole) is None:
            if folder.exists():
                _move_aside([folder], output_dir)
            os.replace(whole, folder)
            logger.warning("%s was saved whole, but a kill came before it was in its place: it is now", folder)


def checkpoint_steps(output_dir: str | os.PathLike) -> dict[int, str]:
    """Folders `checkpoint-N` by N, complete or not."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.is_dir()]
    numbers = {folder: folder.name.removeprefix("checkpoint-") for folder in folders}
    return {int(number): str(folder) for folder, number in numbers.items() if number.isdecimal()}


def _usable(folder: str) -> bool:
    why = fault(Path(folder))
    if why is not None:
        _warn_of(folder, why)
    return why is None


def _warn_of(folder: str, why: str) -> None:
    if is_main_of_node():
        logger.warning("%s is incomplete (%s) and is passed over", folder, why)


def set_checkpoints_aside(output_dir: str | os.PathLike, after: int = -1, result: Sequence[Path] = ()) -> None:
    """Move checkpoints of an earlier run into a folder of their own, so that no later resume takes them for new, those
    too that a kill kept from their place; what was not even written whole is removed.

    Args:
        after: only those of later steps than this.
        result: files of that run's result, which go with them.
    """
    found = [Path(folder) for step, folder in checkpoint_steps(output_dir).items() if step > after]
    _move_aside([*found, *result], Path(output_dir))
    left = [folder for folder in Path(output_dir, ASIDE).glob("*") if folder.is_dir()]
    whole = [folder for folder in left if (folder / MANIFEST).is_file() and fault(folder) is None]
    _move_aside(whole, Path(output_dir))
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)


def set_newer_aside(checkpoint: str | os.PathLike, output_dir: str | os.PathLike, result: Sequence[Path] = ()) -> None:
    """`set_checkpoints_aside` for a run that goes on from a checkpoint which is not the newest of `output_dir`: of
    those that are newer, or of all, and the result with them, where it is not one of that folder."""
    steps = [step for step, folder in checkpoint_steps(output_dir).items() if Path(folder).samefile(checkpoint)]
    set_checkpoints_aside(output_dir, after=steps[0] if steps else -1, result=() if steps else result)


def optimizer_kind(checkpoint: str | os.PathLike) -> str | None:
    """What wrote the optimizer's state of a checkpoint: plain, ZeRO-0, ZeRO-1/2 or ZeRO-3; None: it has none."""
    names = [path.name for path in Path(checkpoint).glob("global_step*/*")]
    if any(name.endswith("optim_states.pt") for name in names):
        return "ZeRO-3" if any(re.match(r"zero_pp_rank_.*model_states\.pt", name) for name in names) else "ZeRO-1/2"
    if names:
        return "ZeRO-0"
    return "plain" if Path(checkpoint, "optimizer.pt").is_file() else None


def _move_aside(paths: list[Path], output_dir: Path) -> None:
    if not paths:
        return
    aside = output_dir / f"_earlier-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 0
    name = aside.name
    while aside.exists():
        number += 1
        aside = aside.with_name(f"{name}_{number}")
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    names = [path.name for path in paths]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    logger.warning("moved what was there before to %s: %s%s", aside, ", ".join(names[:NAMED]), more)


def _move_files(source: Path, target: Path) -> None:
    """Move everything in `source` to `target`, one rename for each, over what is there."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and (target / path.name).is_dir():
            _move_files(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


def copy_processor(source: Path, target: Path, max_slice_nums: int) -> None:
    """Copy what other programs prepare pictures with (`preprocessor_config.json` and the code that it names, which is
    not run here) from one checkpoint to another; nothing where the source has none, or not all of it.

    Args:
        target: what is there already stays: our own model code.
        max_slice_nums: most slices of a picture, set in the copy.
    """
    settings_file = source / PROCESSOR
    if not settings_file.is_file() or (target / PROCESSOR).exists():
        return
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    modules = [name.partition(".")[0] for name in settings.get("auto_map", {}).values() if "--" not in name]
    code = {source / f"{module}.py" for module in modules}
    missing = sorted(file.name for file in code if not file.is_file())
    if not missing:
        code |= {Path(file) for path in code for file in get_relative_import_files(path)}
        missing = sorted(file.name for file in code if (target / file.name).exists())
    if missing:
        logger.warning(
            "%s is left out: %s, which it names, is not beside it or would replace our own; programs that prepare "
            "pictures with it (vLLM) need both",
            *(settings_file, ", ".join(missing)),
        )
        return
    for file in code:
        shutil.copyfile(file, target / file.name)
    if "max_slice_nums" in settings:
        settings["max_slice_nums"] = max_slice_nums
    (target / PROCESSOR).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: some file systems say only then that they are full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
