"""From a conversation with pictures to token ids, labels and slices: the one path for training and for `chat()`.

A conversation is a list of messages `{"role": "user" | "assistant" | "system", "content": text}`; an answer with
`"weight": 0` is not supervised.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .image_slicing import normalised_pixels, placeholder, slice_image, slicing_of
from .vision import patch_grid, to_strip

IGNORE_INDEX = -100
IMAGE_MARK = "<image>"
NUMBERED_MARK = re.compile(r"<image_(\d+)>")
LLAMA3_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
MINICPM_ROLES = {"user": "<用户>", "assistant": "<AI>"}


class Turn(NamedTuple):
    """A message whose pictures are already placeholder text (see `placeholder`)."""

    role: str
    text: str
    supervised: bool


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
    """The messages, or the first `until` of them, with each picture replaced by `describe(picture)`, in reading
    order."""
    return [
        Turn(
            role,
            "".join(part if isinstance(part, str) else describe(part) for part in parts),
            role == "assistant" and message.get("weight") != 0,
        )
        for message, (role, parts) in zip(messages[:until], place_pictures(messages, images)[:until], strict=True)
    ]


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
    ids, asked = [tokenizer.bos_token_id], [False]
    for role, text, supervised in turns:
        header = _llama3_header(backend, role)
        body = backend.encode(text.strip() + "<|eot_id|>", add_special_tokens=False).ids
        ids += header + body
        asked += [False] * len(header) + [supervised] * len(body)
    if generation_prompt:
        header = _llama3_header(backend, "assistant")
        ids += header
        asked += [False] * len(header)
    ids = np.array(ids, dtype=np.int64)
    return ids, _shift(np.where(asked, ids, IGNORE_INDEX))


@functools.lru_cache(maxsize=32)
def _llama3_header(backend, role: str) -> list[int]:
    return backend.encode(LLAMA3_HEADER.format(role=role), add_special_tokens=False).ids


def _encode_minicpm(turns: Sequence[Turn], tokenizer, generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """BOS and `<用户>`question`<AI>`answer... encoded as one string; `</s>` stands at the end of the last answer.

    Turns are found again in the ids by their role tokens; a role token that a user typed in a text is counted too.
    """
    text = "".join(MINICPM_ROLES[turn.role] + turn.text for turn in turns)
    if generation_prompt:
        text += MINICPM_ROLES["assistant"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends_with_answer = turns[-1].role == "assistant" and not generation_prompt
    ids = np.array([tokenizer.bos_token_id, *ids] + [tokenizer.eos_token_id] * ends_with_answer, dtype=np.int64)
    role_ids = [tokenizer.convert_tokens_to_ids(token) for token in MINICPM_ROLES.values()]
    marks = np.flatnonzero(np.isin(ids, role_ids))
    typed = [sum(turn.text.count(token) for token in MINICPM_ROLES.values()) for turn in turns]
    if len(marks) != len(turns) + sum(typed) + generation_prompt:
        raise ValueError(
            f"the tokenizer does not keep {' and '.join(MINICPM_ROLES.values())} whole: found {len(marks)} role "
            f"tokens for {len(turns)} turns; is this the tokenizer of MiniCPM-V 2.0?"
        )
    first = np.cumsum([0, *(1 + n for n in typed)])  # index in `marks` of each turn's role token
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    for number, turn in enumerate(turns):
        if not turn.supervised:
            continue
        begin = marks[first[number]]
        is_last = first[number + 1] >= len(marks)
        end = len(ids) - ends_with_answer if is_last else marks[first[number + 1]]
        labels[begin : end - 1] = ids[begin + 1 : end]
        labels[end - 1] = tokenizer.eos_token_id
    return ids, labels


def _shift(labels: np.ndarray) -> np.ndarray:
    """labels[t] <- labels[t + 1]: the one place where 2.5's labels are shifted."""
    return np.append(labels[1:], IGNORE_INDEX)


def find_image_bound(input_ids: np.ndarray, tokenizer, query_num: int, slices: int) -> torch.Tensor:
    """(S, 2) int64: start (inclusive) and end (exclusive) of the placeholder run of each slice.

    Raises:
        ValueError: when the ids hold other picture tokens than the placeholders of `slices` slices, which happens
            when a text contains `<image>`, `</image>` or `<unk>` of its own.
    """
    starts = np.flatnonzero(input_ids == tokenizer.im_start_id) + 1
    ends = np.flatnonzero(input_ids == tokenizer.im_end_id)
    if len(starts) != slices or len(ends) != slices or (ends - starts != query_num).any():
        raise ValueError(
            f"{slices} slice(s) of pictures, but the text holds {len(starts)} <image> and {len(ends)} </image> tokens; "
            "remove these words from the conversation, or add the missing picture"
        )
    return torch.from_numpy(np.stack([starts, ends], axis=1).astype(np.int64))
