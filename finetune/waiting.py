"""Waiting for data: a loader that stalls is reported, whatever it waits for.

One thread of each process, loader processes among them, looks on, now and then, whether somebody has been waiting for
long; nothing is done per batch and picture but to write down the time.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from finetune.errors import rank

logger = logging.getLogger("finetune")

DELAY = 45.0  # seconds until a stall is reported for the first time; then after twice as long, again and again
LOOK_EVERY = 0.5  # seconds
SHARED_MEMORY = Path("/dev/shm")


class Wait(NamedTuple):
    """A wait that goes on."""

    began: float
    what: str | Callable[[], str]


_waits: dict[int, tuple[Wait, ...]] = {}  # of each thread that waits, those within others behind them
_process: int | None = None  # whose they are: a forked process begins without


@contextmanager
def reported(what: str | Callable[[], str]) -> Iterator[None]:
    """Where the block, in which data are waited for, takes long, warnings say so. Within another such block, whose time
    then counts, they say both.

    Args:
        what: is waited for, in the words of the warning, or makes them, in another thread.
    """
    global _process
    if _process != os.getpid():
        _process = os.getpid()
        _waits.clear()
        threading.Thread(target=_look_on, name="waiting", daemon=True).start()
    thread = threading.get_ident()
    before = _waits.get(thread, ())
    _waits[thread] = (*before, Wait(time.monotonic(), what))
    try:
        yield
    finally:
        _waits[thread] = before


def take_reported(take: Callable[[], list], what: str = "samples") -> list:
    """`take()`, which waits for data, under the eyes of `reported`."""
    with reported(what):
        return take()


class Taken:
    """A loader whose batches are fetched by a function.

    Args:
        loader: all but its batches is as in it.
        fetch: called with a function that waits for data and returns a list: of the next batch, or empty at the end.
    """

    def __init__(self, loader: Iterable, fetch: Callable[[Callable[[], list]], list] = take_reported):
        self.loader, self.fetch = loader, fetch

    def __iter__(self) -> Iterator[Any]:
        batches = None

        def take() -> list:
            nonlocal batches
            batches = iter(self.loader) if batches is None else batches  # which starts its processes
            return list(islice(batches, 1))

        while found := self.fetch(take):
            yield found[0]

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def _look_on() -> None:
    due: dict[Wait, float] = {}
    while True:
        time.sleep(LOOK_EVERY)
        going_on = [waits for waits in list(_waits.values()) if waits]
        due = {waits[0]: due.get(waits[0], DELAY) for waits in going_on}
        for first, *further in going_on:
            if (seconds := time.monotonic() - first.began) >= due[first]:
                due[first] = 2 * seconds
                logger.warning("%s", _report(seconds, [first, *further]))


def _report(seconds: float, waits: Sequence[Wait]) -> str:
    whats = [wait.what if isinstance(wait.what, str) else wait.what() for wait in waits]
    who, room, worker = f"process {rank()}", "", get_worker_info()
    if worker is not None:
        who = f"loader process {worker.id} of {who}"
    elif SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        room = (
            f", or at {SHARED_MEMORY}, through which loader processes send (free: {usage.free:,} of {usage.total:,} "
            "bytes)"
        )
    return (
        f"{who} has been waiting for {', now for '.join(whats)}, for {seconds:.0f} s. If it does not go on, look at "
        f"the disk that the pictures are on{room}"
    )
