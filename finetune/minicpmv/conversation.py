"""From a conversation with pictures to token ids, labels and slices: the one path for training and for `chat()`.

A conversation is a list of messages `{"role": "user" | "assistant" | "system", "content": text}`; an answer with
`"weight": 0` is not supervised. Text is text: the tokens that make turns and pictures are written here alone, and where
their words stand in a message they are encoded as the characters that they are. Grounding tags stay tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .image_slicing import normalised_pixels, placeholder, slice_image, slicing_of
from .vision import patch_grid, to_strip

IGNORE_INDEX = -100
IMAGE_MARK = "<image>"
PICTURE_TOKENS = ("<image>", "</image>", "<slice>", "</slice>", "<unk>")
NUMBERED_MARK = re.compile(r"<image_(\d+)>")
LLAMA3_END = "<|eot_id|>"
LLAMA3_TOKEN = re.compile(r"<\|\w+\|>")
LLAMA3_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
MINICPM_ROLES = {"user": "<用户>", "assistant": "<AI>"}


GROUNDING_TAGS = tuple(f"<{end}{kind}>" for kind in ("ref", "box", "quad", "point") for end in ("", "/"))
ALONE = "\ue000"  # a character that no vocabulary has a token for, nor a longer token with it


class Placeholder(str):
    """What stands for a picture in a turn (see `placeholder`): the one text whose picture tokens are tokens."""


class Turn(NamedTuple):
    """A message."""

    role: str
    parts: tuple[str, ...]
    """texts as they were written, and a `Placeholder` for each picture; no two texts behind one another"""
    supervised: bool

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def trimmed(self) -> tuple[str, ...]:
        """`parts` without whitespace at the ends of the whole."""
        *front, last = self.parts or ("",)
        first, *rest = [*front, last if isinstance(last, Placeholder) else last.rstrip()]
        return (first if isinstance(first, Placeholder) else first.lstrip(), *rest)


class Vocabulary(NamedTuple):
    """Which words of a text are tokens of their own for a tokenizer, see `vocabulary`."""

    control: re.Pattern
    """those that no message may make: turns, pictures, beginning and end of text"""
    kept: re.Pattern
    """those that a message may make; with a group, so that `split` gives them too"""
    unsplit: re.Pattern
    """those of `control` that sentencepiece itself keeps whole"""


def encode(
    messages: Sequence[Mapping[str, str]],
    images: Sequence[Image.Image] | Mapping[str, Image.Image],
    tokenizer,
    llm_type: str,
    query_num: int,
    slice_config: Mapping | None,
    *,
    patch_size: int = 14,
    as_strips: bool,
    transform: Callable[[Image.Image], torch.Tensor] = normalised_pixels,
    generation_prompt: bool = False,
    until: int | None = None,
) -> dict:
    """Token ids, labels and slices of one conversation.

    Args:
        messages: the conversation; a mark in a user turn says where a picture goes, see `place_pictures`.
        images: RGB pictures, or a mapping from mark (`<image_00>`) to picture.
        llm_type: `llama3` or `minicpm`.
        query_num: tokens per slice.
        slice_config: `max_slice_nums`, `scale_resolution`, `patch_size`; None for overviews alone.
        patch_size: pixels, where `slice_config` has none.
        as_strips: pixels as (3, P, N * P) strips rather than (3, H, W).
        transform: PIL picture -> tensor (3, H, W): normalised floats, or uint8, which the model normalises itself.
        generation_prompt: end with the words after which the assistant speaks (inference).
        until: encode so many messages only, with the pictures that stand in them.

    Returns:
        `input_ids`, `labels` (L,) int64, labels already shifted: `labels[t]` is what the model must say at t,
        -100 where nothing is asked; `position_ids` (L,); `attention_mask` (L,) bool; `image_bound` (S, 2) int64,
        start inclusive, end exclusive; `pixel_values` list of S tensors; `tgt_sizes` (S, 2) int32, patches high, wide.

    Raises:
        ValueError: roles out of order, marks that do not match the pictures.
    """
    check_roles(messages, llm_type)
    slicing = slicing_of(slice_config, patch_size)
    pixel_values, sizes = [], []

    def take(image: Image.Image) -> str:
        pictures, grid = slice_image(image, **slicing)
        for picture in pictures:
            pixels = transform(picture)
            sizes.append(patch_grid(pixels, slicing["patch_size"]))
            pixel_values.append(to_strip(pixels, slicing["patch_size"]) if as_strips else pixels)
        return placeholder(grid)

    turns = text_turns(messages, images, take, until)
    input_ids, labels = encode_text(turns, tokenizer, llm_type, query_num, generation_prompt)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.arange(len(input_ids)),
        "attention_mask": torch.ones(len(input_ids), dtype=torch.bool),
        "image_bound": find_image_bound(input_ids, tokenizer, query_num, len(pixel_values)),
        "pixel_values": pixel_values,
        "tgt_sizes": torch.tensor(sizes, dtype=torch.int32).view(-1, 2),
    }


def check_roles(messages: Sequence[Mapping], llm_type: str) -> None:
    """User and assistant in turn, the user first; for llama3 a system message may stand in front.

    Raises:
        ValueError: naming the turn.
    """
    if not messages:
        raise ValueError("the conversation is empty")
    turns = list(messages)
    if turns[0].get("role") == "system":
        if llm_type != "llama3":
            raise ValueError("turn 0 has role 'system', which MiniCPM-V 2.0 has no words for; put it in the user turn")
        turns = turns[1:]
        if not turns:
            raise ValueError("the conversation has a system turn and nothing else")
    offset = len(messages) - len(turns)
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.get("role") != expected:
            raise ValueError(
                f"turn {number + offset} has role {turn.get('role')!r}, expected {expected!r} "
                "(user and assistant take turns, the user begins)"
            )


def place_pictures(
    messages: Sequence[Mapping], images: Sequence[Image.Image] | Mapping[str, Image.Image]
) -> list[tuple[str, list[str | Image.Image]]]:
    """(role, parts) of every message, the pictures standing as parts where their marks stood.

    Marks stand in user turns, one for each picture: `<image>`, in order; the names of a mapping; or, for a list,
    `<image_00>`, `<image_01>`... counted from 0. Pictures without any mark go in front of the first user turn, each
    followed by a newline. A message's content may also be a list of texts and pictures, joined by newlines.

    Raises:
        ValueError: when marks and pictures do not match one to one.
    """
    names = sorted(images, key=len, reverse=True) if isinstance(images, Mapping) else []
    pictures = list(images.values() if names else images)
    marks = re.compile("|".join([*map(re.escape, names), IMAGE_MARK, NUMBERED_MARK.pattern]))
    texts = [m["content"] for m in messages if m["role"] == "user" and isinstance(m["content"], str)]
    found = [match[0] for text in texts for match in marks.finditer(text)]
    if found:
        pictures = _in_order_of_marks(found, pictures, images)
    waiting = iter(pictures)
    placed = []
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            parts = [part for item in content for part in (item, "\n")][:-1]
        elif role == "user" and found:
            parts, end = [], 0
            for match in marks.finditer(content):
                parts += [content[end : match.start()], next(waiting)]
                end = match.end()
            parts.append(content[end:])
        else:
            parts = [content]
        if role == "user" and not found:  # the first user turn takes them all
            parts = [part for image in waiting for part in (image, "\n")] + parts
        placed.append((role, parts))
    return placed


def _in_order_of_marks(found: list[str], pictures: list, images: Sequence | Mapping) -> list:
    named = isinstance(images, Mapping) and len(images) > 0
    if found == [IMAGE_MARK] * len(pictures):
        return pictures
    if named and sorted(found) == sorted(images):
        return [images[mark] for mark in found]
    numbers = [int(match[1]) for match in map(NUMBERED_MARK.fullmatch, found) if match]
    if not named and len(numbers) == len(found) and sorted(numbers) == list(range(len(pictures))):
        return [pictures[number] for number in numbers]
    names = f" named {_listed(images)}" if named else ""
    raise ValueError(
        f"the user turns have {len(found)} picture mark(s) ({_listed(found)}) for {len(pictures)} "
        f"picture(s){names}; expected one mark for each picture, or none"
    )


def _listed(marks: Iterable[str]) -> str:
    text = ", ".join(sorted(set(marks)))
    return text if len(text) <= 120 else f"{text[:58]} ... {text[-57:]}"


def text_turns(messages: Sequence[Mapping], images, describe: Callable, until: int | None = None) -> list[Turn]:
    """The messages, or the first `until` of them, with `describe(picture)` in the place of each picture, in reading
    order."""
    return [
        Turn(role, _joined_texts(parts, describe), role == "assistant" and message.get("weight") != 0)
        for message, (role, parts) in zip(messages[:until], place_pictures(messages, images)[:until], strict=True)
    ]


def _joined_texts(parts: Sequence, describe: Callable) -> tuple[str, ...]:
    joined: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            joined.append(Placeholder(describe(part)))
        elif joined and not isinstance(joined[-1], Placeholder):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


@functools.lru_cache(maxsize=16)
def vocabulary(tokenizer, llm_type: str) -> Vocabulary:
    """The words that a tokenizer of this kind of model makes tokens of, wherever they stand."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    roles = MINICPM_ROLES.values() if llm_type == "minicpm" else ()
    named = {*PICTURE_TOKENS, *roles, *filter(None, (tokenizer.bos_token, tokenizer.eos_token))}
    # Copies of 2.5 may not call its own tokens special; it pads with "!", a character of its texts all the same; and
    # what somebody added to a vocabulary for texts of their own is no control token.
    special = {word for word, token in added.items() if token.special or LLAMA3_TOKEN.fullmatch(word)}
    control = named | {word for word in special if word not in GROUNDING_TAGS and len(word) > 1}
    kept = added.keys() - control
    pieces = getattr(tokenizer, "sp_model", None)
    unsplit = {word for word in control if pieces and pieces.piece_to_id(word) in pieces.encode(word)}
    return Vocabulary(*(_any_of(words) for words in (control, kept, unsplit)))


