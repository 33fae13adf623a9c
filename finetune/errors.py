"""Errors that a user can do something about, the same in every process of a run where they should be."""

from __future__ import annotations

import os

import torch


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


def is_main_of_node() -> bool:
    """Whether this process is the first of its machine, which is the one that prints."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
