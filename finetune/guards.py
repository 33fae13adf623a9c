"""What watches over a run: signals, losses that are no number, steps with nothing to learn, memory, the loaders.

Processes agree on everything at the end of each step, by a sum over the hosts that no device waits for.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from transformers import TrainerCallback

from finetune.errors import ProcessError, UserError, is_main_of_node, over_processes
from finetune.waiting import take_reported

logger = logging.getLogger("finetune")

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
RESUME_WITH = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
MAX_NAMES_SHOWN = 20
SIGNAL_DELAY = 1.0  # seconds in which word of a process that died arrives
LOADER_DIED = ("killed by signal", "exited unexpectedly")  # not: an exception of the data set, passed on
LOADER_ERRORS = (RuntimeError, OSError, EOFError, UnpicklingError)  # what this process meets when one dies
LAUNCHER = "FINETUNE_LAUNCHER"  # its process's number, set by launch.py
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Step(NamedTuple):
    """What an optimizer step of this process is made of, known without a look at the device."""

    names: list[str]
    """of its samples, for messages"""
    tokens: int
    slices: int
    supervised: int
    """samples that are masked since they are bad count as well: that they teach nothing has been said"""

    @classmethod
    def of(cls, batches: Sequence[Mapping]) -> Step:
        """Of the micro-batches of a step, as `data_collator` makes them."""
        slices = sum(len(sample) for batch in batches for sample in batch.get("pixel_values") or ())
        names = [str(name) for batch in batches for name in batch.get("ids") or ()]
        masked = sum(len(batch.get("bad") or ()) for batch in batches)
        return cls(names, sum(map(_tokens, batches)), slices, sum(map(_supervised, batches)) + masked)


def _tokens(batch: Mapping) -> int:
    lengths = batch.get("lengths")
    return sum(lengths) if lengths is not None else batch["input_ids"].numel() if "input_ids" in batch else 0


def _supervised(batch: Mapping) -> int:
    index = batch.get("label_index")
    if index is not None:
        return len(index)
    return int((batch["labels"] != -100).sum()) if "labels" in batch else 1  # of another collator


class EvaluationLeft(Exception):
    """An evaluation that a signal or a bad sample ended, in all processes at once."""


class Interrupted(BaseException):
    """A signal came while data were waited for. No Exception, which the code that reads data may catch."""


class Guard(TrainerCallback):
    """Stops a run at the end of a step: on a signal, with a checkpoint; on losses that are no number; on a step
    without a supervised token.

    A loss is looked at one step later on GPUs, so that nothing waits for it, but before anything is saved.

    Args:
        max_bad_steps: steps in a row whose loss is infinite or no number that end the run.

    Attributes:
        signal: the signal that stops the run, in any of its processes; 0: none.
        step: the step that runs.
        evaluating: an evaluation runs.
        leaving: the run ends without a further step, since not all processes have data for one: a signal came while
            they were waited for, or a sample is bad.
    """

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.signal = self._received = 0
        self.step = Step([], 0, 0, 1)
        self.evaluating = self.leaving = False
        self._waiting = False  # for data
        self._random: torch.Tensor | None = None  # state of the CPU's numbers before an epoch's first batch
        self._bad_steps = 0
        self._losses: deque[tuple[list[str], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._bad_names: deque[list[str]] = deque(maxlen=max_bad_steps)
        self._finite: torch.Tensor | None = None
        self._hosts: torch.distributed.ProcessGroup | None = None
        self._handlers: dict[int, object] = {}

    def begin_step(self, batches: Sequence[Mapping]) -> None:
        self.step = Step.of(batches)
        self._finite = self._random = None

    def see_loss(self, loss: torch.Tensor) -> None:
        """The loss of a micro-batch, on its device."""
        finite = torch.isfinite(loss.detach())
        self._finite = finite if self._finite is None else self._finite & finite

    def on_train_begin(self, args, state, control, **kwargs):
        self._connect()
        self.signal = self._received = self._bad_steps = 0
        self.leaving = False
        self._losses.clear()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup; a handler that is no Python
                    self._handlers[number] = signal.signal(number, self._receive)

    def _connect(self) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 and self._hosts is None:
            self._hosts = torch.distributed.new_group(backend="gloo")

    def fetch(self, take: Callable[[], list], what: str, end_loaders: Callable[[], None]) -> list | None:
        """What `take` returns, which waits for data. A signal ends the wait, whatever it is for: None.

        Args:
            what: is waited for, for the report of a stall.
            end_loaders: called on a signal, before anything waits for loader processes that are stalled.
        """
        found = None
        try:
            try:
                self._waiting = True
                if not self._received:
                    found = take_reported(take, what)
            finally:
                self._waiting = False
        except Interrupted:  # whose traceback keeps the loader until here
            end_loaders()
            return None
        return found

    def anywhere(self, bad: bool) -> tuple[bool, bool]:
        """Whether a signal has come, and whether data are bad, in any of the processes, all of which must call it."""
        self._connect()
        numbers = torch.tensor([bool(self._received), bad], dtype=torch.int64)
        if self._hosts is not None:
            torch.distributed.all_reduce(numbers, group=self._hosts)
        signalled, bad_anywhere = map(bool, numbers.tolist())
        return signalled, bad_anywhere

    def leave(self, state, control, model: torch.nn.Module | None) -> None:
        """End the run with the last finished step, which is saved; all processes must call it.

        Raises:
            UserError: in all processes, over the losses so far.
        """
        self.leaving = control.should_training_stop = True
        self._agree(state.global_step, everything=True)
        control.should_save, control.should_evaluate = state.global_step > 0, False
        self._hold_back(state, control, model)
        if self._random is not None:  # what makes the epoch's batches has drawn, and a resumed run will draw again
            torch.set_rng_state(self._random)
            self._random = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._random = torch.get_rng_state()

    def on_step_end(self, args, state, control, **kwargs):
        self._note_loss()
        everything = control.should_save or state.global_step >= state.max_steps
        self._agree(state.global_step, everything)
        if self.signal:
            self._agree(state.global_step, everything=True)
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        if self._bad_steps and state.global_step >= state.max_steps:
            self._end_on_bad_step(state.global_step, kwargs["model"])
        self._hold_back(state, control, kwargs.get("model"))

    def _end_on_bad_step(self, step: int, model: torch.nn.Module) -> None:
        """The last step of all has a bad loss: there is a result only where it has changed no weight."""
        if not all(over_processes(_trained_are_finite(model))):
            raise UserError(
                f"training ended at step {step} with a loss that is infinite or no number, and weights that are; the "
                "result is not saved. Lower --learning_rate, train in another precision (--bf16 true), and go on from "
                "the last checkpoint with --resume_from_checkpoint true"
            )
        self._bad_steps = 0
        if is_main_of_node():
            logger.warning(
                "the loss of the last step, %d, is infinite or no number. That step changed no weight: the result is "
                "that of the steps before",
                step,
            )

    def on_epoch_end(self, args, state, control, **kwargs):
        self._agree(state.global_step, everything=True)
        if self.signal or self.leaving:  # within an evaluation, or the epoch, whose evaluation would take long
            control.should_training_stop = True
            control.should_save = state.global_step > 0
            control.should_evaluate = False
        self._hold_back(state, control, kwargs.get("model"))

    def _hold_back(self, state, control, model: torch.nn.Module | None) -> None:
        """No checkpoint of a model that may be spoilt; on a signal, which leaves no later one, it is looked at."""
        if self._bad_steps and control.should_save:
            if (self.signal or self.leaving) and model is not None and all(over_processes(_trained_are_finite(model))):
                return
            control.should_save = False
            if is_main_of_node():
                logger.warning("no checkpoint at step %d: its loss is infinite or no number", state.global_step)

    def restore_handlers(self) -> None:
        """Signals do again what they did before training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self._received, self.leaving = 0, False

    def _receive(self, number: int, _frame) -> None:
        first, self._received = not self._received, number
        waiting, self._waiting = self._waiting, False
        if signal.Signals(number).name == "SIGHUP":  # the terminal is gone, and writing to it is an error
            _leave_terminal()
        if first and is_main_of_node():
            name = signal.Signals(number).name
            when = "" if waiting else " at the end of this step"
            message = f"\n{name}: a checkpoint is saved{when}, unless another process has failed\n"
            with suppress(OSError):
                os.write(2, message.encode())  # writing to sys.stderr may interrupt itself
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun passes it on once more
            signal.signal(number, self._handlers[number])  # a second one ends the run at once
        if waiting:  # Python would go on with the system call
            raise Interrupted

    def _note_loss(self) -> None:
        if self._finite is None:
            return
        finite, event = self._finite.reshape(()), None
        if finite.is_cuda:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._losses.append((self.step.names, finite, event))
        self._finite = None

    def _agree(self, step: int, everything: bool) -> None:
        """Sum up over the processes; `everything`: also the loss that the device may still be computing.

        Raises:
            UserError: in all processes.
        """
        late = not everything and self._losses and self._losses[-1][2] is not None
        seen = [self._losses.popleft() for _ in range(len(self._losses) - bool(late))]
        for _, _, event in seen:
            if event is not None:
                event.synchronize()
        bad = [not bool(finite) for _, finite, _ in seen]
        numbers = torch.tensor([bool(self._received), self.step.supervised, *bad], dtype=torch.int64)
        if self._hosts is not None:
            torch.distributed.all_reduce(numbers, group=self._hosts)
        stopped, supervised, *bad_anywhere = numbers.tolist()
        self.signal = (self._received or signal.SIGTERM) if stopped else 0
        if not supervised:
            raise UserError(
                f"step {step} has no supervised token: there is nothing to learn in {self._names(self.step.names)}. "
                "Look at their answers' weights and at --model_max_length"
            )
        for (names, _, _), own, anywhere in zip(seen, bad, bad_anywhere, strict=True):
            self._bad_steps = self._bad_steps + 1 if anywhere else 0
            self._bad_names.append(names if own else [])
            if self._bad_steps >= self.max_bad_steps:
                names = [name for of_step in self._bad_names for name in of_step]
                raise UserError(
                    f"the loss was infinite or no number in {self._bad_steps} steps in a row, the last of them step "
                    f"{step} or the one before: nothing more would be learned. Their samples: {self._names(names)}. "
                    "Lower --learning_rate, or train in another precision (--bf16 true), look at these samples, and "
                    "go on from the last checkpoint with --resume_from_checkpoint true"
                )

    def _names(self, own: Sequence[str]) -> str:
        names = list(dict.fromkeys(name for of_process in over_processes(list(own)) for name in of_process))
        more = [f"and {len(names) - MAX_NAMES_SHOWN} more"] if len(names) > MAX_NAMES_SHOWN else []
        return "; ".join([*names[:MAX_NAMES_SHOWN], *more]) or "samples without ids"


