"""Ask a model about pictures, once or in a conversation.

    python finetune/chat.py --model output/lora --image my/picture.jpg --question "How many desserts are there?"
    python finetune/chat.py --model output/lora

The model is a checkpoint as downloaded (a folder, or its name on the hub), one that training wrote, or an adapter.
Without --question, a conversation in the terminal, or with lines from a pipe; with --json, questions as JSON Lines.
Answers go to stdout, everything else to stderr. Exit status: 0, 1 when something could not be answered, 2 when the
call itself is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import torch
from peft import PeftModel
from PIL import Image
from transformers.hf_argparser import string_to_bool

from finetune.arguments import DTYPES, FoundModel, choose_dtype, find_model, fitting_length, load_found, uses_gpu
from finetune.errors import UserError, shown, shown_path
from finetune.minicpmv import LLM_TYPES, MiniCPMV, MiniCPMVConfig
from finetune.minicpmv.conversation import IMAGE_MARK, place_pictures
from finetune.minicpmv.modeling_minicpmv import BEAM_SEARCH, SAMPLING
from finetune.minicpmv.streaming import answer_text, stop_ids
from finetune.pictures import is_data_uri, load_image, map_pictures, picture_paths
from finetune.places import at_home

logger = logging.getLogger("finetune.chat")

ONLY_SAMPLING = ("temperature", "top_p", "top_k")
GENERATION = (*ONLY_SAMPLING, "repetition_penalty", "num_beams")
JSON_KEYS = ("question", "image", "id")
NEW_TOKENS, PROMPT_TOKENS = 1024, 2048  # most tokens of answer and prompt by default, where the model takes as many
INTERRUPTED = 130  # exit status of programs that Ctrl-C ended
HISTORY_LINES = 1000
HELP = """\
  /image FILE ...   show these pictures with the next message; <image> in its text says where, else they go in front
  /reset            forget the conversation
  /help             this list
  /quit             end, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with / needs a space in front."""


class WrongCall(UserError):
    """What is wrong with the flags, the files that they name, or the model; found before any weight is loaded."""


class PromptTooLong(ValueError):
    """More tokens than `--max_inp_length`, or than the model takes."""


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    """pictures included"""
    answer_tokens: int
    """the end token included"""
    seconds: float
    stopped: bool
    """by Ctrl-C, so that it may not be whole"""


class Asker:
    """A loaded model with the settings that it answers with.

    Args:
        sampling: or beam search.
        generation: generation arguments that win over the original chat's, `max_new_tokens` among them.
        seed: of the random numbers; None: other ones each time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        sampling: bool = True,
        generation: Mapping[str, object] | None = None,
        system_prompt: str = "",
        max_inp_length: int = 2048,
        max_slice_nums: int | None = None,
        seed: int | None = None,
    ):
        self.model: MiniCPMV = model.get_base_model() if isinstance(model, PeftModel) else model
        self.tokenizer = tokenizer
        self.settings = self.model.chat_settings(tokenizer, sampling, **(generation or {}))
        self.prompt = {"system_prompt": system_prompt, "max_slice_nums": max_slice_nums}
        self.max_inp_length = max_inp_length
        self.seed = seed

    @property
    def streams(self) -> bool:
        """Whether answers can be read while they are made; of beams, the best one is known at the end."""
        return self.settings.get("num_beams", 1) == 1

    def restart(self) -> None:
        """Draw the random numbers of the seed again from the first one."""
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        images: Sequence[Image.Image] | Mapping[str, Image.Image],
        write: Callable[[str], object] | None = None,
    ) -> Answer:
        """Answer the last of the messages.

        Args:
            messages, images: as for `MiniCPMV.chat`.
            write: gets the answer in pieces, as they are made where the model `streams`.

        Raises:
            PromptTooLong: when the prompt is longer than `max_inp_length`, or leaves no room for an answer.
            ValueError: see `MiniCPMV.chat`; on text that is no Unicode.
        """
        if not is_text(messages[-1]["content"]):
            raise ValueError("the question has bytes that are no UTF-8 text")
        start = time.perf_counter()
        said: list[str] = []
        token_ids: Sequence[int] = []
        prompt_tokens, stopped = 0, False

        def say(piece: str) -> None:
            said.append(piece)
            if write is not None:
                write(piece)

        try:
            inputs = self.model.chat_inputs(images, messages, self.tokenizer, **self.prompt, max_inp_length=sys.maxsize)
            prompt_tokens = inputs["input_ids"].shape[1]
            settings = self._fitting(prompt_tokens)
            if self.streams:
                stream = self.model.stream_answer(inputs, self.tokenizer, **settings)
                token_ids = stream.token_ids
                try:
                    for piece in stream:
                        say(piece)
                finally:
                    stream.close()
            else:
                token_ids = self.model.generate(inputs, **settings)[0].tolist()
                say(answer_text(token_ids, self.tokenizer, stop_ids(settings)))
        except KeyboardInterrupt:
            stopped = True
        return Answer("".join(said), prompt_tokens, len(token_ids), time.perf_counter() - start, stopped)

    def _fitting(self, prompt_tokens: int) -> dict:
        """The settings, with no more new tokens than fit behind the prompt; where that is less, the user is told."""
        whole = self.model.config.max_position_embeddings
        if prompt_tokens > self.max_inp_length:
            raising = f"raise it (up to {whole}), " if self.max_inp_length < whole else ""
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens, more than --max_inp_length {self.max_inp_length}; {raising}"
                "lower --max_slice_nums or say less"
            )
        try:
            room = self.model.room_behind(prompt_tokens)
        except ValueError as error:
            raise PromptTooLong(str(error)) from error
        asked = self.settings.get("max_new_tokens")
        if asked is None or asked <= room:
            return self.settings
        logger.warning(
            "the answer can have %d tokens in place of --max_new_tokens %d: with its prompt it may have %d",
            *(room, asked, whole),
        )
        return {**self.settings, "max_new_tokens": room}


