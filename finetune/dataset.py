"""Training data: JSON conversations and pictures in, padded batches out.

    from finetune.dataset import SupervisedDataset, data_collator, load_samples
    samples = load_samples("data/train.json")
    dataset = SupervisedDataset(samples, build_transform(), tokenizer, model.config.slicing,
                                llm_type="llama3", query_nums=96, batch_vision=True)
    batch = data_collator([dataset[0], dataset[1]], max_length=2048)

What a sample becomes is decided in `minicpmv/conversation.py`, which `chat()` uses too.
Shapes: B samples, L tokens of the longest sample, S slices of one sample.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import ExifTags, Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchvision import transforms

if not __package__:  # `import dataset` from inside finetune/, as the original's scripts did
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.minicpmv.conversation import (
    IGNORE_INDEX,
    IMAGE_MARK,
    check_roles,
    encode,
    encode_text,
    place_pictures,
    text_turns,
)
from finetune.minicpmv.image_slicing import MEAN, STD, placeholder, plan_slices, slicing_of, upright_rgb

logger = logging.getLogger(__name__)

MAX_PROBLEMS_SHOWN = 20
MAX_TRUNCATION_WARNINGS = 5  # per process
RESERVED_WORDS = (IMAGE_MARK, "</image>", "<slice>", "</slice>", "<unk>")  # the first may stand in user turns


def build_transform() -> Callable[[Image.Image], torch.Tensor]:
    """RGB picture -> float32 (3, H, W) in -1..1, as the checkpoints were trained."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize([MEAN] * 3, [STD] * 3)])


class SupervisedDataset(Dataset):
    """Conversations with pictures, tokenized and sliced when they are asked for.

    Args:
        raw_data: samples `{"id", "image", "conversations": [{"role", "content"}]}`; `image` is a path, a list of
            paths, a mapping from mark to path, or absent.
        transform: PIL picture -> normalised float tensor (3, H, W), see `build_transform`.
        tokenizer: the checkpoint's tokenizer.
        slice_config: `max_slice_nums`, `scale_resolution`, `patch_size` (pixels); None: overviews alone.
        llm_type: `llama3` (2.5) or `minicpm` (2.0).
        patch_size: pixels, where `slice_config` has none.
        query_nums: tokens per slice: 96 (2.5), 64 (2.0).
        batch_vision: pixels as strips (3, patch, N * patch), as 2.5 takes them; else (3, H, W).
        max_length: truncate samples to so many tokens, see `truncate`; None: leave that to the collator.
        image_folder: where relative picture paths begin; None: the working directory.

    An item: `input_ids`, `position_ids`, `labels` (L,) int64, labels already shifted; `attention_mask` (L,) bool;
    `pixel_values`, a list of S float32 tensors; `tgt_sizes` (S, 2) int32, patches high and wide; `image_bound`
    (S, 2) int64, start inclusive, end exclusive; `id`, for messages.

    Raises:
        ValueError: from `dataset[i]`, naming the sample and the cause; no other sample is taken in its place.
    """

    def __init__(
        self,
        raw_data: Sequence[Mapping],
        transform: Callable[[Image.Image], torch.Tensor],
        tokenizer,
        slice_config: Mapping | None,
        llm_type: str = "minicpm",
        patch_size: int = 14,
        query_nums: int = 64,
        batch_vision: bool = False,
        max_length: int | None = None,
        image_folder: str | os.PathLike | None = None,
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

    def __len__(self) -> int:
        return len(self.raw_data)

    def __getitem__(self, index: int) -> dict:
        sample = self.raw_data[index]
        name = f"sample {index} (id {sample.get('id')!r})"
        try:
            item = encode(
                sample["conversations"],
                _map_images(sample.get("image"), lambda path: load_image(path, self.image_folder)),
                self.tokenizer,
                self.llm_type,
                self.query_nums,
                self.slice_config,
                patch_size=self.patch_size,
                as_strips=self.batch_vision,
                transform=self.transform,
            )
        except (ValueError, KeyError, OSError) as error:
            cause = f"field {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{name}: {cause}") from error
        item["id"] = name
        return item if self.max_length is None else truncate(item, self.max_length)

    def length_problem(self, index: int, sizes: Mapping[str, tuple[int, int]]) -> str | None:
        """Why sample `index` would lose its whole answer to truncation, found without decoding a picture; or None.

        Args:
            sizes: (width, height) in pixels of the pictures, upright, by path as `resolve` gives it.
        """
        sample, slicing = self.raw_data[index], slicing_of(self.slice_config, self.patch_size)
        images = _map_images(sample.get("image"), lambda path: sizes[resolve(path, self.image_folder)])
        picture_tokens = 0

        def describe(size: tuple[int, int]) -> str:
            nonlocal picture_tokens
            _, grid, _ = plan_slices(size, **slicing)
            picture_tokens += self.query_nums * (1 + (grid[0] * grid[1] if grid else 0))
            return placeholder(grid, self.query_nums)

        turns = text_turns(sample["conversations"], images, describe)
        # No token is shorter than a byte, and the words around a turn ("assistant", two newlines, three special
        # tokens, BOS) are at most 16 tokens, so that most samples need no tokenizer.
        text_bytes = sum(len(text.replace("<unk>", "").encode()) + 16 for _, text in turns)
        if text_bytes + picture_tokens < self.max_length:
            return None
        input_ids, labels = encode_text(turns, self.tokenizer, self.llm_type)
        if len(input_ids) <= self.max_length or (labels[: self.max_length] != IGNORE_INDEX).any():
            return None
        return _lost_answer(len(input_ids), picture_tokens, self.max_length)