@contextmanager
def explained(guard: Guard | None, args, config=None) -> Iterator[None]:
    """Out of memory, and loader processes that died, in words that help.

    Args:
        guard: knows what was computed; None: nothing yet, the model is loaded.
        args: the run's TrainingArguments.
        config: of the model, for its slices; None: another model.

    Raises:
        ProcessError: in the process that met it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, *LOADER_ERRORS) as error:
        if cause := lacking_memory(error):
            raise ProcessError(_out_of_memory(guard, args, config, cause)) from error
        if death := death_of_loader(error):
            raise ProcessError(
                f"a loader process died ({' '.join(str(death).split())[:300]}). Most often the host has run out of "
                f"memory or of shared memory (/dev/shm): lower --dataloader_num_workers (it is "
                f"{args.dataloader_num_workers}; 0 loads in the training process itself, and shows what fails there), "
                "and go on with --resume_from_checkpoint true"
            ) from error
        raise


def lacking_memory(error: Exception) -> str | None:
    """What an error says of the memory that could not be had; None: it is about something else."""
    cause = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error):
        return cause
    host = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return f"of the host: {cause}" if host or "can't allocate memory" in str(error) else None


def death_of_loader(error: Exception) -> Exception | None:
    """The error that names a loader process which died, if one did.

    What it was sending breaks off first now and then. PyTorch hears of the death a moment later, by a signal, and
    raises its own error from wherever this process then is.
    """
    if isinstance(error, OSError | EOFError | UnpicklingError):
        try:
            time.sleep(SIGNAL_DELAY)
        except RuntimeError as death:
            error = death
    died = "DataLoader worker" in str(error) and any(word in str(error) for word in LOADER_DIED)
    return error if died else None


def _out_of_memory(guard: Guard | None, args, config, cause: str) -> str:
    remedies = memory_remedies(args, config)
    place = "while loading the model"
    if guard is not None and guard.evaluating:
        place = "in an evaluation"
        remedies = [*_evaluation_remedies(args), *remedies]
    elif guard is not None and not guard.step.names:
        place = "before the first step"
    elif guard is not None:
        step = guard.step
        place = f"at a step of {len(step.names)} samples, {step.tokens} tokens and {step.slices} slices per process"
    return (
        f"out of memory {place} ({cause}). What helps, from what costs least: {'; '.join(remedies)}. Then go on with "
        "--resume_from_checkpoint true, if a checkpoint was saved"
    )


def _evaluation_remedies(args) -> list[str]:
    answers = getattr(args, "predict_with_generate", False)
    remedies = [
        ("--per_device_eval_batch_size 1", args.per_device_eval_batch_size > 1),
        ("--predict_max_new_tokens 32", answers and args.predict_max_new_tokens > 32),
        ("--predict_with_generate false", answers),
    ]
    return [remedy for remedy, applies in remedies if applies]


def memory_remedies(args, config=None) -> list[str]:
    """Flags that take memory off a run with these arguments, those that cost least first."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    checkpointing = args.gradient_checkpointing or getattr(
        args, "activation_checkpointing", False
    )  # by its newest name
    lora = getattr(args, "use_lora", False)
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    stage = deepspeed.get_value("zero_optimization.stage", 0) if deepspeed else 0
    offload = bool(deepspeed and deepspeed.is_offload())
    slices = config.slicing["max_slice_nums"] if hasattr(config, "slicing") else 0
    remedies = [
        (f"--batch_size 1 --gradient_accumulation_steps {batch * accumulation} (the same result)", batch > 1),
        ("--gradient_checkpointing true", not checkpointing),
        ("--model_max_length 1200", getattr(args, "model_max_length", 0) > 1200),
        ("--max_slice_nums 4", slices > 4),
        ("--tune_vision false", getattr(args, "tune_vision", False)),
        ("--tune_embed_tokens false", lora and getattr(args, "tune_embed_tokens", False)),
        ("--use_lora true --tune_llm false (finetune_lora.sh)", not lora),
        ("DS_CONFIG=ds_config_zero2_offload.json (--deepspeed with that file)", stage < 3 and not offload),
        ("DS_CONFIG=ds_config_zero3.json, on several GPUs", stage < 3 and args.world_size > 1),
        ("DS_CONFIG=ds_config_zero3_offload.json", stage < 3 or not offload),
        ("a GPU with more memory, or more GPUs", True),
    ]
    return [remedy for remedy, applies in remedies if applies]


