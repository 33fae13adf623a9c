"""What a run leaves in a folder, by its file names: one result, an adapter or a whole model, and what belongs to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
EXTRA_WEIGHTS_NAME = "vpm_resampler_embedtokens.pt"
ADAPTER = "an adapter"
WHOLE = "a whole model"
# The files that make it one, by kind.
WEIGHTS = {
    ADAPTER: (ADAPTER_CONFIG_NAME, *ADAPTER_FILES, EXTRA_WEIGHTS_NAME),
    WHOLE: ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*"),
}
BAD_SAMPLES_NAME = "bad_samples.jsonl"
# Of the run that wrote it, and of no other program. TensorBoard's runs/ stay: its files have names of their own, and it
# compares runs.
RECORDS = ("training_settings.json", "trainer_state.json", "training_args.bin", BAD_SAMPLES_NAME, "loss.png")
# What belongs to a result; in a folder without one such files are the user's.
BESIDE = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("processing_*.py", "image_processing_*.py"),
)
CODE = Path(__file__).with_name("minicpmv")  # copied beside a whole model


def weights_in(folder: Path) -> dict[str, list[Path]]:
    """The files by which a folder is a result, by its kind; empty where it is none."""
    found = {kind: _matching(folder, patterns) for kind, patterns in WEIGHTS.items()}
    return {kind: files for kind, files in found.items() if files}


def lacking_in_result(folder: Path) -> list[str]:
    """Names of the files without which a folder cannot be loaded."""
    found = weights_in(folder)
    if WHOLE in found:
        return []
    if ADAPTER not in found:
        return ["its weights"]
    names = {file.name for file in found[ADAPTER]}
    needed = {name: {name} for name in (ADAPTER_CONFIG_NAME, EXTRA_WEIGHTS_NAME)} | {ADAPTER_FILES[0]: {*ADAPTER_FILES}}
    return [name for name, any_of in needed.items() if not any_of & names]


def files_of_result(folder: Path) -> list[Path]:
    """All files of a result and of the run that wrote it, less checkpoints, and the model card, which may be
    somebody's own."""
    weights = [file for files in weights_in(folder).values() for file in files]
    beside = [*_matching(folder, BESIDE), *_code_in(folder)] if weights else []
    return [*weights, *_matching(folder, RECORDS), *beside]


def _code_in(folder: Path) -> list[Path]:
    """Copies of our own model code; files of these names that say something else are the user's."""
    pairs = [(folder / own.name, own) for own in sorted(CODE.glob("*.py"))]
    return [copy for copy, own in pairs if copy.is_file() and copy.read_bytes() == own.read_bytes()]


def replaced_by(folder: Path, new: Path) -> list[Path]:
    """What a new result, which lies in `new`, would leave beside itself in a folder: a result of the other kind with
    all that belongs to it, or weights of a model that was divided otherwise; and what is the user's there and would be
    overwritten. None where `new` is no result."""
    found, coming = weights_in(folder), weights_in(new)
    if coming and not found:
        there = [folder / file.name for file in sorted(new.iterdir()) if file.name not in RECORDS]
        return [file for file in there if file.is_file() and file.read_bytes() != (new / file.name).read_bytes()]
    if coming and found.keys() - coming.keys():
        return [
            file for file in files_of_result(folder) if file.name != BAD_SAMPLES_NAME
        ]  # which the new run has begun
    return [file for kind in coming for file in found.get(kind, ()) if not (new / file.name).exists()]


def described(folder: Path) -> str | None:
    """The result in a folder in words: `an adapter (adapter_model.safetensors, of 2024-05-31 12:00)`; None: none."""
    found = weights_in(folder)
    return " and ".join(f"{kind} ({_newest(files)})" for kind, files in found.items()) or None


def two_results_problem(folder: Path) -> str | None:
    """Why a folder cannot be loaded as one model, in words that follow its name: it holds an adapter and a whole model,
    of which nobody can say which is meant. A file of further weights makes no adapter."""
    found = weights_in(folder)
    adapter = [file for file in found.get(ADAPTER, ()) if file.name != EXTRA_WEIGHTS_NAME]
    if not adapter or WHOLE not in found:
        return None
    newer = max((ADAPTER, WHOLE), key=lambda kind: max(file.stat().st_mtime for file in found[kind]))
    return (
        f"holds two results, {ADAPTER} ({_newest(adapter)}) and {WHOLE} ({_newest(found[WHOLE])}); {newer} is newer. "
        "Move the files of the other one into a folder of its own"
    )


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _newest(files: Sequence[Path]) -> str:
    """The newest file of those by which a result is known, with its time."""
    main = [file for file in files if file.name not in (ADAPTER_CONFIG_NAME, EXTRA_WEIGHTS_NAME)]
    newest = max(main or files, key=lambda file: file.stat().st_mtime)
    return f"{newest.name}, of {time.strftime('%Y-%m-%d %H:%M', time.localtime(newest.stat().st_mtime))}"