def _lost_answer(tokens: int, picture_tokens: int, max_length: int) -> str:
    return (
        f"has {tokens} tokens ({picture_tokens} of them for its pictures) and would lose its whole answer at "
        f"model_max_length {max_length}: raise --model_max_length to {tokens}, or lower --max_slice_nums"
    )


def load_image(path: str, folder: str | os.PathLike | None = None) -> Image.Image:
    """Read a picture as RGB, turned as its EXIF data says.

    Raises:
        ValueError: naming the path, when the file is missing, no picture, or cut off.
    """
    path = resolve(path, folder)
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(f"picture {path} does not exist") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {path} cannot be decoded, it may be cut off: {error}") from error


def resolve(path: str, folder: str | os.PathLike | None) -> str:
    """A relative path begins at `folder`, if that is given and the file is there, else at the working directory."""
    if folder is not None and not os.path.isabs(path):
        inside = os.path.join(folder, path)
        if os.path.exists(inside) or not os.path.exists(path):
            return inside
    return path


def truncate(item: dict, max_length: int) -> dict:
    """Cut an item to `max_length` tokens, from the end.

    What stands behind the last supervised token that is kept teaches nothing and is cut too. So the cut never falls
    inside a picture (no picture token is supervised), and slices whose placeholder is gone go with it.

    Raises:
        ValueError: when nothing supervised would be left, naming the sample, its tokens and the flag.
    """
    length = len(item["input_ids"])
    if length <= max_length:
        return item
    supervised = torch.nonzero(item["labels"][:max_length] != IGNORE_INDEX)
    name = item.get("id", "a sample")
    if len(supervised) == 0:
        pictures = int(item["image_bound"].view(-1, 2).diff(dim=1).sum()) if len(item["pixel_values"]) else 0
        raise ValueError(f"{name} {_lost_answer(length, pictures, max_length)}")
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
        `tgt_sizes`, `image_bound` as lists per sample; `label_index` (K,) int64, the supervised positions in the
        flattened batch; `right_padded` and `independent_samples`, see `MiniCPMV.forward`.
    """
    items = [truncate(example, max_length) for example in examples]

    def pad(key: str, value: int) -> torch.Tensor:
        return pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)

    labels = pad("labels", IGNORE_INDEX)
    return {
        "input_ids": pad("input_ids", padding_value),
        "position_ids": pad("position_ids", 0),
        "labels": labels,
        "attention_mask": pad_sequence(
            [torch.ones(len(item["input_ids"]), dtype=torch.bool) for item in items], batch_first=True
        ),
        "pixel_values": [item["pixel_values"] for item in items],
        "tgt_sizes": [item["tgt_sizes"] for item in items],
        "image_bound": [item["image_bound"] for item in items],
        "label_index": torch.nonzero(labels.flatten() != IGNORE_INDEX).flatten(),
        "right_padded": True,
        "independent_samples": True,
    }


def load_samples(path: str | os.PathLike) -> list[dict]:
    """Samples of a JSON file (UTF-8, a list of objects).

    Raises:
        ValueError: naming the file and, for malformed JSON, line and column with the text there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        samples = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        raise ValueError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            f"the line is {line[:120]!r}. "
            "JSON has double quotes (\"id\", not 'id') and no comma before a closing bracket"
        ) from error
    if not isinstance(samples, list):
        raise ValueError(f"{path}: holds a JSON {type(samples).__name__}, expected a list of samples")
    if not samples:
        raise ValueError(f"{path}: holds an empty list, expected samples")
    return samples


