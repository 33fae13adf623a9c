"""Loader processes: that they end with the run, and that what they send has room in shared memory.

Batches come from loader processes through /dev/shm, which is 64 MB in a Docker container that nobody gave more. A
batch that has no room there would be lost, and the training process would wait for it for ever.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, get_worker_info

from finetune.errors import is_main_of_node, over_processes, processes
from finetune.guards import let_workers_live
from finetune.waiting import SHARED_MEMORY

logger = logging.getLogger("finetune")

PREFETCHED = 2  # batches that a loader process makes ahead: PyTorch's default
PAGE = 4096  # bytes; each tensor begins a new one
BYTES_PER_TOKEN = 26  # of a batch: ids, positions and labels of 8, a mask of 1, and an index of those that matter
SMALL_TENSORS = 8  # of a sample, or of its share of the batch
SHARE = 0.9  # of what is free, since NCCL and others need some of it too


class Lifeline:
    """Loader processes that hold it end when it is closed, or when the process that made it ends, in whatever way: by
    itself a loader process lives as long as its iterator, and ignores the signals that are meant for the run."""

    def __init__(self):
        self._held, self._end = Pipe(duplex=False)
        _ENDS.add(self._end)

    def give_to(self, loader: DataLoader) -> None:
        """Let the processes of this loader hold it, those that it will start; a loader that has one keeps it."""
        before = loader.worker_init_fn
        if not (isinstance(before, partial) and before.func is _begin):
            loader.worker_init_fn = partial(_begin, self._held, before)

    def close(self) -> None:
        """End the loader processes that hold it."""
        _ENDS.discard(self._end)
        self._end.close()


_ENDS: set[Connection] = set()  # of all lifelines of this process, which processes that it forks inherit


def _begin(held: Connection, worker_init: Callable[[int], None] | None, worker: int) -> None:
    for end in _ENDS:  # or it would hold itself
        end.close()
    let_workers_live()
    threading.Thread(target=_end_with, args=(held,), daemon=True).start()
    # A batch that cannot be sent is dropped by the queue's thread, which prints the error and goes on. No public place
    # to hear of it in Python 3.10 to 3.13; without this the report of a stall says where to look. Sharing the tensors
    # before they are queued is public, and makes a loader process a tenth slower. Remove once a DataLoader itself
    # raises such an error.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)
    if worker_init is not None:
        worker_init(worker)


def _end_with(held: Connection) -> None:
    held.poll(None)  # nothing is ever sent
    os._exit(0)  # another status would be reported as the death of a loader process


def _end_unsent(error: Exception, _batch: object) -> None:
    """End a loader process that cannot send, which the training process takes for what it is: a loader that died."""
    if isinstance(error, ConnectionError):  # nobody is there any more to receive
        os._exit(0)
    cause = " ".join(str(error).split())
    logger.error("loader process %d cannot send a batch: %s: %s", get_worker_info().id, type(error).__name__, cause)
    os._exit(1)


@atexit.register  # before multiprocessing's own, which waits for processes that do not hear it
def _close_all() -> None:
    for end in list(_ENDS):
        end.close()


class Load(NamedTuple):
    """What a data loader brings."""

    sizes: np.ndarray
    """bytes of each sample in shared memory, see `sample_bytes`"""
    batch_size: int
    """samples of a process at a time"""
    kept: int
    """batches that exist beside those that loader processes make ahead"""


def sample_bytes(slices: np.ndarray, tokens: np.ndarray | int, scale_resolution: int, patch_size: int) -> np.ndarray:
    """Bytes that samples take in shared memory at most, as parts of batches with pixels in uint8.

    Args:
        slices: of each sample, the overview counted.
        tokens: of each sample, padding included, or the most of all.
        scale_resolution, patch_size: pixels.
    """
    # Sides are rounded to whole patches: an area of scale_resolution**2 becomes this at most, up to sides as 14 to 1.
    pixels = (scale_resolution + patch_size) ** 2
    return slices * (3 * pixels + PAGE) + tokens * BYTES_PER_TOKEN + SMALL_TENSORS * PAGE


def shared_memory_needed(loads: Sequence[Load], workers: int, prefetched: int, processes_here: int) -> int:
    """Bytes that batches on their way take at most on this machine, were the largest samples drawn together.

    Args:
        workers: loader processes of each process and load.
        prefetched: batches that each of them makes ahead.
        processes_here: of the run, on this machine.
    """
    if not workers:
        return 0
    needed = 0.0
    for load in loads:
        samples = load.batch_size * (workers * prefetched + load.kept) * processes_here
        whole, rest = divmod(samples, max(len(load.sizes), 1))  # epochs may follow one another
        needed += whole * load.sizes.sum() + (np.partition(load.sizes, -rest)[-rest:].sum() if rest else 0)
    return int(needed)


def fitting_workers(loads: Sequence[Load], asked: int, flag: str, prefetched: int | None = None) -> int:
    """Loader processes whose batches have room in shared memory: as many as asked for, or fewer, which a warning says;
    the same in all processes of the run, all of which must call it.

    Args:
        flag: that asks for them, for the warning.
        prefetched: batches that each of them makes ahead; None: PyTorch's default.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes() > 1 else 1
    needed = partial(shared_memory_needed, loads, prefetched=prefetched or PREFETCHED, processes_here=here)
    fits = asked
    while fits and free is not None and needed(fits) > SHARE * free:
        fits -= 1
    fits = min(over_processes(fits))
    if fits < asked and is_main_of_node():
        room = f"{free / 2**20:,.0f} MiB are free" if free is not None else "another machine has less"
        instead = f"{fits} are used" if fits else "pictures are loaded by the process itself, which is slower"
        logger.warning(
            "batches of %s %d may need %s MiB of shared memory, and in %s %s: %s. In Docker, give the container "
            "--shm-size=%dm (or --ipc=host)",
            *(flag, asked, f"{needed(asked) / 2**20:,.0f}", SHARED_MEMORY, room, instead),
            _docker_size(needed(asked)),
        )
    return fits


def _docker_size(needed: int) -> int:
    """MiB to ask for, in steps of 64."""
    return -(-int(needed / SHARE) // 2**26) * 64
