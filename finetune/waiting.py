"""Waiting for data: a loader that stalls is reported, whatever it waits for.

One thread of the process looks on, now and then, whether somebody has been waiting for long; nothing is done per batch
but to write down the time.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.errors import rank

logger = logging.getLogger("finetune")

DELAY = 45.0  # seconds until a stall is reported for the first time; then after twice as long, again and again
LOOK_EVERY = 0.5  # seconds
SHARED_MEMORY = Path("/dev/shm")

_started: tuple[float, str] | None = None  # when the wait that goes on began, and what for
_looks_on: threading.Thread | None = None


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Where the block, in which data are waited for, takes long, warnings say so.

    Args:
        what: is waited for, in the words of the warning.
    """
    global _started, _looks_on
    if _looks_on is None:
        _looks_on = threading.Thread(target=_look_on, name="waiting", daemon=True)
        _looks_on.start()
    before, _started = _started, (time.monotonic(), what)
    try:
        yield
    finally:
        _started = before


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
    seen, due = None, DELAY
    while True:
        time.sleep(LOOK_EVERY)
        if _started is not seen:
            seen, due = _started, DELAY
        if seen is not None and (seconds := time.monotonic() - seen[0]) >= due:
            due = 2 * seconds
            logger.warning("%s", _report(seconds, seen[1]))


def _report(seconds: float, what: str) -> str:
    room = ""
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        room = (
            f", or at {SHARED_MEMORY}, through which loader processes send (free: {usage.free:,} of {usage.total:,} "
            "bytes)"
        )
    return (
        f"process {rank()} has been waiting for {what} for {seconds:.0f} s. If it does not go on, look at the disk "
        f"that the pictures are on{room}"
    )
