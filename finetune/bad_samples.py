"""Samples that training cannot use: left out before a run's first step, or masked when they turn out to be bad later.

A masked sample stays in its place and teaches nothing, so that number and order of the samples, and with them the steps
of a resumed run, stay what they were. `OUTPUT_DIR/bad_samples.jsonl` lists both kinds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from finetune.checkpoints import newest_in_words
from finetune.checks import find_problems, report_problems
from finetune.dataset import Problem, SupervisedDataset
from finetune.errors import UserError, is_main_of_node, over_processes, rank, shown
from finetune.guards import resume_command
from finetune.result_folder import BAD_SAMPLES_NAME

logger = logging.getLogger("finetune")

LOOKED_AT = 10_000  # samples of a data set that are looked at for a command that works


class BadSamples:
    """What turns out to be bad while a run lasts. The data sets mask such samples from now on rather than raise.

    Args:
        datasets: by the name that the record gives them: `train`, `eval`.
        skip: go on without bad samples (`--bad_samples skip`), rather than end the run.
        max_fraction: most of the samples of each that may be bad, 0 to 1.
        left_out: how many of each were left out before training.
    """

    def __init__(
        self,
        datasets: Mapping[str, SupervisedDataset],
        output_dir: str | os.PathLike,
        skip: bool,
        max_fraction: float,
        left_out: Mapping[str, int],
    ):
        self.datasets, self.path, self.skip = datasets, Path(output_dir) / BAD_SAMPLES_NAME, skip
        self.max_fraction, self.left_out = max_fraction, left_out
        self._found: list[Problem] = []  # that the run ends over
        for dataset in datasets.values():
            dataset.masks_bad = True

    def count(self, split: str) -> int:
        """Samples that are left out or masked."""
        return self.left_out.get(split, 0) + len(self.datasets[split].masked)

    def total(self, split: str) -> int:
        """Samples in the data."""
        return self.left_out.get(split, 0) + len(self.datasets[split])

    def unknown(self, split: str, bad: Iterable[Problem]) -> list[Problem]:
        """Those that no process has met before."""
        return [problem for problem in bad if problem.index not in self.datasets[split].masked]

    def see(self, split: str, bad: Sequence[Problem]) -> bool:
        """Take note of what this process has met; all processes must call it.

        Returns:
            whether the run has to end.
        """
        met = {problem.index: problem for of_process in over_processes(bad) for problem in of_process}
        found = [met[index] for index in sorted(met)]
        self.datasets[split].masked.update(met)
        if self.skip:
            _record_masked(self.path, {split: self.datasets[split]}, {split: found})
            _warn_masked(found, self.path)
        if self.skip and self.count(split) <= self.max_fraction * self.total(split):
            return False
        self._found = list(self.datasets[split].masked.values()) if self.skip else found
        return True

    def error(self, step: int) -> UserError:
        """What a run says that ends over bad samples, when its checkpoint is saved; all processes must call it.

        Args:
            step: the last finished one.
        """
        if self.skip:
            counts = [
                f"{self.count(split)} of {self.total(split)} samples of {split}"
                for split in self.datasets
                if self.count(split) > self.max_fraction * self.total(split)
            ]
            what = f"{' and '.join(counts)} cannot be used, more than --max_bad_fraction {self.max_fraction} allows"
        else:
            what = "a sample turned out to be one that cannot be used"
        saved, anew = newest_in_words(self.path.parent)
        flags = {"bad_samples": "skip"}
        if (fraction := self._fraction_needed()) > self.max_fraction:
            flags["max_bad_fraction"] = fraction
        return UserError(
            f"{what}:\n{report_problems(self._found)}\nThe run ended after step {step}; {saved}. To go on without, or "
            f"mend the data and leave out --bad_samples:\n{resume_command(sys.argv, anew, **flags)}"
        )

    def _fraction_needed(self) -> float:
        """The largest part of a data set that is bad. The run that goes on looks at all samples before its first step,
        so those that no step has met count as well, but in a data set so large that this takes long."""
        parts = []
        for split, dataset in self.datasets.items():
            bad, total = self.count(split), self.total(split)
            if total <= LOOKED_AT:
                seen = {problem.index for problem in find_problems(dataset, decode=True)}
                bad = self.left_out.get(split, 0) + len(seen | set(dataset.masked))
            parts.append(math.ceil(1000 * bad / total) / 1000)
        return max(parts)


def leave_out_bad_samples(
    datasets: Mapping[str, SupervisedDataset],
    output_dir: str,
    max_fraction: float,
    resuming: bool,
    before_writing: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Takes every sample that training could not use out of the data sets, and lists them in `bad_samples.jsonl`.

    Every picture is decoded once for that, so that training meets no surprise. A run that is resumed leaves out and
    masks what its file lists, so that its data stay the same, and masks what has become unusable since. Without a file
    nothing was left out so far, and what is bad is masked.

    Args:
        datasets: by the name that the file gives them: `train`, `eval`.
        max_fraction: of the samples of each, 0 to 1.
        before_writing: called by all processes when the data are known to be usable.

    Returns:
        how many were left out of each.

    Raises:
        UserError: when over `max_fraction` of the samples, or all of them, are bad; when the file is of other data.
    """
    path = Path(output_dir) / BAD_SAMPLES_NAME
    recorded = _from_first_process(lambda: _read(path) if resuming and path.is_file() else None)
    if recorded is not None:
        return _leave_out_recorded(datasets, recorded, path, max_fraction, before_writing)
    bad = {}
    for split, dataset in datasets.items():
        bad[split] = problems = find_problems(dataset, decode=True)
        _check_fraction(problems, len(problems), len(dataset), max_fraction)
    before_writing()
    if resuming:
        for split, problems in bad.items():
            datasets[split].masked.update({problem.index: problem for problem in problems})
            _warn_masked(problems, path)
        _record_masked(path, datasets, bad)
        return dict.fromkeys(datasets, 0)
    _from_first_process(lambda: _write(path, [_entry(*one) for one in _pairs(datasets, bad)]))
    for split, dataset in datasets.items():
        left_out, total = [problem.index for problem in bad[split]], len(dataset)
        dataset.raw_data, dataset.loads = dataset.raw_data.without(left_out), np.delete(dataset.loads, left_out, axis=0)
        if left_out:
            logger.warning("%d of %d samples left out:\n%s", len(left_out), total, report_problems(bad[split]))
    return {split: len(problems) for split, problems in bad.items()}


