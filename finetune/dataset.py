"""Training data: conversations and pictures in, padded batches out.

    from finetune.dataset import SupervisedDataset, data_collator, load_samples
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples("data/train.json"))
    batch = data_collator([dataset[0], dataset[1]], max_length=2048)

What a sample becomes is decided in `minicpmv/conversation.py`, which `chat()` uses too; what a picture file becomes, in
`pictures.py`. Shapes: B samples, L tokens of the longest sample, S slices of one sample.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchvision import transforms

if not __package__:  # `import dataset` from inside finetune/, as the original's scripts did
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.data_files import Samples
from finetune.data_files import load_samples as load_samples
from finetune.errors import shown
from finetune.minicpmv.configuration_minicpm import MiniCPMVConfig
from finetune.minicpmv.conversation import (
    IGNORE_INDEX,
    Turn,
    encode,
    encode_text,
    text_turns,
)
from finetune.minicpmv.image_slicing import MEAN, STD, placeholder, plan_slices, raw_pixels, slicing_of
from finetune.pictures import load_image, map_pictures, picture_size
from finetune.sample_check import check_sample, is_nan, remarks_of
from finetune.waiting import reported

logger = logging.getLogger(__name__)

MAX_TRUNCATION_WARNINGS = 5  # per process
BYTES_PER_TOKEN = 4  # of English, where an estimate is enough


class SampleError(ValueError):
    """A sample that cannot be used; the message says which, where and why."""

    def __init__(self, message: str):
        # A DataLoader worker's error comes back as its whole traceback in one text; its last line is the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong with one sample. No tuple, since Trainer takes those of a batch apart."""

    index: int
    """in the data set"""
    file: str | None
    number: int
    """in its file"""
    id: object
    cause: str
    tokens: int = 1
    """of the sample, where it is masked and its picture tells no more"""

    def __str__(self) -> str:
        return f"{self.file + ': ' if self.file else ''}sample {self.number} (id {shown(self.id)}): {self.cause}"


class Repeated(int):
    """Index of a sample that fills up the last step of an epoch, where there are fewer samples than processes have room
    for: the item has nothing supervised, so that the step is what one process would make of the samples."""


class Measure(NamedTuple):
    """Length of a sample in tokens, before any truncation."""

    tokens: int
    picture_tokens: int
    slices: tuple[int, ...]
    """of each picture, the overview counted"""
    supervised: int
    kept: int
    """supervised tokens that the dataset's `max_length` leaves"""