def _any_of(words: Collection[str]) -> re.Pattern:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if words else "((?!))")


def control_words(texts: Iterable[str], tokenizer, llm_type: str) -> list[str]:
    """The words in texts that would be control tokens, were they not encoded as characters."""
    control = vocabulary(tokenizer, llm_type).control
    return [word for text in texts for word in control.findall(text)]


def _texts(turns: Sequence[Turn]) -> Iterator[str]:
    return (part for turn in turns for part in turn.parts if not isinstance(part, Placeholder))


def encode_text(
    turns: Sequence[Turn], tokenizer, llm_type: str, query_num: int, generation_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, shifted labels), int64, with `query_num` placeholder tokens for every slice."""
    if llm_type == "llama3":
        ids, labels = _encode_llama3(turns, tokenizer, generation_prompt)
    elif llm_type == "minicpm":
        ids, labels = _encode_minicpm(turns, tokenizer, generation_prompt)
    else:
        raise ValueError(
            f"llm_type is {llm_type!r}, expected 'llama3' (MiniCPM-Llama3-V 2.5) or 'minicpm' (MiniCPM-V 2.0)"
        )
    # Tokenizing `query_num` times <unk> for every slice would take most of a sample's time.
    counts = np.ones(len(ids), dtype=np.int64)
    counts[1:][(ids[1:] == tokenizer.unk_id) & (ids[:-1] == tokenizer.im_start_id)] = query_num
    return np.repeat(ids, counts), np.repeat(labels, counts)


def _encode_llama3(turns: Sequence[Turn], tokenizer, generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """Llama 3's chat template: BOS, then header, trimmed text and <|eot_id|> of every turn.

    Every turn begins and ends with a special token and text never merges across one, so encoding header and body
    one by one gives the ids of the whole.
    """
    # Beneath the tokenizer's own call, which takes several times as long for short texts.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no tokenizer of MiniCPM-Llama3-V 2.5, which llama3 stands for")
    plain = not control_words(_texts(turns), tokenizer, "llama3")
    ids, asked = [tokenizer.bos_token_id], [False]
    for turn in turns:
        header = _llama3_header(backend, turn.role)
        if plain:
            body = backend.encode("".join(turn.trimmed) + LLAMA3_END, add_special_tokens=False).ids
        else:
            body = [id_ for part in turn.trimmed for id_ in _llama3_text_ids(part, tokenizer, backend)]
            body.append(tokenizer.convert_tokens_to_ids(LLAMA3_END))
        ids += header + body
        asked += [False] * len(header) + [turn.supervised] * len(body)
    if generation_prompt:
        header = _llama3_header(backend, "assistant")
        ids += header
        asked += [False] * len(header)
    ids = np.array(ids, dtype=np.int64)
    return ids, _shift(np.where(asked, ids, IGNORE_INDEX))


def _llama3_text_ids(part: str, tokenizer, backend) -> list[int]:
    """A part of a turn, control words in a text as characters."""
    if isinstance(part, Placeholder):
        return backend.encode(part, add_special_tokens=False).ids
    plain, ids = _plain_backend(backend), []
    for number, text in enumerate(vocabulary(tokenizer, "llama3").kept.split(part)):
        ids += [backend.token_to_id(text)] if number % 2 else plain.encode(text, add_special_tokens=False).ids
    return ids


@functools.lru_cache(maxsize=4)
def _plain_backend(backend):
    """A copy that takes added tokens for text. Set in the tokenizer itself, threads would see it change."""
    described = json.loads(backend.to_str())
    for token in described["added_tokens"]:
        token["special"] = True
    copied = type(backend).from_str(json.dumps(described))
    copied.encode_special_tokens = True
    return copied


@functools.lru_cache(maxsize=32)
def _llama3_header(backend, role: str) -> list[int]:
    return backend.encode(LLAMA3_HEADER.format(role=role), add_special_tokens=False).ids


def _encode_minicpm(turns: Sequence[Turn], tokenizer, generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """BOS and `<用户>`question`<AI>`answer... encoded as one string; `</s>` stands at the end of the last answer."""
    parts = [part for turn in turns for part in (_Token(MINICPM_ROLES[turn.role]), *turn.parts)]
    if generation_prompt:
        parts.append(_Token(MINICPM_ROLES["assistant"]))
    if control_words(_texts(turns), tokenizer, "minicpm"):
        ids = _minicpm_text_ids(parts, tokenizer)
    else:
        ids = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    ends_with_answer = turns[-1].role == "assistant" and not generation_prompt
    ids = np.array([tokenizer.bos_token_id, *ids] + [tokenizer.eos_token_id] * ends_with_answer, dtype=np.int64)
    role_ids = [tokenizer.convert_tokens_to_ids(token) for token in MINICPM_ROLES.values()]
    marks = np.flatnonzero(np.isin(ids, role_ids))
    if len(marks) != len(turns) + generation_prompt:
        raise ValueError(
            f"the tokenizer does not keep {' and '.join(MINICPM_ROLES.values())} whole: found {len(marks)} role "
            f"tokens for {len(turns)} turns; is this the tokenizer of MiniCPM-V 2.0?"
        )
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    ends = [*marks[1:], len(ids) - ends_with_answer]
    for turn, begin, end in zip(turns, marks, ends, strict=False):  # behind them may be the words of the prompt
        if turn.supervised:
            labels[begin : end - 1] = ids[begin + 1 : end]
            labels[end - 1] = tokenizer.eos_token_id
    return ids, labels


class _Token(str):
    """A role's word that opens a turn."""


