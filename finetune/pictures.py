"""Picture files that nobody has looked at yet: opened safely, and whatever is wrong with one said in a sentence.

A picture is a path, a `data:` URI, or what Parquet files hold: `{"bytes": encoded file, "path": name or None}`.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from PIL import ExifTags, Image, PngImagePlugin

from finetune.errors import shown, shown_path
from finetune.file_kinds import HEAD, picture_kind
from finetune.minicpmv.image_slicing import upright_rgb

# What people keep pictures in. Not all that Pillow reads: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO")
# One picture in memory takes 4 bytes a pixel, two or three times over while alpha is removed: under 2 GB. Nine slices
# show the model 1.8 million pixels, so nothing is lost by making such a picture smaller.
MAX_PIXELS = 128 * 2**20
# Bytes of text and colour profiles in a PNG, unpacked: of one, and of all. Editors and generators of pictures write
# megabytes, more than Pillow takes by itself; a small file that unpacks to gigabytes is refused.
MAX_TEXT, MAX_TEXTS = 64 * 2**20, 256 * 2**20
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT, MAX_TEXTS

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts of a PNG in which it may stand
DATA_URI = re.compile(r"\s*data:", re.I)
URL = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.I)
BASE64_PICTURES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # what PNG, JPEG, GIF and WebP begin with

Picture = str | Mapping


def load_image(picture: Picture, folder: str | os.PathLike | None = None, inside: bool = False) -> Image.Image:
    """Read a picture as a person sees it, in RGB (see `upright_rgb`).

    Args:
        picture: path, `data:` URI or embedded picture.
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
    picture = _unpacked(picture)
    if isinstance(picture, Mapping):
        return _header_size(picture)
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
    """Whether this can stand for a picture: a path, a `data:` URI, or an embedded picture."""
    return isinstance(value, str) or _is_embedded(value)


def is_data_uri(picture) -> bool:
    """Whether a text is a picture itself, and no path."""
    return isinstance(picture, str) and DATA_URI.match(picture) is not None


def record_of(picture: Picture, folder: str | os.PathLike | None = None) -> str:
    """What a list of results says of a picture: its path, or `embedded`."""
    if isinstance(picture, Mapping):
        return picture.get("path") or "embedded"
    return "embedded" if is_data_uri(picture) else str(resolve(picture, folder))


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
                f"picture {shown(path, quotes=False)} lies outside --image_folder {folder}, at {shown_path(real)}; "
                "--image_folder_only is set"
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


def _unpacked(picture: Picture) -> Picture:
    """A `data:` URI as an embedded picture; anything else as it is.

    Raises:
        ValueError: when the URI is broken, or the picture is a URL of another kind.
    """
    if isinstance(picture, Mapping):
        return picture
    if is_data_uri(picture):
        head, comma, data = picture.partition(",")
        name = shown(f"{head.strip()},...", quotes=False) if comma else "data:..."
        try:
            if not comma:
                raise ValueError("no comma stands in front of its data")
            data = unquote_to_bytes(data)
            if re.search(r";\s*base64\s*$", head, re.I):
                data = _from_base64(data)
        except ValueError as error:
            raise ValueError(
                f"embedded picture {name} cannot be read: {error}; expected data:image/png;base64, and the file in "
                "base64"
            ) from error
        return {"bytes": data, "path": name}
    if scheme := URL.match(picture):
        advice = (
            "leave out file:// and name the path" if scheme[1].lower() == "file" else "download it and name the file"
        )
        raise ValueError(
            f"picture {shown(picture, quotes=False)} is a URL, and a run downloads nothing: {advice}, or embed it as "
            "data:image/png;base64,..."
        )
    return picture


def _from_base64(data: bytes) -> bytes:
    """Of either alphabet, with or without whitespace and the `=` at its end."""
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


@contextmanager
def _opened(picture: Picture, folder: str | os.PathLike | None, inside: bool = False) -> Iterator[Image.Image]:
    """`Image.open`, with every way in which a file can be wrong turned into a ValueError that names it."""
    picture = _unpacked(picture)
    if _is_embedded(picture):
        name = f"embedded picture {shown(picture.get('path') or '', quotes=False)}".rstrip()
        path, source = name, io.BytesIO(picture["bytes"])
    else:
        source = resolve(picture, folder, inside)
        path = shown_path(source)
        name = f"picture {path}"
        if not os.path.exists(source):
            bare = picture.strip().startswith(BASE64_PICTURES) and len(picture) > 100
            hint = "; it looks like base64: write data:image/png;base64, in front of it" if bare else ""
            raise ValueError(f"{name} does not exist{hint}")
        if not Path(source).is_file():  # a pipe, for one, would be waited for
            raise ValueError(f"{name} is no file")
    try:
        with Image.open(source, formats=_readable_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; make it smaller, the model sees "
                    "1.8 million at most"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except PermissionError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(_what_is_wrong(path, name, _head(source), error)) from error


def _head(source: str | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:HEAD]
    try:
        with Path(source).open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b"\0"  # tells nothing


def _what_is_wrong(path: str, name: str, head: bytes, error: Exception) -> str:
    """In words, of a picture that Pillow does not take for this error."""
    if kind := picture_kind(head):
        return f"{path} is not a picture of a format that is read: it is {kind[0]}; {kind[1]}"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{path} is not a picture that Pillow can read as {', '.join(FORMATS)}"
    if "MAX_TEXT" in str(error):
        return (
            f"{name} has over {MAX_TEXT >> 20} MiB of text or colour profile in one piece, or {MAX_TEXTS >> 20} MiB "
            "together; save it without"
        )
    return f"{name} cannot be decoded, it may be cut off or damaged: {shown(error)}"


@functools.cache
def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # some builds of Pillow lack AVIF or JPEG 2000


@functools.lru_cache(maxsize=100_000)
def _size_of_file(path: str) -> tuple[int, int] | str:
    """The size, or what is wrong: a picture of many samples is opened once."""
    try:
        return _header_size(path)
    except ValueError as error:
        return str(error)


def _header_size(picture: Picture) -> tuple[int, int]:
    with _opened(picture, None) as image:
        with io.BytesIO(picture["bytes"]) if isinstance(picture, Mapping) else Path(picture).open("rb") as file:
            complete = _is_complete(file, image.format)
        if not complete:
            image.load()
        # Not PNG's own `getexif`, which decodes the picture to see what follows its pixels; `_is_complete` has looked.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in SIDEWAYS
        # A TIFF has the size already that loading it, which turns it, will give.
        if image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.Orientation) in SIDEWAYS:
            turned = False
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
        length = int.from_bytes(head[:4], "big")
        if seen_pixels and kind == b"eXIf":
            return False
        if seen_pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
            begin = file.read(min(length, 32))
            if begin.startswith(PNG_ORIENTATION):
                return False
            length -= len(begin)
        seen_pixels |= kind == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)
    return False