def _trained_are_finite(model: torch.nn.Module) -> bool:
    """Of the parameters that this process holds, or of its parts of them under ZeRO-3; waits for the device."""
    trained = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    return all(bool(tensor.isfinite().all()) for tensor in trained)


def _leave_terminal() -> None:
    """Let what is written to a terminal that is gone go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if os.isatty(stream) or not _can_write(stream):
                os.dup2(null, stream)
    os.close(null)


def _can_write(stream: int) -> bool:
    try:
        os.write(stream, b"")
    except OSError:
        return False
    return True


def let_workers_live(_worker: int | None = None) -> None:
    """In a loader process: signals to the whole group of processes (Ctrl-C, SLURM) are for the training process, which
    still needs its samples; loader processes end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_launcher() -> None:
    """Under torchrun, on Linux: this process is killed when torchrun is, rather than train on beside a resumed run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(LAUNCHER) not in (None, str(os.getppid())):  # it was killed before
            os.kill(os.getpid(), signal.SIGKILL)


def resume_command(argv: Sequence[str], anew: bool = False, **flags: object) -> str:
    """The command that goes on with this run from its newest checkpoint.

    Args:
        argv: the program and its flags, as in sys.argv.
        anew: begin from the first step again instead, and move what is there aside.
        flags: by name, in the place of those that the run had.
    """
    replaced = ("--resume_from_checkpoint", "--overwrite_output_dir", *(f"--{name}" for name in flags))
    words, skip = [], False
    for word in argv:
        name = word.split("=")[0]
        if name[:2] + name[2:].replace("-", "_") in replaced:
            skip = name == word
        elif skip and not word.startswith("--"):
            skip = False
        else:
            skip = False
            words.append(word)
    words += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--overwrite_output_dir" if anew else "--resume_from_checkpoint", "true"]
    start = [sys.executable]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // each
        start += [str(Path(__file__).with_name("launch.py")), "--nproc_per_node", str(each)]
        start += ["--standalone"] if nodes == 1 else [
            *("--nnodes", str(nodes), "--node_rank", os.environ["GROUP_RANK"]),
            *("--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]),
        ]  # fmt: skip
    settings = [f"{name}={os.environ[name]}" for name in RESUME_WITH if name in os.environ]
    return shlex.join([*settings, *start, *words])