def build_transform() -> Callable[[Image.Image], torch.Tensor]:
    """RGB picture -> float32 (3, H, W) in -1..1, as the checkpoints were trained."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize([MEAN] * 3, [STD] * 3)])


class SupervisedDataset(Dataset):
    """Conversations with pictures, tokenized and sliced when they are asked for.

    Args:
        raw_data: samples `{"id", "image", "conversations": [{"role", "content"}]}`; `image` is a path, a list of
            paths, a mapping from mark to path, or absent; a `data:` URI may stand for any path. `"weight": 0` in an
            assistant turn (or `"loss": false`, `"train": false`) masks that answer. A text in `system` (2.5) is a
            system turn in front.
        transform: PIL picture -> normalised float tensor (3, H, W), see `build_transform`; None: pixels stay uint8
            (3, H, W), which `MiniCPMV` normalises on its device to the same values.
        tokenizer: the checkpoint's tokenizer.
        slice_config: `max_slice_nums`, `scale_resolution`, `patch_size` (pixels); None: overviews alone.
        llm_type: `llama3` (2.5) or `minicpm` (2.0).
        patch_size: pixels, where `slice_config` has none.
        query_nums: tokens per slice: 96 (2.5), 64 (2.0).
        batch_vision: pixels as strips (3, patch, N * patch), as 2.5 takes them; else (3, H, W).
        max_length: truncate samples to so many tokens, see `truncate`; None: leave that to the collator.
        image_folder: where relative picture paths begin; None: at the folder of the sample's file, where `raw_data`
            comes from `load_samples`, else at the working directory.
        image_folder_only: a sample whose picture path leads out of `image_folder` cannot be used.
        max_positions: most tokens that the language model takes, for messages.

    An item: `input_ids`, `position_ids`, `labels` (L,) int64, labels already shifted; `attention_mask` (L,) bool;
    `pixel_values`, a list of S tensors; `tgt_sizes` (S, 2) int32, patches high and wide; `image_bound` (S, 2) int64,
    start inclusive, end exclusive; `id`, for messages.

    Raises:
        SampleError: from `dataset[i]`, naming the sample and the cause; no other sample is taken in its place. With
            `masks_bad` there is none: the item has nothing supervised, and `bad`, a `Problem`.
    """

    def __init__(
        self,
        raw_data: Sequence[Mapping],
        transform: Callable[[Image.Image], torch.Tensor] | None,
        tokenizer,
        slice_config: Mapping | None,
        llm_type: str = "minicpm",
        patch_size: int = 14,
        query_nums: int = 64,
        batch_vision: bool = False,
        max_length: int | None = None,
        image_folder: str | os.PathLike | None = None,
        image_folder_only: bool = False,
        max_positions: int | None = None,
    ):
        self.raw_data = raw_data
        self.transform = transform
        self.tokenizer = tokenizer
        self.slice_config = slice_config
        self.llm_type = llm_type
        self.patch_size = patch_size
        self.query_nums = query_nums
        self.batch_vision = batch_vision
        self.max_length = max_length
        self.image_folder = image_folder
        self.image_folder_only = image_folder_only
        self.max_positions = max_positions
        self.lengths: list[int] | None = None  # in tokens, where batches are to be grouped by length
        self._last: tuple[int, Samples, object] | None = None  # see `_raw`
        self.gathered: object = None  # what `remarks` said of all samples: see `checks.Remarks`
        self.loads: np.ndarray | None = None  # (samples, 2), where processes are to get as much work: see `check`
        self.masks_bad = False  # give what stands for a bad sample, rather than raise: see `_masked`
        self.masked: dict[int, Problem] = {}  # known to be bad, by index: they are not looked at again

    @classmethod
    def for_checkpoint(
        cls,
        config: MiniCPMVConfig,
        tokenizer,
        samples: Sequence[Mapping],
        max_length: int | None = None,
        image_folder: str | os.PathLike | None = None,
        image_folder_only: bool = False,
    ) -> SupervisedDataset:
        """The data set as `finetune.py` trains on it: pixels in uint8, everything else as the checkpoint's config
        says."""
        return cls(
            samples,
            None,
            tokenizer,
            config.slicing,
            llm_type=config.llm_type,
            patch_size=config.patch_size,
            query_nums=config.query_num,
            batch_vision=config.llm_type == "llama3",
            max_length=max_length,
            image_folder=image_folder,
            image_folder_only=image_folder_only,
            max_positions=config.max_position_embeddings,
        )

    def __len__(self) -> int:
        return len(self.raw_data)

    def __getitem__(self, index: int) -> dict:
        item = self._or_masked(index, self._item)
        if isinstance(index, Repeated):
            item["labels"] = torch.full_like(item["labels"], IGNORE_INDEX)
        return item

    def _item(self, index: int) -> dict:
        item = self._encode(index)
        return item if self.max_length is None else truncate(item, self.max_length)

    def prompt(self, index: int, turn: int) -> dict:
        """What the model reads before it gives the answer at `turn`: an item, not truncated, that ends with the words
        after which the assistant speaks. Answers further up are those of the sample."""
        return self._or_masked(index, partial(self._encode, generation_prompt=True, until=turn))

    def prompts(self, index: int) -> list[tuple[int, int]]:
        """(turn, tokens of its prompt) of every answer with a weight other than 0; no picture is decoded.

        Raises:
            ValueError: as `measure`.
        """
        turns, _ = self._turns(index)

        def tokens(turn: int) -> int:
            return len(encode_text(turns[:turn], self.tokenizer, self.llm_type, self.query_nums, True)[0])

        return [(number, tokens(number)) for number, turn in enumerate(turns) if turn.supervised]

    def _or_masked(self, index: int, make: Callable[[int], dict]) -> dict:
        """`make(index)`, or what stands for a sample that turns out to be bad, where that is asked for: other processes
        of the run, which have met no error, would wait for this one's share of the step."""
        if not self.masks_bad:
            return make(index)
        if index in self.masked:
            return self._masked(self.masked[index])
        try:
            return make(index)
        except MemoryError:  # no fault of the sample
            raise
        except SampleError as error:
            cause = str(error).removeprefix(f"{self.name(index)}: ")
        except Exception as error:  # whatever a decoder raises
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return self._masked(Problem(int(index), *self.place(index), cause))

    def _masked(self, problem: Problem) -> dict:
        """An item that teaches nothing: BOS alone, no picture, nothing supervised. Its `bad` says why."""
        return {
            "input_ids": torch.tensor([self.tokenizer.bos_token_id]),
            "labels": torch.tensor([IGNORE_INDEX]),
            "position_ids": torch.zeros(1, dtype=torch.int64),
            "attention_mask": torch.ones(1, dtype=torch.bool),
            "image_bound": torch.zeros(0, 2, dtype=torch.int64),
            "pixel_values": [],
            "tgt_sizes": torch.zeros(0, 2, dtype=torch.int32),
            "id": self.name(problem.index),
            "bad": problem,
        }

    def _encode(self, index: int, **prompt) -> dict:
        try:
            sample = self.sample(index)
            item = encode(
                sample["conversations"],
                map_pictures(sample.get("image"), lambda picture: self.load_image(picture, index)),
                self.tokenizer,
                self.llm_type,
                self.query_nums,
                self.slice_config,
                patch_size=self.patch_size,
                as_strips=self.batch_vision and self.transform is not None,
                transform=self.transform or raw_pixels,
                **prompt,
            )
        except ValueError as error:
            raise SampleError(f"{self.name(index)}: {error}") from error
        item["id"] = self.name(index, sample)
        return item

    def sample(self, index: int) -> Mapping:
        """The sample, checked in all that needs no look at its pictures, and in the form that all else reads: with
        its system text as a turn in front, and `weight` where an answer is not learned.

        Raises:
            ValueError: saying what is wrong with it.
        """
        return check_sample(self._raw(index), self.llm_type)

    def remarks(self, index: int) -> dict[str, list[str]]:
        """What is no fault of a sample and yet worth a word, see `sample_check.remarks_of`."""
        try:
            return remarks_of(self._raw(index), self.tokenizer, self.llm_type)
        except ValueError:  # not even readable, which is a fault
            return {}

    def _raw(self, index: int):
        """The sample as it stands in the data. Of files the last is kept: a look at all data asks for each twice."""
        if not isinstance(self.raw_data, Samples):
            return self.raw_data[index]
        if self._last is None or self._last[0] != index or self._last[1] is not self.raw_data:
            self._last = (index, self.raw_data, self.raw_data[index])
        return self._last[2]

    def turn_in_data(self, index: int, turn: int) -> int:
        """Number of a turn of `sample(index)` in the data, where a field may stand for the system turn."""
        return turn - len(self.sample(index)["conversations"]) + len(self.raw_data[index]["conversations"])

    def name(self, index: int, sample: Mapping | None = None) -> str:
        """File, place in it and id of a sample, for messages; `sample` saves reading it again."""
        path, number, identity = self.place(index, sample)
        return f"{path + ': ' if path else ''}sample {number} (id {shown(identity)})"

    def place(self, index: int, sample: Mapping | None = None) -> tuple[str | None, int, object]:
        """(file, or None; index in it; id) of a sample."""
        try:
            sample = self.raw_data[index] if sample is None else sample
        except ValueError:  # not even readable
            sample = None
        identity = sample.get("id") if isinstance(sample, Mapping) else None
        identity = None if is_nan(identity) else identity
        path, number = self.raw_data.location(index) if isinstance(self.raw_data, Samples) else (None, index)
        return path, number, identity

    def folder(self, index: int) -> str | os.PathLike | None:
        """Where the relative picture paths of a sample begin."""
        if not self.image_folder and isinstance(self.raw_data, Samples):
            return self.raw_data.folder(index)
        return self.image_folder or None

    def load_image(self, picture, index: int) -> Image.Image:
        """A picture of the sample, see `pictures.load_image`."""
        with self._reported(picture, index):
            return load_image(picture, self.folder(index), self.image_folder_only)

    def _size(self, picture, index: int) -> tuple[int, int]:
        """Likewise, see `pictures.picture_size`."""
        with self._reported(picture, index):
            return picture_size(picture, self.folder(index), self.image_folder_only)

    def _reported(self, picture, index: int) -> AbstractContextManager[None]:
        """Names the sample and its picture where reading that takes long, see `waiting.reported`."""
        return reported(partial(self._named, picture, index, self._raw(index)))

    def _named(self, picture, index: int, sample: Mapping) -> str:
        named = shown(picture, quotes=False) if isinstance(picture, str) else "embedded"
        return f"{self.name(index, sample)}, picture {named}"

    def measure(self, index: int) -> Measure:
        """Lengths of a sample, from the headers of its pictures; nothing is decoded.

        Raises:
            ValueError: as `sample` and `picture_size`.
        """
        turns, grids = self._turns(index)
        input_ids, labels = encode_text(turns, self.tokenizer, self.llm_type, self.query_nums)
        supervised = labels != IGNORE_INDEX
        kept = supervised if self.max_length is None else supervised[: self.max_length]
        slices = tuple(map(slice_count, grids))
        return Measure(len(input_ids), self.query_nums * sum(slices), slices, int(supervised.sum()), int(kept.sum()))

    def check(self, index: int) -> tuple[int, int]:
        """Finds what makes a sample useless in training, less what decoding its pictures would find.

        Returns:
            tokens of its text, estimated, and slices of its pictures, as far as `max_length` has room for them.

        Raises:
            ValueError: as `measure`, and where nothing is supervised, or nothing after truncation to `max_length`.
        """
        turns, grids = self._turns(index)
        # No token is shorter than a byte, and the words around a turn ("assistant", two newlines, three special
        # tokens, BOS) are at most 16 tokens, so that most samples need no tokenizer.
        text_bytes = sum(len(turn.text.replace("<unk>", "").encode()) + 16 for turn in turns)
        slices = sum(map(slice_count, grids))
        fits = self.max_length is None or text_bytes + self.query_nums * slices < self.max_length
        if not fits or not any(turn.supervised for turn in turns):
            self.check_supervised(self.measure(index))
        limit = self.max_length or sys.maxsize
        slices = min(slices, limit // self.query_nums)
        return min(text_bytes // BYTES_PER_TOKEN, limit - self.query_nums * slices), slices

    def check_supervised(self, measure: Measure) -> None:
        """
        Raises:
            ValueError: when no token is supervised, or none after truncation to `max_length`.
        """
        if not measure.supervised:
            raise ValueError("every answer has weight 0; there is nothing to learn")
        if not measure.kept:
            raise ValueError(_lost_answer(measure.tokens, measure.picture_tokens, self.max_length, self.max_positions))

    def grids(self, index: int) -> list[tuple[int, int] | None]:
        """(columns, rows) of each picture's slices, None for an overview alone, from the headers of the pictures."""
        return self._turns(index)[1]

    def _turns(self, index: int) -> tuple[list[Turn], list[tuple[int, int] | None]]:
        """A sample's turns with placeholder text for its pictures, and the grid of each picture."""
        sample = self.sample(index)
        slicing = slicing_of(self.slice_config, self.patch_size)
        sizes = map_pictures(sample.get("image"), lambda picture: self._size(picture, index))
        grids = []

        def describe(size: tuple[int, int]) -> str:
            grids.append(plan_slices(size, **slicing)[1])
            return placeholder(grids[-1])

        return text_turns(sample["conversations"], sizes, describe), grids


def slice_count(grid: tuple[int, int] | None) -> int:
    """Slices of a picture, the overview counted."""
    return 1 + (grid[0] * grid[1] if grid else 0)


def _lost_answer(tokens: int, picture_tokens: int, max_length: int, max_positions: int | None = None) -> str:
    advice = []
    if max_positions is None or tokens <= max_positions:
        advice.append(f"raise --model_max_length to {tokens}")
    if picture_tokens and tokens - picture_tokens < max_length:
        advice.append("lower --max_slice_nums")
    if not advice:
        advice.append(f"shorten its conversation, since the model takes {max_positions} tokens at most")
    return (
        f"has {tokens} tokens ({picture_tokens} of them for its pictures) and would lose its whole answer at "
        f"model_max_length {max_length}: {', or '.join(advice)}"
    )


def truncate(item: dict, max_length: int) -> dict:
    """Cut an item to `max_length` tokens, from the end.

    What stands behind the last supervised token that is kept teaches nothing and is cut too. So the cut never falls
    inside a picture (no picture token is supervised), and slices whose placeholder is gone go with it.

    Raises:
        SampleError: when nothing supervised would be left, naming the sample, its tokens and the flag.
    """
    length = len(item["input_ids"])
    if length <= max_length:
        return item
    supervised = torch.nonzero(item["labels"][:max_length] != IGNORE_INDEX)
    name = item.get("id", "a sample")
    if len(supervised) == 0:
        pictures = int(item["image_bound"].view(-1, 2).diff(dim=1).sum()) if len(item["pixel_values"]) else 0
        raise SampleError(f"{name}: {_lost_answer(length, pictures, max_length)}")
    end = int(supervised[-1]) + 1
    _warn_truncated(f"{name} has {length} tokens, cut to {end} (--model_max_length {max_length})")
    slices = int((item["image_bound"].view(-1, 2)[:, 1] <= end).sum()) if len(item["pixel_values"]) else 0
    per_token = ("input_ids", "position_ids", "labels", "attention_mask")
    per_slice = ("pixel_values", "tgt_sizes", "image_bound")
    return {
        **item,
        **{key: item[key][:end] for key in per_token if key in item},
        **{key: item[key][:slices] for key in per_slice if key in item},
    }


_truncations = 0


def _warn_truncated(message: str) -> None:
    global _truncations
    _truncations += 1
    if _truncations <= MAX_TRUNCATION_WARNINGS:
        last = "; further ones are not shown" if _truncations == MAX_TRUNCATION_WARNINGS else ""
        logger.warning("%s%s", message, last)


def data_collator(examples: Sequence[dict], padding_value: int = 0, max_length: int = 2048) -> dict:
    """Batch items, padded on the right.

    Args:
        examples: items of `SupervisedDataset`.
        padding_value: token id of padding.
        max_length: longer items are truncated, see `truncate`.

    Returns:
        `input_ids`, `position_ids`, `labels` (B, L) int64, `attention_mask` (B, L) bool; `pixel_values`,
        `tgt_sizes`, `image_bound` as lists per sample; `ids`, the items' `id`s; `label_index` (K,) and `token_index`
        (T,) int64, the supervised positions and the tokens in the flattened batch; `lengths` and
        `independent_samples`, see `MiniCPMV.forward`; `bad`, the `Problem`s of items that stand for bad samples, where
        there are any.
    """
    items = [truncate(example, max_length) for example in examples]

    def pad(key: str, value: int) -> torch.Tensor:
        return pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)

    labels = pad("labels", IGNORE_INDEX)
    lengths = [len(item["input_ids"]) for item in items]
    attention_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    bad = [item["bad"] for item in items if "bad" in item]
    return {
        "input_ids": pad("input_ids", padding_value),
        "position_ids": pad("position_ids", 0),
        "labels": labels,
        "attention_mask": attention_mask,
        "pixel_values": [item["pixel_values"] for item in items],
        "tgt_sizes": [item["tgt_sizes"] for item in items],
        "image_bound": [item["image_bound"] for item in items],
        "label_index": torch.nonzero(labels.flatten() != IGNORE_INDEX).flatten(),
        "token_index": torch.nonzero(attention_mask.flatten()).flatten(),
        "lengths": lengths,
        "ids": [item.get("id") for item in items],
        "independent_samples": True,
        **({"bad": bad} if bad else {}),
    }
