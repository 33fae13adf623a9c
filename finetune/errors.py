"""Errors that a user can do something about, the same in every process of a run where they should be."""

from __future__ import annotations

import os
import reprlib

import torch

SHOWN = 120  # most characters of a value of the user's data in a message
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 20


class UserError(ValueError):
    """Something that the user can mend; its message says how, and no traceback is needed."""


class ProcessError(UserError):
    """A UserError that one process alone met, and which that process must report itself."""


def over_processes(own: object) -> list:
    """What every process of the run says, in order of rank; all of them must call it."""
    if not torch.distributed.is_initialized():
        return [own]
    everyone = [own] * processes()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def rank() -> int:
    """This process's number in the run, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def processes() -> int:
    """How many processes the run has."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def nodes() -> int:
    """How many machines the run has; all processes must call it."""
    return sum(over_processes(is_main_of_node()))


def is_main_of_node() -> bool:
    """Whether this process is the first of its machine, which is the one that prints."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def shown(value: object, quotes: bool = True) -> str:
    """A value of the user's data as a message shows it: on one line, and what is longer than 120 characters with `...`
    for its middle, however much of it there is.

    Args:
        quotes: a text stands in quotes, as in Python.
    """
    if not isinstance(value, str):
        return _shortened(_REPR.repr(value))
    value = _shortened(value)
    if quotes:
        return _shortened(repr(value))
    return value if value.isprintable() else _shortened(repr(value)[1:-1])


def shown_path(path: str) -> str:
    """A path as a message shows it: whole as far as it is there, and of what is missing at most 120 characters."""
    if os.path.exists(path):
        return path
    end = 0
    while (next_end := path.find(os.sep, end + 1)) > 0 and os.path.exists(path[:next_end]):
        end = next_end
    return path[:end] + shown(path[end:], quotes=False)


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    rest = SHOWN - len(" ... ")
    return f"{text[: rest - rest // 2]} ... {text[-(rest // 2) :]}"
