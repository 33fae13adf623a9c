"""From a conversation with pictures to token ids, labels and slices: the one path for training and for `chat()`.

A conversation is a list of messages `{"role": "user" | "assistant" | "system", "content": text}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from .image_slicing import placeholder, slice_image, slicing_of, to_pixels
from .vision import patch_grid, to_strip

IGNORE_INDEX = -100
IMAGE_MARK = "<image>"
LLAMA3_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
MINICPM_ROLES = {"user": "<用户>", "assistant": "<AI>"}


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
    transform: Callable[[Image.Image], torch.Tensor] = to_pixels,
    generation_prompt: bool = False,
) -> dict:
    """Token ids, labels and slices of one conversation.

    Args:
        messages: the conversation; `<image>` in a user turn says where a picture goes.
        images: RGB pictures in the order of their marks, or a mapping from mark (`<image_00>`) to picture.
        llm_type: `llama3` or `minicpm`.
        query_num: tokens per slice.
        slice_config: `max_slice_nums`, `scale_resolution`, `patch_size`; None for overviews alone.
        patch_size: pixels, where `slice_config` has none.
        as_strips: pixels as (3, P, N * P) strips rather than (3, H, W).
        transform: PIL picture -> normalised float tensor (3, H, W).
        generation_prompt: end with the words after which the assistant speaks (inference).

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
        return placeholder(grid, query_num)

    turns = text_turns(messages, images, take)
    input_ids, labels = encode_text(turns, tokenizer, llm_type, generation_prompt)
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

    One `<image>` per picture in the user turns, in order, or the named marks of a mapping; pictures without any mark
    go in front of the first user turn, each followed by a newline. A message's content may also be a list of texts
    and pictures, joined by newlines.

    Raises:
        ValueError: when marks and pictures do not match one to one.
    """
    named = isinstance(images, Mapping)
    waiting = dict(images) if named else list(images)
    words = sorted(waiting, key=len, reverse=True) if named and waiting else [IMAGE_MARK]
    marks = re.compile("|".join(map(re.escape, words)))
    texts = [m["content"] for m in messages if m["role"] == "user" and isinstance(m["content"], str)]
    found = [mark for text in texts for mark in marks.findall(text)]
    expected = sorted(waiting) if named and waiting else [IMAGE_MARK] * len(waiting)
    in_front = bool(waiting) and not found
    if found and sorted(found) != expected:
        raise ValueError(
            f"the user turns have {len(found)} picture mark(s) ({', '.join(sorted(set(found)))}) "
            f"for {len(waiting)} picture(s){' named ' + ', '.join(expected) if named else ''}; "
            f"expected one mark for each picture, or none"
        )
    placed = []
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            parts = [part for item in content for part in (item, "\n")][:-1]
        elif role == "user" and found:
            parts, end = [], 0
            for match in marks.finditer(content):
                parts += [content[end : match.start()], waiting[match[0]] if named else waiting.pop(0)]
                end = match.end()
            parts.append(content[end:])
        else:
            parts = [content]
        if role == "user" and in_front:
            parts = [part for image in (waiting.values() if named else waiting) for part in (image, "\n")] + parts
            in_front = False
        placed.append((role, parts))
    return placed


def text_turns(messages: Sequence[Mapping], images, describe: Callable) -> list[tuple[str, str]]:
    """(role, text) of every message, each picture replaced by `describe(picture)`, in reading order."""
    return [
        (role, "".join(part if isinstance(part, str) else describe(part) for part in parts))
        for role, parts in place_pictures(messages, images)
    ]


def encode_text(
    turns: Sequence[tuple[str, str]], tokenizer, llm_type: str, generation_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, shifted labels), int64, of (role, text) turns whose pictures are already placeholder text."""
    if llm_type == "llama3":
        return _encode_llama3(turns, tokenizer, generation_prompt)
    if llm_type == "minicpm":
        return _encode_minicpm(turns, tokenizer, generation_prompt)
    raise ValueError(f"llm_type is {llm_type!r}, expected 'llama3' (MiniCPM-Llama3-V 2.5) or 'minicpm' (MiniCPM-V 2.0)")


def _encode_llama3(turns, tokenizer, generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """Llama 3's chat template: BOS, then header, trimmed text and <|eot_id|> of every turn.

    Every turn begins and ends with a special token and text never merges across one, so encoding header and body
    one by one gives the ids of the whole.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, asked = [tokenizer.bos_token_id], [False]
    for role, text in turns:
        header, body = ids_of(LLAMA3_HEADER.format(role=role)), ids_of(text.strip() + "<|eot_id|>")
        ids += header + body
        asked += [False] * len(header) + [role == "assistant"] * len(body)
    if generation_prompt:
        header = ids_of(LLAMA3_HEADER.format(role="assistant"))
        ids += header
        asked += [False] * len(header)
    ids = np.array(ids, dtype=np.int64)
    return ids, _shift(np.where(asked, ids, IGNORE_INDEX))


def _encode_minicpm(turns, tokenizer, generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """BOS and `<用户>`question`<AI>`answer... encoded as one string; `</s>` stands at the end of the last answer.

    Turns are found again in the ids by their role tokens; a role token that a user typed in a text is counted too.
    """
    text = "".join(MINICPM_ROLES[role] + content for role, content in turns)
    if generation_prompt:
        text += MINICPM_ROLES["assistant"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends_with_answer = turns[-1][0] == "assistant" and not generation_prompt
    ids = np.array([tokenizer.bos_token_id, *ids] + [tokenizer.eos_token_id] * ends_with_answer, dtype=np.int64)
    role_ids = [tokenizer.convert_tokens_to_ids(token) for token in MINICPM_ROLES.values()]
    marks = np.flatnonzero(np.isin(ids, role_ids))
    typed = [sum(content.count(token) for token in MINICPM_ROLES.values()) for _, content in turns]
    if len(marks) != len(turns) + sum(typed) + generation_prompt:
        raise ValueError(
            f"the tokenizer does not keep {' and '.join(MINICPM_ROLES.values())} whole: found {len(marks)} role "
            f"tokens for {len(turns)} turns; is this the tokenizer of MiniCPM-V 2.0?"
        )
    first = np.cumsum([0, *(1 + n for n in typed)])  # index in `marks` of each turn's role token
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    for number, (role, _) in enumerate(turns):
        if role != "assistant":
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