def _leave_out_recorded(
    datasets: Mapping[str, SupervisedDataset],
    recorded: Sequence[Mapping],
    path: Path,
    max_fraction: float,
    before_writing: Callable[[], None],
) -> dict[str, int]:
    """As `leave_out_bad_samples`, of what the file lists."""
    new, counts = {}, {}
    for split, dataset in datasets.items():
        entries, total = [entry for entry in recorded if entry["split"] == split], len(dataset)
        _check_same_samples(dataset, entries, path)
        left_out = sorted(entry["sample"] for entry in entries if not entry.get("masked"))
        masked = {
            entry["sample"] - bisect_left(left_out, entry["sample"]): entry for entry in entries if entry.get("masked")
        }
        dataset.raw_data = dataset.raw_data.without(left_out)
        dataset.masked.update({index: _problem(index, entry) for index, entry in masked.items()})
        new[split] = [problem for problem in find_problems(dataset) if problem.index not in masked]
        for index, entry in masked.items():  # by which processes share the samples, now as before
            dataset.loads[index] = entry.get("load", 0)
        since = "These samples became unusable since the run began:\n" if new[split] else ""
        shown_first = new[split] or [_problem(entry["sample"], entry) for entry in entries]
        _check_fraction(shown_first, len(entries) + len(new[split]), total, max_fraction, since)
        dataset.masked.update({problem.index: problem for problem in new[split]})
        counts[split] = len(left_out)
        _warn_masked(new[split], path)
    before_writing()
    _record_masked(path, datasets, new)
    return counts


def _check_fraction(problems: Sequence[Problem], count: int, total: int, most: float, since: str = "") -> None:
    """
    Args:
        problems: that are listed.
        count: bad samples, these and others.
        since: what is said first.

    Raises:
        UserError: when they are more than `most` of `total`, or all.
    """
    if count > most * total or count == total:
        raise UserError(
            f"{since}{count} of {total} samples ({count / total:.1%}) cannot be used, more than --max_bad_fraction "
            f"{most} allows:\n{report_problems(problems)}"
        )


