"""What a file is that was taken for a picture or a data file: told by its first bytes, with what to do about it."""

from __future__ import annotations

import codecs
import re

HEAD = 1024  # bytes that tell

HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
AVIF_BRANDS = (b"avif", b"avis")
UNPACK = "unpack it and name what is in it"
AS_PNG = "save it as JPEG or PNG"
BEGINNINGS = {
    b"version https://git-lfs": (
        "a git-lfs pointer, which stands for a file that was not downloaded",
        "run `git lfs pull` where it comes from",
    ),
    b"\x1f\x8b": ("packed by gzip", UNPACK),
    b"BZh": ("packed by bzip2", UNPACK),
    b"\xfd7zXZ\0": ("packed by xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", UNPACK),
    b"\x04\x22\x4d\x18": ("packed by lz4", UNPACK),
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"PK\x05\x06": ("an empty zip archive", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", UNPACK),
    b"PAR1": ("a Parquet file", "give it a name that ends in .parquet"),
    b"ARROW1": ("an Arrow file", "give it a name that ends in .arrow"),
    b"%PDF-": ("a PDF document", "save its pages as JPEG or PNG"),
    b"%!PS": ("a PostScript drawing", AS_PNG),
    b"8BPS": ("a Photoshop picture", AS_PNG),
    b"\xff\x0a": ("a JPEG XL picture", AS_PNG),
    b"\0\0\0\x0cJXL \r\n\x87\n": ("a JPEG XL picture", AS_PNG),
    b"\x1a\x45\xdf\xa3": ("a video", "save its frames as JPEG or PNG"),
}
PICTURE_BEGINNINGS = (b"GIF8", b"RIFF", b"BM")  # text, by their first bytes
MARKUP = re.compile(rb"(?:<\?xml[^>]*>|<!--(?:(?!-->).)*-->|\s)*<(?:!doctype\s+)?(\w+)", re.S | re.I)


def kind_of(head: bytes) -> tuple[str, str] | None:
    """What a file is, and what to do: as far as its first `HEAD` bytes tell, and where it is neither a picture of the
    formats that are read nor JSON."""
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head[4:8] == b"ftyp":
        return _iso_media(head)
    text = head.removeprefix(b"\xef\xbb\xbf")
    if markup := MARKUP.match(text):
        name = markup[1].lower()
        if name == b"svg":
            return "an SVG drawing, which has no pixels", AS_PNG
        what = "an HTML page" if name in (b"html", b"head", b"body") else "XML"
        return f"{what}, probably what a failed download left", "download it anew"
    return None


def picture_kind(head: bytes) -> tuple[str, str] | None:
    """As `kind_of`, where a picture is expected: then any text is a finding."""
    if not head:
        return "empty", "copy or download it anew"
    if kind := kind_of(head):
        return kind
    if head.startswith(PICTURE_BEGINNINGS):
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # whose last character may be cut off
    except UnicodeDecodeError:
        return None
    return None if b"\0" in head else ("text, probably what a failed download left", "look into it, download it anew")


def _iso_media(head: bytes) -> tuple[str, str] | None:
    """HEIC, AVIF and videos begin alike; their brands tell: the first, and then those that it is compatible with."""
    box = head[: int.from_bytes(head[:4], "big")]
    brands = [box[8:12], *(box[at : at + 4] for at in range(16, len(box), 4))]
    if any(brand in HEIC_BRANDS for brand in brands):
        return "a HEIC/HEIF picture, as iPhones save them", AS_PNG
    if any(brand in AVIF_BRANDS for brand in brands):
        return None
    if brands[0] in (b"mif1", b"msf1"):
        return "a HEIF picture", AS_PNG
    return "a video", "save its frames as JPEG or PNG"