class Conversation:
    """Messages and pictures up to now, and the pictures that go with the next message."""

    def __init__(self, asker: Asker):
        self.asker = asker
        self.messages: list[dict[str, str]] = []
        self.images: list[Image.Image] = []
        self.waiting: list[Image.Image] = []

    def reset(self) -> None:
        self.messages, self.images, self.waiting = [], [], []
        self.asker.restart()

    def ask(self, text: str, write: Callable[[str], object]) -> Answer:
        """Answer a message. Where that fails, or is stopped before the first word, the conversation stays as it was.

        Raises:
            ValueError: marks that do not match the pictures, a prompt that is too long.
        """
        text, images = self._with_marks(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        images = self.images + images
        try:
            answer = self.asker.answer(messages, images, write)
        except PromptTooLong as error:
            if not self.messages:
                raise
            raise PromptTooLong(f"{error}, or forget the conversation with /reset") from error
        if answer.text or not answer.stopped:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self.images, self.waiting = images, []
        return answer

    def _with_marks(self, text: str) -> tuple[str, list[Image.Image]]:
        """The message with one `<image>` for each of its pictures, and the pictures in that order: in a conversation
        every message has its own, whose numbers (`<image_00>`) begin anew."""
        [(_, parts)] = place_pictures([{"role": "user", "content": text}], self.waiting)
        marked = "".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
        return marked, [part for part in parts if not isinstance(part, str)]


def is_text(text: str) -> bool:
    """Whether this is Unicode. Bytes of stdin or of a flag that are not have become lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def open_picture(path: str) -> Image.Image:
    """The picture of a file, as training sees it; `~` is the home.

    Raises:
        ValueError: naming the file, when it cannot be used.
    """
    return load_image(at_home(path))


def named_files(text: str) -> list[str]:
    """The paths behind `/image`: one with spaces, where such a file exists; else several, quoted as in a shell."""
    if os.path.exists(at_home(text)):
        return [text]
    try:
        paths = shlex.split(text)
    except ValueError:  # an apostrophe in a name
        return [text]
    return paths if any(os.path.exists(at_home(path)) for path in paths) else [text]


def converse(asker: Asker, images: Sequence[Image.Image]) -> int:
    """A conversation, with a person at a terminal or with lines from elsewhere.

    Returns:
        exit status: 1 when lines that no person typed led to errors.
    """
    conversation = Conversation(asker)
    conversation.waiting = list(images)
    asker.restart()
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        logger.info("/help lists the commands, Ctrl-D ends")
    failed = False
    for line in _typed_lines(conversation) if at_terminal else _piped_lines():
        command, _, rest = line.rstrip("\n").partition(" ")
        try:
            if command in ("/quit", "/exit"):
                break
            if command.startswith("/"):
                _obey(conversation, command, rest.strip())
            elif line.strip():
                stopped = _say(conversation, line.strip())
                if stopped and not at_terminal:
                    return INTERRUPTED
        except (ValueError, torch.OutOfMemoryError) as error:
            failed = True
            logger.error("%s", _one_line(error))
    return 1 if failed and not at_terminal else 0


def _piped_lines() -> Iterator[str]:
    """The lines of stdin, without the mark that some editors put at the beginning of a file."""
    for number, line in enumerate(sys.stdin):
        yield line if number else line.removeprefix("\ufeff")


def _say(conversation: Conversation, text: str) -> bool:
    """Answers a message on stdout; returns whether Ctrl-C stopped it."""
    written = False

    def write(piece: str) -> None:
        nonlocal written
        written = True
        _write(piece)

    try:
        answer = conversation.ask(text, write)
    except BaseException:
        if written:  # what follows begins on a line of its own
            _write("\n")
        raise
    _write("\n")
    if answer.stopped:
        logger.info("(stopped%s)", "" if answer.text else "; the message is forgotten")
    return answer.stopped


def _obey(conversation: Conversation, command: str, rest: str) -> None:
    if command == "/image" and rest:
        pictures = [(path, open_picture(path)) for path in named_files(rest)]
        for path, picture in pictures:
            conversation.waiting.append(picture)
            logger.info("%s (%d x %d) goes with the next message", shown_path(path), *picture.size)
    elif command == "/reset":
        conversation.reset()
        logger.info("the conversation is forgotten")
    elif command == "/help":
        logger.info(HELP)
    elif command == "/image":
        raise ValueError("/image: name a file, as in /image my/picture.jpg")
    else:
        raise ValueError(
            f"{shown(command, quotes=False)}: there is no such command, /help lists them (or put a space in front)"
        )


def _typed_lines(conversation: Conversation) -> Iterator[str]:
    """Lines that a person types, with history and completion where Python has readline."""
    with _line_editing() as remember:
        while True:
            count = len(conversation.waiting)
            try:
                line = input(f"[{count} picture{'s' * (count > 1)}] > " if count else "> ")
            except EOFError:
                _write("\n")
                return
            remember()
            yield line


@contextmanager
def _line_editing() -> Iterator[Callable[[], None]]:
    """Yields a function that adds the newest line to the history file. Where that file cannot be read or written, the
    history is that of this conversation."""
    try:
        import readline  # not every Python is built with it
    except ImportError:
        yield lambda: None
        return
    path = None
    with suppress(OSError, RuntimeError):  # a home that is missing, or not ours
        path = _history_path()
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims("")  # the whole line is completed: file names have spaces
    readline.set_completer(_completion)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    known = readline.get_current_history_length()

    def remember() -> None:
        nonlocal known
        count = readline.get_current_history_length()
        if path is not None and count != known:
            with suppress(OSError):
                readline.append_history_file(1, path)
        known = count

    try:
        yield remember
    finally:
        readline.set_completer(None)


def _history_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    if not state:
        return Path.home() / ".finetune_chat_history"
    Path(state).mkdir(parents=True, exist_ok=True)
    return Path(state) / "finetune_chat_history"


def _completion(line: str, number: int) -> str | None:
    """The completions of a line, as readline asks for them: one by one, then None."""
    found = [command for command in ("/image ", "/reset", "/help", "/quit") if command.startswith(line)]
    if match := re.match(r"/image\s+", line):
        head, slash, begin = line[match.end() :].rpartition("/")
        found = []
        with suppress(OSError):
            for entry in sorted(Path(at_home(head + slash)).iterdir()):
                if entry.name.startswith(begin):
                    found.append(match[0] + head + slash + entry.name + "/" * entry.is_dir())
    return found[number] if line and number < len(found) else None


def answer_json_lines(asker: Asker, record: Callable[..., dict]) -> int:
    """Answer every line of stdin by itself: a JSON object with `question`, `image` (a path or `data:` URI, a list
    of them, or an object from mark to one) and `id`, or a question as it is.

    Args:
        record: makes the JSON object of an answer.

    Returns:
        exit status: 1 when a line could not be answered.
    """
    failed = False
    for number, line in enumerate(_piped_lines(), start=1):
        if not line.strip():
            continue
        told: dict = {"line": number}
        try:
            given = _parse_line(line.strip())
            told.update({name: given[name] for name in ("id", "question") if name in given})
            images = map_pictures(given.get("image"), open_picture)
            asker.restart()
            answer = asker.answer([{"role": "user", "content": given["question"]}], images)
            if answer.stopped:
                return INTERRUPTED
            told.update(record(given["question"], picture_paths(given.get("image")), answer))
        except (ValueError, torch.OutOfMemoryError) as error:
            failed = True
            told["error"] = _one_line(error)
        _write_json(told)
    return int(failed)


def _parse_line(line: str) -> dict:
    if not line.startswith("{"):
        return {"question": line}
    given = json.loads(line)
    if strange := sorted(set(given) - set(JSON_KEYS)):
        raise ValueError(f"unknown: {shown(', '.join(strange), quotes=False)}; expected {', '.join(JSON_KEYS)}")
    if not isinstance(given.get("question"), str) or not given["question"].strip():
        raise ValueError(f"question is {shown(given.get('question'))}, expected text")
    if not all(isinstance(path, str) for path in picture_paths(given.get("image"))):
        raise ValueError(f"image is {shown(given['image'])}, expected a path, a list of paths or an object of them")
    return given


def _one_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; lower --max_slice_nums or --max_new_tokens, or shorten the conversation (/reset)"
    return " ".join(str(error).split())


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_json(record: Mapping) -> None:
    _write(json.dumps(record, ensure_ascii=False) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Flags; those of the generation are None where they are not given, so that contradictions can be seen."""
    parser = argparse.ArgumentParser(description="Ask a model about pictures.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint or adapter, or the name of a checkpoint on the hub")
    add("--base", help="folder of an adapter's base model, where it is not any more where it was in training")
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="pictures, in front of the question or where its <image> marks stand",
    )
    add("--question", help="answer this and end; without it: a conversation, or with --json questions from stdin")
    add("--json", action="store_true", help="print JSON Lines, for programs")
    add("--system_prompt", default="", help="what the assistant is told first (2.5 only); default: nothing")
    add(
        "--sampling",
        type=string_to_bool,
        default=True,
        help="true: draw each token, other answers each time; false: beam search; default: true",
    )
    for flag, kind, text in (
        ("temperature", float, "with --sampling true: below 1 likely tokens become likelier, above 1 less likely"),
        ("top_p", float, "with --sampling true: draw from the likeliest tokens with this probability together, 0 to 1"),
        ("top_k", int, "with --sampling true: draw from so many of the likeliest tokens; 0: from all"),
    ):
        add(f"--{flag}", type=kind, help=f"{text}; default: {SAMPLING[flag]}")
    add(
        "--repetition_penalty",
        type=float,
        help="above 1, tokens that the answer has already become less likely; default: "
        f"{SAMPLING['repetition_penalty']}, with --sampling false {BEAM_SEARCH['repetition_penalty']}",
    )
    add(
        "--num_beams",
        type=int,
        help="with --sampling false: beams of the search, 1 takes the likeliest token each time; default: "
        f"{BEAM_SEARCH['num_beams']}",
    )
    add(
        "--max_new_tokens",
        type=int,
        help=f"longest answer in tokens; default: {NEW_TOKENS}, or half of what the model takes, if that is less",
    )
    add(
        "--max_inp_length",
        type=int,
        help=f"longest prompt in tokens, with pictures; default: {PROMPT_TOKENS}, or what the model takes, if that is "
        "less",
    )
    add("--max_slice_nums", type=int, help="most slices of a picture beside its overview; default: as in training")
    add("--seed", type=int, help="the same answers every time; default: other ones")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights; default: auto, as in training")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, GPUs where there are any")
    add("--cache_dir", help="folder for what is downloaded from the hub")
    return parser


