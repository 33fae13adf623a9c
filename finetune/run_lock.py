"""One run at a time in an output folder: a file there names the run that works in it.

A run of the same machine is over when its process is. Of another machine, or another container, the time of the file is
the sign of life: the run renews it, and who finds it looks for that. A lock on the file, where the disk knows such,
keeps two apart that begin at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from finetune.errors import UserError, over_processes

try:
    import fcntl
except ImportError:  # Windows: process numbers and signs of life have to do
    fcntl = None

logger = logging.getLogger("finetune")

LOCK = "_running.json"  # which uploads to the hub leave out, as all names with "_" in front
SIGN_OF_LIFE = 15.0  # seconds
PATIENCE = 45.0  # seconds after which a run of another machine that gave none is over
DYING = 4.0  # seconds in which a process that is about to end does
GIVING_BACK = 60.0  # seconds that a killed process may need to give back its memory, and then its lock
PF_EXITING = 4  # <linux/sched.h>
MOST_BYTES = 4096

_held: set[str] = set()  # files that this process holds, to which its own locks would give way


def only_run_in(output_dir: str | os.PathLike, takes: bool) -> AbstractContextManager[None]:
    """Keeps other runs out of a folder; what a run that was killed has left is taken over. All processes must call it.

    Args:
        takes: whether this process is the one that does it (one on each disk).

    Raises:
        UserError: in all of them, naming the other run.
    """
    return _alone(Path(output_dir, LOCK), f"--output_dir {output_dir}", takes)


def only_one_writes(output: str | os.PathLike, takes: bool = True) -> AbstractContextManager[None]:
    """Likewise for the `--output` of a program, which is written beside its place and then put there: the file that
    names the program at work lies beside it too."""
    place = Path(output).resolve()
    return _alone(place.with_name(f"{place.name}{LOCK}"), f"--output {output}", takes)


@contextmanager
def _alone(path: Path, where: str, takes: bool) -> Iterator[None]:
    lock, problem = None, None
    if takes:
        try:
            lock = _Lock(path)
        except OSError as error:
            problem = f"{where}: cannot be written: {error.strerror or error}"
        except UserError as error:
            problem = f"{where}: {error}"
    try:
        if problems := list(dict.fromkeys(filter(None, over_processes(problem)))):
            raise UserError("\n".join(problems))
        yield
    finally:
        if lock is not None:
            lock.release()


def run_at_work(output_dir: str | os.PathLike) -> str | None:
    """The run of this machine that works in a folder, in words that follow its name; None: there is none, or on another
    machine, which `only_run_in` finds."""
    path = Path(output_dir, LOCK)
    found = _parsed(_read(str(path)) or "")
    if not found or os.path.realpath(path) in _held or not _is_of_here(found) or not _is_running(found):
        return None
    return f"another run works there: {_described(found)}"


class _Lock:
    """Holds the file.

    Raises:
        UserError: in words that follow the folder's name, when another run does.
        OSError: when it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.made_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.key = os.path.realpath(path)
        while True:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take()
            except BaseException:
                os.close(self.file)
                raise
            if self._is_in_place():
                break
            os.close(self.file)  # of a run that has ended meanwhile, and removed it
        _held.add(self.key)
        self._over = threading.Event()
        threading.Thread(target=self._give_signs, daemon=True).start()

    def _take(self) -> None:
        start = time.monotonic()
        while (other := self._holder()) and self.key not in _held:
            found = _record(self.file)
            ended = found and _is_of_here(found) and not _is_running(found)
            if time.monotonic() - start > (GIVING_BACK if ended else DYING):
                break
            time.sleep(DYING / 20)
        if other:
            raise UserError(f"{other}. Wait for its end or stop it, or name another folder")
        if found := _record(self.file):
            logger.warning("%s: taken over from a run that was killed: %s", self.path, _described(found))
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps({**_own(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode(), 0)

    def _holder(self) -> str | None:
        """Who works in the folder, in words; None: nobody."""
        free, found = _locked(self.file), _record(self.file)
        if found and (not free or self.key in _held or self._is_alive(found)):
            return f"another run works there: {_described(found)}"
        return None if free else "another run begins there just now"

    def _is_alive(self, found: dict) -> bool:
        return _is_running(found) if _is_of_here(found) else self._gives_signs(found)

    def _gives_signs(self, found: dict) -> bool:
        logger.warning("%s: looking for %.0f s whether that run goes on: %s", self.path, PATIENCE, _described(found))
        before, end = self.path.stat().st_mtime_ns, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, PATIENCE / 10))
            if self.path.stat().st_mtime_ns != before:
                return True
        return False

    def _give_signs(self) -> None:
        while not self._over.wait(SIGN_OF_LIFE):
            with suppress(OSError):
                os.utime(self.path)

    def _is_in_place(self) -> bool:
        with suppress(OSError):
            return os.path.samestat(self.path.stat(), os.fstat(self.file))
        return False

    def release(self) -> None:
        """Give the folder free."""
        self._over.set()
        _held.discard(self.key)
        with suppress(OSError):
            if self._is_in_place():
                self.path.unlink()
                if self.made_folder:
                    self.path.parent.rmdir()  # where the run has left nothing
        os.close(self.file)


def _locked(file: int) -> bool:
    """Lock an open file for this process; False where another one holds it. A lock of this kind ends with its process,
    and is not handed on to the processes that it starts."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a disk that knows no locks
        pass
    return True


def _record(file: int) -> dict:
    return _parsed(os.pread(file, MOST_BYTES, 0))


def _parsed(content: str | bytes) -> dict:
    try:
        found = json.loads(content)
    except ValueError:  # empty: new, or of a run that was killed while it wrote it
        return {}
    return found if isinstance(found, dict) else {}


def _is_of_here(found: dict) -> bool:
    """Whether a run is one of this machine and container."""
    own = _own()
    return all(found.get(name) == own[name] for name in ("host", "boot", "namespace"))


def _is_running(found: dict) -> bool:
    """Whether a run of this machine goes on."""
    if found.get("started") is None:  # a system that does not tell it
        return _exists(found.get("process"))
    return _started(found.get("process")) == found["started"]


def _described(found: dict) -> str:
    return f"process {found.get('process')} on {found.get('host')}, since {found.get('since')}"


def _own() -> dict:
    """What tells this process from all others, on all machines."""
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),  # in which process numbers count
        "process": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(process: object) -> str | None:
    """When a process began, in ticks since the machine did; None: it has ended, or the system does not tell."""
    state, *fields = (_read(f"/proc/{process}/stat") or ") Z").rpartition(")")[2].split()
    exiting = state == "Z" or (len(fields) > 5 and int(fields[5]) & PF_EXITING)
    return None if exiting else fields[18]


def _exists(process: object) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, TypeError, ValueError):
        return False
    return True


def _read(path: str) -> str | None:
    with suppress(OSError, ValueError):
        return Path(path).read_text(encoding="utf-8").strip()
    return None


def _link(path: str) -> str | None:
    with suppress(OSError):
        return str(Path(path).readlink())
    return None