def _minicpm_text_ids(parts: Sequence[str], tokenizer) -> list[int]:
    """As the tokenizer encodes the parts as one string, but for control words in texts, which become characters."""
    words = vocabulary(tokenizer, "minicpm")
    special = _any_of(tokenizer.all_special_tokens)
    ids: list[int] = []
    pieces = [""]  # since the last special token, cut within what sentencepiece would keep whole

    def flush() -> None:
        for number, piece in enumerate(pieces):
            ids.extend(_continued(piece, tokenizer.sp_model) if number else tokenizer.sp_model.encode(piece))
        pieces[:] = [""]

    for part in parts:
        if isinstance(part, _Token):
            pieces[-1] += part
            continue
        of_picture = isinstance(part, Placeholder)
        for number, text in enumerate((special if of_picture else words.kept).split(part)):
            if number % 2:
                flush()
                ids.append(tokenizer.convert_tokens_to_ids(text))
                continue
            cuts = [] if of_picture else [match.start() + 1 for match in words.unsplit.finditer(text)]
            first, *rest = (text[begin:end] for begin, end in pairwise([0, *cuts, len(text)]))
            pieces[-1] += first
            pieces += rest
    flush()
    return ids


def _continued(text: str, sp_model) -> list[int]:
    """The ids of a text that follows on another, which is not to begin with the space that sentencepiece puts in front
    of all that it encodes: behind a character that is encoded by itself."""
    alone, together = sp_model.encode(ALONE), sp_model.encode(ALONE + text)
    if together[: len(alone)] != alone:
        raise ValueError(
            f"the tokenizer merges {ALONE!r} with what follows it; is this the tokenizer of MiniCPM-V 2.0?"
        )
    return together[len(alone) :]


def _shift(labels: np.ndarray) -> np.ndarray:
    """labels[t] <- labels[t + 1]: the one place where 2.5's labels are shifted."""
    return np.append(labels[1:], IGNORE_INDEX)


def find_image_bound(input_ids: np.ndarray, tokenizer, query_num: int, slices: int) -> torch.Tensor:
    """(S, 2) int64: start (inclusive) and end (exclusive) of the placeholder run of each slice.

    Raises:
        ValueError: when the ids hold other picture tokens than the placeholders of `slices` slices: the tokenizer is
            not that of the model.
    """
    starts = np.flatnonzero(input_ids == tokenizer.im_start_id) + 1
    ends = np.flatnonzero(input_ids == tokenizer.im_end_id)
    if len(starts) != slices or len(ends) != slices or (ends - starts != query_num).any():
        raise ValueError(
            f"{slices} slice(s) of pictures, but the text holds {len(starts)} <image> and {len(ends)} </image> tokens; "
            "is this the tokenizer of the model?"
        )
    return torch.from_numpy(np.stack([starts, ends], axis=1).astype(np.int64))
