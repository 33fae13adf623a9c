"""Picture files that nobody has looked at yet: opened safely, and whatever is wrong with one said in a sentence.

A picture is a path, or what Parquet files hold: `{"bytes": encoded file, "path": name or None}`.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from finetune.minicpmv.image_slicing import upright_rgb

# What people keep pictures in. Not all that Pillow reads: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO")
# One picture in memory takes 4 bytes a pixel, two or three times over while alpha is removed: under 2 GB. Nine slices
# show the model 1.8 million pixels, so nothing is lost by making such a picture smaller.
MAX_PIXELS = 128 * 2**20

Picture = str | Mapping


def load_image(picture: Picture, folder: str | os.PathLike | None = None, inside: bool = False) -> Image.Image:
    """Read a picture as a person sees it, in RGB (see `upright_rgb`).

    Args:
        picture: path or embedded picture.
        folder: where a relative path begins, see `resolve`.
        inside: refuse a path that leads out of `folder`.

    Raises:
        ValueError: naming the picture, when it is missing, no picture, damaged, too large or outside.
    """
    with _opened(picture, folder, inside) as image:
        return upright_rgb(image)


def picture_size(picture: Picture, folder: str | os.PathLike | None = None, inside: bool = False) -> tuple[int, int]:
    """(width, height) in pixels of the picture turned upright, from its header. A file that does not end as its format
    ends is decoded, to see whether something is missing.

    Raises:
        ValueError: as `load_image`.
    """
    if isinstance(picture, Mapping):
        return _header_size(picture, None)
    size = _size_of_file(resolve(picture, folder, inside))
    if isinstance(size, str):
        raise ValueError(size)
    return size


def picture_paths(image) -> list[Picture]:
    """What stands in a sample's `image`: one picture, a list of them, a mapping from mark to picture, or nothing."""
    if image is None:
        return []
    if isinstance(image, Mapping) and not _is_embedded(image):
        return list(image.values())
    return list(image) if isinstance(image, list | tuple) else [image]


def map_pictures(image, load) -> list | dict:
    """`load(picture)` of every picture of a sample, in the shape that `place_pictures` takes."""
    loaded = [load(picture) for picture in picture_paths(image)]
    named = isinstance(image, Mapping) and not _is_embedded(image)
    return dict(zip(image, loaded, strict=True)) if named else loaded


def is_picture(value) -> bool:
    """Whether this can stand for a picture: a path, or an embedded picture."""
    return isinstance(value, str) or _is_embedded(value)


def resolve(path: str, folder: str | os.PathLike | None, inside: bool = False) -> str:
    """A relative path begins at `folder`, if that is given and the file is there, else at the working directory.

    Args:
        inside: the path must stay in `folder`, whatever links and `..` are in it; then it is returned without them.

    Raises:
        ValueError: naming a path that leads out of `folder`. Nothing is opened to find that out.
    """
    if inside:
        real, within = os.path.realpath(os.path.join(folder, path)), os.path.realpath(folder)
        if not Path(real).is_relative_to(within):
            raise ValueError(
                f"picture {path} lies outside --image_folder {folder}, at {real}; --image_folder_only is set"
            )
        return real
    if folder is not None and not os.path.isabs(path):
        inside = os.path.join(folder, path)
        if os.path.exists(inside) or not os.path.exists(path):
            return inside
    return path


def forget_sizes() -> None:
    """Sizes are remembered, since a picture may stand in many samples; what follows shall look at the files anew."""
    _size_of_file.cache_clear()


def _is_embedded(value) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


@contextmanager
def _opened(picture: Picture, folder: str | os.PathLike | None, inside: bool = False) -> Iterator[Image.Image]:
    """`Image.open`, with every way in which a file can be wrong turned into a ValueError that names it."""
    if _is_embedded(picture):
        name, source = f"embedded picture {picture.get('path') or ''}".rstrip(), io.BytesIO(picture["bytes"])
    else:
        name = source = resolve(picture, folder, inside)
        if not os.path.exists(source):
            raise ValueError(f"picture {name} does not exist")
        if not Path(source).is_file():  # a pipe, for one, would be waited for
            raise ValueError(f"picture {name} is no file")
    try:
        with Image.open(source, formats=_readable_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; make it smaller, the model sees "
                    "1.8 million at most"
                )
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that Pillow can read as {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture {name} is too large: {error}") from error
    except PermissionError as error:
        raise ValueError(f"picture {name} cannot be read: {error.strerror}") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(f"picture {name} cannot be decoded, it may be cut off or damaged: {error!r}") from error


@functools.cache
def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # some builds of Pillow lack AVIF or JPEG 2000


@functools.lru_cache(maxsize=100_000)
def _size_of_file(path: str) -> tuple[int, int] | str:
    """The size, or what is wrong: a picture of many samples is opened once."""
    try:
        return _header_size(path, None)
    except ValueError as error:
        return str(error)


def _header_size(picture: Picture, folder: str | os.PathLike | None) -> tuple[int, int]:
    with _opened(picture, folder) as image:
        embedded = isinstance(picture, Mapping)
        with io.BytesIO(picture["bytes"]) if embedded else Path(resolve(picture, folder)).open("rb") as file:
            complete = _is_complete(file, image.format)
        if not complete:
            image.load()
        # Pillow would decode a whole PNG to see whether Exif data follows its pixels; `_is_complete` has looked.
        exif = image.getexif() if not complete or image.format != "PNG" or "exif" in image.info else {}
        turned = exif.get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned else image.size


def _is_complete(file: BinaryIO, file_format: str | None) -> bool:
    """Whether a file ends as its format ends, and a PNG has all that says how to show it in front of its pixels. True
    where the format has no such mark."""
    if file_format == "PNG":
        return _is_complete_png(file)
    length = file.seek(0, os.SEEK_END)
    if file_format == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 == length
    end = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}.get(file_format, b"")
    file.seek(max(length - len(end), 0))
    return file.read(len(end)) == end


def _is_complete_png(file: BinaryIO) -> bool:
    """Steps over the chunks (length, kind, data, checksum) to the last one."""
    file.seek(8)
    seen_pixels = False
    while len(head := file.read(8)) == 8:
        kind = head[4:]
        if kind == b"IEND":
            return len(file.read(4)) == 4
        if kind == b"eXIf" and seen_pixels:
            return False
        seen_pixels |= kind == b"IDAT"
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False