def find_problems(dataset: SupervisedDataset, path: str | os.PathLike) -> list[str]:
    """What is wrong with the samples, as far as it can be seen without decoding a picture: missing and misplaced
    fields, roles, marks, pictures that do not exist or are no pictures, answers that `max_length` would cut off whole.

    Args:
        path: of the data file, for the messages.

    Returns:
        one line for each problem: file, index, id, cause.
    """
    samples, llm_type, image_folder = dataset.raw_data, dataset.llm_type, dataset.image_folder
    pictures: dict[str, list[int]] = {}
    causes: list[tuple[int, str]] = []
    for index, sample in enumerate(samples):
        try:
            _check_sample(sample, llm_type)
        except ValueError as error:
            causes.append((index, str(error)))
            continue
        for picture in _image_paths(sample.get("image")):
            pictures.setdefault(resolve(picture, image_folder), []).append(index)
    sizes = {}
    with ThreadPoolExecutor(16) as pool:  # opening reads a header; on network disks it is the waiting that counts
        for (picture, users), found in zip(pictures.items(), pool.map(_picture_size, pictures), strict=True):
            if isinstance(found, str):
                causes += [(index, f"{found}: {picture}") for index in users]
            else:
                sizes[picture] = found
    if dataset.max_length is not None:
        bad = {index for index, _ in causes}
        lengths = ((n, dataset.length_problem(n, sizes)) for n in range(len(samples)) if n not in bad)
        causes += [(index, cause) for index, cause in lengths if cause]
    names = {index: sample.get("id") if isinstance(sample, Mapping) else None for index, sample in enumerate(samples)}
    return [f"{path}: sample {index} (id {names[index]!r}): {cause}" for index, cause in sorted(causes)]


def report_problems(problems: Sequence[str]) -> str:
    """The first problems in full, the rest as a number."""
    more = len(problems) - MAX_PROBLEMS_SHOWN
    return "\n".join([*problems[:MAX_PROBLEMS_SHOWN], *([f"... and {more} more"] if more > 0 else [])])


def _image_paths(image) -> list:
    """What stands in a sample's `image`: a path, a list of paths, a mapping from mark to path, or nothing."""
    if image is None:
        return []
    if isinstance(image, Mapping):
        return list(image.values())
    return list(image) if isinstance(image, list | tuple) else [image]


def _map_images(image, load: Callable[[str], Image.Image]):
    """The sample's pictures in the shape that `place_pictures` takes."""
    loaded = [load(path) for path in _image_paths(image)]
    return dict(zip(image, loaded, strict=True)) if isinstance(image, Mapping) else loaded


def _check_sample(sample, llm_type: str) -> None:
    if not isinstance(sample, Mapping):
        raise ValueError(f"is a {type(sample).__name__}, expected an object with 'conversations'")
    turns = sample.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(f"field 'conversations' is {'missing' if turns is None else 'not a list'}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is a {type(turn).__name__}, expected {{'role', 'content'}}")
        for field in ("role", "content"):
            if not isinstance(turn.get(field), str):
                raise ValueError(f"turn {number}: field {field!r} is {'missing' if field not in turn else 'no text'}")
        for word in RESERVED_WORDS[turn["role"] == "user" :]:
            if word in turn["content"]:
                raise ValueError(f"turn {number} ({turn['role']}) contains {word!r}, which stands for pictures only")
    check_roles(turns, llm_type)
    if turns[-1]["role"] != "assistant":
        raise ValueError("the last turn is the user's; there is no answer to learn at its end")
    image = sample.get("image")
    if any(not isinstance(path, str) for path in _image_paths(image)):
        raise ValueError("field 'image' is neither a path, nor a list of paths, nor an object from mark to path")
    place_pictures(turns, _map_images(image, lambda path: path))


def _picture_size(path: str) -> tuple[int, int] | str:
    """(width, height) of the picture turned upright, from its header; or what is wrong with it."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if turned else image.size
    except FileNotFoundError:
        return "picture does not exist"
    except Image.UnidentifiedImageError:
        return "is not a picture that Pillow can read"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        return f"picture cannot be opened ({error})"
