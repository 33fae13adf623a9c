"""Every sample of a data set looked at before training: problems found together, lengths.

The work is shared among the processes of a node and their workers; every process ends with the same answer.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from finetune.data_files import Samples
from finetune.dataset import Problem, SupervisedDataset
from finetune.errors import UserError, is_main_of_node, nodes, over_processes, shown
from finetune.loaders import Lifeline
from finetune.pictures import forget_sizes, picture_paths
from finetune.sample_check import REMARKS
from finetune.waiting import reported

logger = logging.getLogger("finetune")

MAX_PROBLEMS_SHOWN = 20
MAX_NAMES_SHOWN = 5
BLOCK = 2**20
CHUNK = 512  # samples that a worker takes at a time


@dataclass
class Remarked:
    """What one kind of remark was found in."""

    samples: int
    """how many"""
    first: str
    """name of the first of them"""
    names: Counter
    """samples by what the remark is about, such as a field"""


class Remarks(dict[str, Remarked]):
    """What is no fault of the samples and yet worth a word, by kind (`sample_check.REMARKS`)."""

    def see(self, dataset: SupervisedDataset, index: int) -> None:
        """Add what the data set remarks of a sample."""
        for kind, names in dataset.remarks(index).items():
            first = "" if kind in self else dataset.name(index)
            self._add(kind, Remarked(1, first, Counter(set(names))))

    @classmethod
    def of(cls, parts: Iterable[Remarks]) -> Remarks:
        """What was found in several parts of the data, in their order."""
        together = cls()
        for part in parts:
            for kind, found in part.items():
                together._add(kind, found)
        return together

    def _add(self, kind: str, found: Remarked) -> None:
        known = self.setdefault(kind, Remarked(0, found.first, Counter()))
        known.samples += found.samples
        known.names.update(found.names)


def report_remarks(remarks: Remarks) -> list[str]:
    """One line for each kind: how many samples, what it is about, and the first of them."""
    lines = []
    for kind, found in remarks.items():
        names = [f"{shown(name)} ({count:,})" for name, count in found.names.most_common(MAX_NAMES_SHOWN)]
        more = len(found.names) - len(names)
        names += [f"and {more:,} more"] if more > 0 else []
        about = f": {', '.join(names)}" if names else ""
        lines.append(f"{found.samples:,} sample(s) {REMARKS[kind]}{about}; the first is {found.first}")
    return lines


def warn_of_remarks(datasets: Iterable[SupervisedDataset]) -> None:
    """One warning on each machine of what `find_problems` and `find_questions` have gathered."""
    lines = report_remarks(Remarks.of(dataset.gathered for dataset in datasets))
    if lines and is_main_of_node():
        logger.warning("%s", "\n".join(lines))


def check_same_data(samples: Mapping[str, Samples]) -> None:
    """Finds nodes that read other data than the first, as where a machine has an older copy of a file. All processes
    must call it; the first of each node reads the files, where there is another node.

    Raises:
        UserError: in all processes, with what each reads.
    """
    counts = {split: len(of) for split, of in samples.items()}
    files = None
    if nodes() > 1 and is_main_of_node():
        paths = {split: list(map(Path, of.paths)) for split, of in samples.items()}
        files = {split: [(path.name, *_content(path)) for path in paths[split]] for split in paths}
    everyone = over_processes((socket.gethostname(), files, counts))
    read = [(number, *each) for number, each in enumerate(everyone) if each[1] is not None]
    if all(of_process == counts for *_, of_process in everyone) and all(each[2] == read[0][2] for each in read):
        return
    lines = [
        f"process {number} on {host} reads " + "; ".join(_reads(split, numbers[split], files) for split in numbers)
        for number, (host, files, numbers) in enumerate(everyone)
    ]
    raise UserError("The processes read different data; give all machines the same files:\n" + report_problems(lines))


def _reads(split: str, count: int, files: Mapping[str, list[tuple[str, int, str]]] | None) -> str:
    """What a process reads, in words; files: None, where it has only counted the samples."""
    contents = [f"{name} ({size} bytes, content {digest[:8]})" for name, size, digest in (files or {}).get(split, ())]
    return f"{split}: {', '.join([f'{count} samples', *contents])}"


def _content(path: Path) -> tuple[int, str]:
    """Bytes of a file, or of all files in a folder, and a digest of what they hold: of all of it up to 1 GiB, then of
    1024 blocks of 1 MiB."""
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        total += size
        with file.open("rb") as stream:
            for block in range(min(-(-size // BLOCK), 1024)):
                stream.seek(block * max(BLOCK, (size - BLOCK) // 1023))
                digest.update(stream.read(BLOCK))
    return total, digest.hexdigest()


def find_problems(dataset: SupervisedDataset, decode: bool = False, workers: int | None = None) -> list[Problem]:
    """All samples that training could not use, in order. What the others bring is then known as `dataset.loads`, and
    what there is to remark as `dataset.gathered`.

    Seen from the text and the headers of the pictures: missing and misplaced fields, roles, marks, pictures that do
    not exist, are no pictures or end too early, answers that `max_length` would cut off whole.

    Args:
        decode: also decode every picture, which finds whatever else is damaged.
        workers: processes; None: this process's share of the cores.
    """
    found = scan(len(dataset), partial(_problems_of, dataset, decode), "checking samples", workers)
    problems = {problem.index: problem for of_nodes in found for of_node, *_ in of_nodes for problem in of_node}
    dataset.gathered = Remarks.of(of_nodes[0][2] for of_nodes in found)
    dataset.loads = np.concatenate([of_nodes[0][1] for of_nodes in found]) if found else np.zeros((0, 2), np.int32)
    return [problems[index] for index in sorted(problems)]


def token_lengths(dataset: SupervisedDataset, workers: int | None = None) -> list[int]:
    """Tokens of every sample, picture tokens counted, after truncation; no picture is decoded."""
    found = scan(len(dataset), partial(_lengths_of, dataset), "measuring samples", workers)
    return np.concatenate([of_nodes[0] for of_nodes in found]).tolist()


def report_problems(problems: Sequence) -> str:
    """The first problems in full, the rest as a number."""
    more = len(problems) - MAX_PROBLEMS_SHOWN
    lines = map(str, problems[:MAX_PROBLEMS_SHOWN])
    return "\n".join([*lines, *([f"... and {more} more"] if more > 0 else [])])


def usable_cpus() -> int:
    """CPU cores that this process may use; on systems that cannot tell, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_processes(most: int = 4) -> int:
    """How many processes load pictures for this process, where nobody says it: no more than its share of the cores."""
    return min(most, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def scan(count: int, look: Callable[[range], object], title: str, workers: int | None = None) -> list:
    """`look(range of samples)` over all samples, in order, with a progress bar.

    Args:
        look: picklable.
        workers: processes; None: this process's share of the cores, and none for few samples; 0: this process.

    Returns:
        for each of the successive ranges, the results of every node; the same list in every process of a distributed
        run. Every node looks at all samples, since pictures may lie on its own disks.
    """
    forget_sizes()
    together = torch.distributed.is_initialized()
    place = int(os.environ.get("LOCAL_RANK", 0)) if together else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if together else 1
    ranges = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    if workers is None:
        workers = usable_cpus() // processes if len(ranges) > 2 * processes else 0
    mine: dict[int, object] = {}
    with tqdm(total=count, desc=title, unit=" samples", disable=place != 0 or len(ranges) < 2, delay=1) as bar:
        for number, result in _results(look, ranges, range(place, len(ranges), processes), workers):
            mine[number] = result
            bar.update(min(len(ranges[number]) * processes, count - bar.n))
    of_all = over_processes(mine)
    return [[results[number] for results in of_all if number in results] for number in range(len(ranges))]


def _results(look, ranges: list[range], numbers: range, workers: int) -> Iterator[tuple[int, object]]:
    workers = min(workers, len(numbers))
    loader = DataLoader(_Ranges(look, ranges, numbers), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    with closing(Lifeline()) as lifeline:
        lifeline.give_to(loader)
        found = iter(loader)
        for number in numbers:
            with reported(f"samples {ranges[number].start} to {ranges[number].stop - 1}, which are looked at"):
                result = next(found)
            yield result


def _as_it_is(result: tuple[int, object]) -> tuple[int, object]:
    """In place of torch's own, which makes tensors of arrays: each would hold an open file until the end."""
    return result


class _Ranges(Dataset):
    """Makes DataLoader workers out of a function: item n is the n-th range's number and result."""

    def __init__(self, look: Callable[[range], object], ranges: list[range], numbers: range):
        self.look, self.ranges, self.numbers = look, ranges, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, n: int) -> tuple[int, object]:
        return self.numbers[n], self.look(self.ranges[self.numbers[n]])


def _problems_of(dataset: SupervisedDataset, decode: bool, indices: range) -> tuple[list[Problem], np.ndarray, Remarks]:
    problems, loads, remarks = [], np.zeros((len(indices), 2), np.int32), Remarks()
    for number, index in enumerate(indices):
        remarks.see(dataset, index)
        try:
            loads[number] = dataset.check(index)
            if decode:
                decode_pictures(dataset, index)
        except ValueError as error:
            problems.append(Problem(index, *dataset.place(index), str(error)))
    return problems, loads, remarks


def decode_pictures(dataset: SupervisedDataset, index: int) -> None:
    """
    Raises:
        ValueError: naming the picture that cannot be decoded.
    """
    for picture in picture_paths(dataset.raw_data[index].get("image")):
        dataset.load_image(picture, index)


def _lengths_of(dataset: SupervisedDataset, indices: range) -> np.ndarray:
    limit = dataset.max_length or sys.maxsize
    return np.array([min(_tokens_of(dataset, index), limit) for index in indices])


def _tokens_of(dataset: SupervisedDataset, index: int) -> int:
    try:
        return dataset.measure(index).tokens
    except ValueError:
        if index not in dataset.masked:
            raise
        return dataset.masked[index].tokens