def _check_same_samples(dataset: SupervisedDataset, entries: Sequence[Mapping], path: Path) -> None:
    """
    Raises:
        UserError: when what stands at the place of an entry is another sample.
    """
    for entry in entries:
        listed = f"{entry['file']}: sample {entry['index']} (id {shown(entry['id'])})"
        if not 0 <= entry["sample"] < len(dataset):
            found = f"{', '.join(dataset.raw_data.paths)} with {len(dataset)} samples"
        elif _is_same(entry, *dataset.place(entry["sample"])):
            continue
        else:
            found = dataset.name(entry["sample"])
        raise UserError(
            f"{path} lists {listed} as sample {entry['sample']} of {entry['split']}, and the data given now are "
            f"{found}: resume with the data files that the run had, in the same order"
        )


def _is_same(entry: Mapping, file: str, number: int, identity: object) -> bool:
    """Whether an entry is of the sample at this place; the data may lie in another folder than they did."""
    if entry["index"] != number or entry["id"] != _in_json(identity):
        return False
    same_file = Path(entry["file"]).resolve() == Path(file).resolve()
    return same_file or (identity is not None and Path(entry["file"]).name == Path(file).name)


def _warn_masked(problems: Sequence[Problem], path: Path) -> None:
    if problems and is_main_of_node():
        logger.warning(
            "%d sample(s) cannot be used; they stay in their places and teach nothing, see %s:\n%s",
            *(len(problems), path, report_problems(problems)),
        )


def _pairs(
    datasets: Mapping[str, SupervisedDataset], bad: Mapping[str, Sequence[Problem]]
) -> list[tuple[str, int, Problem]]:
    """(split, index before any was left out, problem) of each."""
    return [(split, datasets[split].raw_data.origin(p.index), p) for split, problems in bad.items() for p in problems]


def _problem(index: int, entry: Mapping) -> Problem:
    return Problem(index, entry["file"], entry["index"], entry["id"], entry["cause"], entry.get("tokens", 1))


def _entry(split: str, sample: int, problem: Problem) -> dict:
    p = problem
    return {"split": split, "sample": sample, "file": p.file, "index": p.number, "id": _in_json(p.id), "cause": p.cause}


def _sizes(dataset: SupervisedDataset, index: int) -> dict:
    """What the order of the samples and their division among processes follow from, and a picture that is gone does
    not tell any more."""
    lengths = {} if dataset.lengths is None else {"tokens": int(dataset.lengths[index])}
    return {"load": dataset.loads[index].tolist(), **lengths}


def _in_json(identity: object) -> object:
    return json.loads(json.dumps(identity, default=repr))


def _record_masked(path: Path, datasets: Mapping[str, SupervisedDataset], bad: Mapping[str, Sequence[Problem]]) -> None:
    """Add masked samples to the file; all processes must call it.

    Raises:
        UserError: in all of them, when it cannot be read or written.
    """
    entries = [
        {**_entry(split, sample, problem), "masked": True, **_sizes(datasets[split], problem.index)}
        for split, sample, problem in _pairs(datasets, bad)
    ]

    def add() -> None:
        if entries or not path.is_file():
            _write(path, [*(_read(path) if path.is_file() else []), *entries])

    _from_first_process(add)


def _from_first_process(make: Callable[[], object]) -> object:
    """What `make` returns in the first process of a distributed run, in all of them.

    Raises:
        UserError: in all of them, when a file cannot be read or written.
    """
    made, failure = None, None
    if rank() == 0:
        try:
            made = make()
        except (OSError, ValueError, KeyError, TypeError) as error:
            failure = (
                f"{BAD_SAMPLES_NAME} in --output_dir: {type(error).__name__}: {error}. Expected what a run "
                "with --bad_samples skip wrote there; without the file a resumed run looks for bad samples anew"
            )
    made, failure = over_processes((made, failure))[0]
    if failure:
        raise UserError(failure)
    return made


def _write(path: Path, entries: Sequence[Mapping]) -> None:
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)


def _read(path: Path) -> list[dict]:
    lines = filter(None, path.read_text(encoding="utf-8").split("\n"))  # splitlines() ends one at U+2028
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        _ = [entry[name] for name in ("split", "sample", "file", "index", "id", "cause")]
    return entries