def flag_problems(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the flags by themselves, one line each."""
    problems = []
    for flag in ("num_beams",) if arguments.sampling else ONLY_SAMPLING:
        if getattr(arguments, flag) is not None:
            needed = "false" if arguments.sampling else "true"
            problems.append(f"--{flag} {getattr(arguments, flag)}: only with --sampling {needed}")
    for flag in ("num_beams", "max_new_tokens", "max_inp_length", "max_slice_nums"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            problems.append(f"--{flag} {value}: expected 1 or more")
    for flag, highest in (("temperature", math.inf), ("top_p", 1), ("repetition_penalty", math.inf)):
        value = getattr(arguments, flag)
        if value is not None and not (0 < value <= highest and math.isfinite(value)):
            up_to = "" if highest == math.inf else f" and at most {highest}"
            problems.append(f"--{flag} {value}: expected a number above 0{up_to}")
    if arguments.top_k is not None and arguments.top_k < 0:
        problems.append(f"--top_k {arguments.top_k}: expected 0 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        problems.append(f"--seed {arguments.seed}: expected 0 or more")
    if arguments.question is not None and not arguments.question.strip():
        problems.append("--question is empty; leave it out for a conversation")
    for flag in ("question", "system_prompt"):
        if not is_text(getattr(arguments, flag) or ""):
            problems.append(f"--{flag} has bytes that are no UTF-8 text")
    if arguments.json and arguments.question is None and arguments.image:
        problems.append("--image with --json but without --question: each line from stdin names its own pictures")
    if arguments.question is None and sys.stdin is None:
        problems.append("--question is missing, and stdin is closed")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: PyTorch finds no GPU here")
    return problems


def model_problems(arguments: argparse.Namespace, config: MiniCPMVConfig) -> list[str]:
    """What is wrong with the flags for this model."""
    problems = []
    if arguments.system_prompt and config.llm_type != "llama3":
        problems.append(f"--system_prompt: {LLM_TYPES[config.llm_type]} has no words for it; put it into the question")
    if (arguments.max_inp_length or 0) > config.max_position_embeddings:
        problems.append(
            f"--max_inp_length {arguments.max_inp_length}: the language model was made for at most "
            f"{config.max_position_embeddings} tokens"
        )
    if (arguments.max_new_tokens or 0) >= config.max_position_embeddings:
        problems.append(
            f"--max_new_tokens {arguments.max_new_tokens}: the language model was made for at most "
            f"{config.max_position_embeddings} tokens, question and answer together"
        )
    return problems


def load_asker(arguments: argparse.Namespace, found: FoundModel) -> tuple[Asker, dict]:
    """The model, ready to answer, and its settings for `--json`.

    Raises:
        UserError: when it cannot be loaded.
    """
    on_gpu = uses_gpu(arguments.device)
    dtype, remark = choose_dtype(arguments.dtype, found, on_gpu)
    if remark:
        logger.warning(remark)
    logger.info(
        "%s %s%s: %s, %s on the %s",
        *(found.kind, found.path, f" of {found.base}" * (found.kind == "adapter"), LLM_TYPES[found.config.llm_type]),
        *(dtype, "GPU" if on_gpu else "CPU"),
    )
    model, tokenizer = load_found(found, dtype, arguments.device, cache_dir=arguments.cache_dir)
    given = {name: getattr(arguments, name) for name in GENERATION if getattr(arguments, name) is not None}
    most_new = arguments.max_new_tokens or fitting_length(NEW_TOKENS, found.config, share=2)
    longest_prompt = arguments.max_inp_length or fitting_length(PROMPT_TOKENS, found.config)
    asker = Asker(
        model,
        tokenizer,
        arguments.sampling,
        {**given, "max_new_tokens": most_new},
        arguments.system_prompt,
        longest_prompt,
        arguments.max_slice_nums,
        arguments.seed,
    )
    slices = arguments.max_slice_nums or asker.model.config.slicing["max_slice_nums"]
    settings = {
        "sampling": arguments.sampling,
        **{name: asker.settings[name] for name in GENERATION if name in asker.settings},
        "max_new_tokens": most_new,
        "max_inp_length": longest_prompt,
        "max_slice_nums": slices,
        "system_prompt": arguments.system_prompt,
        "seed": arguments.seed,
        "dtype": dtype,
        "device": asker.model.device.type,
    }
    return asker, settings


def run(arguments: argparse.Namespace) -> int:
    """The program, after its flags; returns the exit status.

    Raises:
        WrongCall: with all that is wrong with flags, pictures and the model.
        ValueError: when the model cannot be loaded, or the question not be answered.
    """
    problems, found, pictures = flag_problems(arguments), None, []
    try:
        found = find_model(arguments.model, arguments.base, arguments.cache_dir)
        problems += model_problems(arguments, found.config)
    except UserError as error:
        problems += str(error).splitlines()
    for path in arguments.image:
        try:
            pictures.append(open_picture(path))
        except ValueError as error:
            problems.append(f"--image: {error}")
    if problems:
        raise WrongCall("\n".join(problems))
    asker, settings = load_asker(arguments, found)

    def record(question: str, images: Sequence[str], answer: Answer) -> dict:
        return {
            "question": question,
            "images": ["embedded" if is_data_uri(image) else image for image in images],
            "answer": answer.text,
            "model": arguments.model,
            "kind": found.kind,
            "settings": settings,
            "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": answer.answer_tokens,
            "seconds": round(answer.seconds, 3),
        }

    if arguments.question is None:
        if arguments.json:
            return answer_json_lines(asker, record)
        if not asker.streams:
            logger.info("beam search gives answers whole; --num_beams 1 gives them word by word")
        return converse(asker, pictures)
    asker.restart()
    question = [{"role": "user", "content": arguments.question}]
    answer = asker.answer(question, pictures, None if arguments.json else _write)
    if not arguments.json:
        _write("\n")
    if answer.stopped:
        return INTERRUPTED
    if arguments.json:
        _write_json(record(arguments.question, arguments.image, answer))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = build_parser().parse_args(argv)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):  # bytes that are no text are seen; a terminal without a character shows ?
            stream.reconfigure(errors=errors)
    try:
        status = run(arguments)
    except (ValueError, torch.OutOfMemoryError) as error:
        lines = str(error).splitlines() if isinstance(error, UserError) else [_one_line(error)]
        if arguments.json:
            _write_json({"error": "; ".join(lines)})
        sys.stderr.write("".join(f"chat.py: {line}\n" for line in lines))
        status = 2 if isinstance(error, WrongCall) else 1
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            _write("\n")
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of the answer has left: nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
