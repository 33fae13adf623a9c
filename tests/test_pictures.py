"""Picture files: every mode comes out as a person sees it, and every kind of damage as one sentence."""

from __future__ import annotations

import base64
import os
import struct
import tracemalloc
import zlib
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import GOLDEN, LLM_TYPES, golden_batch
from PIL import Image, PngImagePlugin
from transformers import AutoModel

from finetune import pictures as module
from finetune.minicpmv.image_slicing import normalise, normalised_pixels, raw_pixels
from finetune.pictures import load_image, picture_size

SIZE = (48, 32)


@pytest.fixture
def photo() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8))


def seen(path) -> np.ndarray:
    image = load_image(str(path))
    assert image.mode == "RGB" and image.size == picture_size(str(path))
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("name", "mode", "off"),
    [
        *(("a.jpg", "RGB", 12), ("a.png", "RGB", 0), ("a.webp", "RGB", 25), ("a.bmp", "RGB", 0), ("a.tif", "RGB", 0)),
        *(("a.gif", "P", 60), ("a.png", "P", 60), ("a.jpg", "CMYK", 12), ("a.tif", "CMYK", 2), ("a.png", "RGBA", 0)),
        *(("a.jpg", "L", 12), ("a.png", "L", 0), ("a.png", "LA", 0), ("a.png", "1", 255), ("a.ppm", "RGB", 0)),
    ],
)
def test_modes_and_formats(photo, tmp_path, name, mode, off):
    photo.convert(mode).save(tmp_path / name)
    wanted = photo.convert("L").convert("RGB") if mode in ("L", "LA", "1") else photo
    assert np.abs(seen(tmp_path / name) - np.asarray(wanted).astype(int)).max() <= off


def test_transparency_is_white(photo, tmp_path):
    clear = photo.convert("RGBA")
    alpha = np.full(SIZE[::-1], 255, np.uint8)
    alpha[:, 24:] = 0
    alpha[0, 0] = 128
    clear.putalpha(Image.fromarray(alpha))
    clear.save(tmp_path / "a.png")
    pixels = seen(tmp_path / "a.png")
    assert (pixels[:, 24:] == 255).all()
    assert (pixels[1:, :24] == np.asarray(photo)[1:, :24]).all()
    assert np.abs(pixels[0, 0] - (np.asarray(photo)[0, 0].astype(int) + 255) / 2).max() <= 1
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert (seen(tmp_path / "p.png")[0, 0] == 255).all()
    assert not (seen(tmp_path / "p.png")[16, 40] == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_keep_their_brightness(tmp_path, name):
    values = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    pixels = seen(tmp_path / name)
    assert np.abs(pixels[..., 0] - values / 257).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_floats_keep_their_brightness(tmp_path):
    values = np.linspace(0, 1, 48 * 32).reshape(32, 48).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "unit.tif")
    Image.fromarray(values * 255).save(tmp_path / "bytes.tif")
    for name in ("unit.tif", "bytes.tif"):
        assert np.abs(seen(tmp_path / name)[..., 1] - values * 255).max() <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_first_frame(tmp_path, name):
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(seen(tmp_path / name) - np.array([255, 0, 0])).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation(tmp_path, name, orientation):
    """The red corner, upper left in the file, stands where the tag says."""
    image = Image.new("RGB", (40, 24), "white")
    image.paste("red", (0, 0, 12, 8))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / name, exif=exif, quality=95)
    pixels = seen(tmp_path / name)
    assert pixels.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    row, column = corner[orientation]
    assert pixels[row, column, 0] > 200 and pixels[row, column, 2] < 100
    assert pixels[~row, column, 2] > 200 or pixels[row, ~column, 2] > 200


def exif_of(kind: int, count: int, value: bytes) -> bytes:
    """EXIF data with nothing but an orientation of this type."""
    entry = struct.pack("<HHHI", 1, 274, kind, count)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + value.ljust(4, b"\0")[:4] + bytes(4) + value


SHORT, LONG, ASCII, UNDEFINED, FLOAT = 3, 4, 2, 7, 11
ORIENTATIONS = {
    **{f"{number}": (SHORT, 1, struct.pack("<H", number)) for number in (0, *range(1, 10), 65535)},
    "long 6": (LONG, 1, struct.pack("<I", 6)),
    "none": (SHORT, 0, b""),
    "text": (ASCII, 2, b"6\0"),
    "letters": (ASCII, 4, b"abc\0"),
    "bytes": (UNDEFINED, 1, b"\6"),
    "more bytes": (UNDEFINED, 4, b"\6abc"),
    "two": (SHORT, 2, struct.pack("<HH", 9, 6)),
    "float": (FLOAT, 1, struct.pack("<f", 5.5)),
    "unknown type": (99, 1, b"\6"),
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.mpo"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_sizes_agree_for_any_orientation(tmp_path, name, orientation):
    Image.new("RGB", (40, 24), "white").save(tmp_path / name, exif=exif_of(*ORIENTATIONS[orientation]))
    size = seen(tmp_path / name).shape[:2]
    assert size == ((40, 24) if orientation in ("5", "6", "7", "8", "long 6") else (24, 40))


@pytest.mark.parametrize("orientation", [0, *range(1, 10)])
@pytest.mark.parametrize("name", ["a.tif", "a.avif"])
def test_sizes_agree_where_pillow_turns(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (40, 24), "white").save(tmp_path / name, exif=exif)
    assert seen(tmp_path / name).shape[:2] == ((40, 24) if 5 <= orientation <= 8 else (24, 40))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [b"iTXt", b"tEXt", b"zTXt"])
def test_orientations_in_texts_of_a_png(tmp_path, kind, behind):
    Image.new("RGB", (40, 24), "white").save(tmp_path / "a.png")
    if kind == b"iTXt":
        data = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    else:
        exif = exif_of(SHORT, 1, b"\6")
        raw = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
        data = b"Raw profile type exif\0" + (raw if kind == b"tEXt" else b"\0" + zlib.compress(raw))
    insert(tmp_path / "a.png", kind, data, behind)
    assert seen(tmp_path / "a.png").shape[:2] == (40, 24)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(512)) + packer.flush()


def insert(path, kind: bytes, data: bytes, behind: bool) -> None:
    """A chunk in a PNG, in front of its pixels or behind them."""
    whole = path.read_bytes()
    at = len(whole) - 12 if behind else 33
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(whole[:at] + chunk + whole[at:])


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt", b"iCCP"])
def test_a_png_with_a_large_text(photo, tmp_path, kind, behind):
    text = b"workflow " * 2**19  # 4.5 MiB
    packed = zlib.compress(text)
    data = {
        b"zTXt": b"comment\0\0" + packed,
        b"iTXt": b"comment\0\1\0\0\0" + packed,
        b"tEXt": b"comment\0" + text * 15,
        b"iCCP": b"profile\0\0" + packed,
    }[kind]
    photo.save(tmp_path / "a.png")
    insert(tmp_path / "a.png", kind, data, behind)
    assert np.array_equal(seen(tmp_path / "a.png"), np.asarray(photo).astype(int))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_whose_text_is_a_bomb(photo, tmp_path, kind, behind, bomb):
    """Half a megabyte that stands for half a gigabyte is not unpacked."""
    head = b"comment\0\1\0\0\0" if kind == b"iTXt" else b"comment\0\0"
    photo.save(tmp_path / "a.png")
    insert(tmp_path / "a.png", kind, head + bomb, behind)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.png has over 64 MiB of text or colour profile.*save it without"):
        load_image(str(tmp_path / "a.png"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * PngImagePlugin.MAX_TEXT_CHUNK


def test_png_orientation_behind_its_pixels(tmp_path):
    image = Image.new("RGB", (40, 24), "white")
    image.save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    exif = Image.Exif()
    exif[274] = 6
    data = exif.tobytes()[6:]
    chunk = len(data).to_bytes(4, "big") + b"eXIf" + data + zlib.crc32(b"eXIf" + data).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(whole[:-12] + chunk + whole[-12:])
    assert seen(tmp_path / "a.png").shape[:2] == (40, 24)


def test_size_of_a_whole_picture_needs_no_decoding(photo, tmp_path, monkeypatch):
    names = ["a.jpg", "a.png", "a.gif", "a.webp"]
    for name in names:
        photo.save(tmp_path / name)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert [picture_size(str(tmp_path / name)) for name in names] == [SIZE] * 4


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp"])
def test_cut_off_files_are_found_from_the_header(photo, tmp_path, name):
    photo.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for part in (0, 5, len(whole) // 2, len(whole) - 30):
        (tmp_path / name).write_bytes(whole[:part])
        module.forget_sizes()
        for look in (picture_size, load_image):
            with pytest.raises(ValueError, match=r"cannot be decoded|is not a picture") as caught:
                look(str(tmp_path / name))
            assert str(tmp_path / name) in str(caught.value)


def test_data_behind_the_end_is_no_damage(photo, tmp_path):
    """Phones append videos to photos."""
    photo.save(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(bytes(5000))
    assert picture_size(str(tmp_path / "a.jpg")) == load_image(str(tmp_path / "a.jpg")).size == SIZE


def test_what_is_no_picture_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    causes = {
        "pipe.png": "is no file",
        "device.png": "is no file",
        "folder.png": "is no file",
        "none.png": "does not exist",
        "nul\0.png": "does not exist",
        "x" * 5000: "does not exist",
        "vector.eps": "is not a picture",
    }
    for name, cause in causes.items():
        for look in (picture_size, load_image):
            with pytest.raises(ValueError, match=cause):
                look(str(tmp_path / name))


def test_too_large(tmp_path, monkeypatch, photo):
    photo.save(tmp_path / "a.png")
    monkeypatch.setattr(module, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    for look in (picture_size, load_image):
        with pytest.raises(ValueError, match=r"too large: 48 x 32 pixels.*make it smaller"):
            look(str(tmp_path / "a.png"))


def test_embedded_pictures(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    embedded = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    assert np.array_equal(np.asarray(load_image(embedded)), np.asarray(photo))
    assert picture_size(embedded) == SIZE
    with pytest.raises(ValueError, match=r"embedded picture a\.png"):
        load_image({**embedded, "bytes": embedded["bytes"][:100]})


def spellings(data: bytes) -> dict[str, str]:
    text = base64.b64encode(data).decode()
    return {
        "plain": f"data:image/png;base64,{text}",
        "upper": f"DATA:IMAGE/PNG;BASE64,{text}",
        "no type": f"data:;base64,{text}",
        "parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{text}",
        "lines": f" \n data:image/png;base64,\n{text[:76]}\r\n{text[76:]}\n",
        "percent": f"data:image/png;base64,{quote(text, safe='')}",
        "no base64": f"data:image/png,{quote(data, safe='')}",
        "no padding": f"data:image/png;base64,{text.rstrip('=')}",
        "other alphabet": f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        "wrong type": f"data:text/plain;base64,{text}",
    }


@pytest.mark.parametrize("spelling", spellings(b""))
def test_data_uris(photo, tmp_path, spelling):
    photo.save(tmp_path / "a.png")
    uri = spellings((tmp_path / "a.png").read_bytes())[spelling]
    assert np.array_equal(seen_of(uri), np.asarray(photo))
    assert np.array_equal(np.asarray(load_image(uri, tmp_path, inside=True)), np.asarray(photo))
    assert module.record_of(uri) == "embedded" and module.record_of("a.png", tmp_path) == str(tmp_path / "a.png")


def seen_of(uri: str) -> np.ndarray:
    image = load_image(uri)
    assert image.size == picture_size(uri)
    return np.asarray(image)


def test_broken_data_uris(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    whole = spellings((tmp_path / "a.png").read_bytes())["plain"]
    page = base64.b64encode(b"<html><body>403").decode()
    for uri, cause in (
        (whole[:150], "cannot be decoded|is not a picture"),
        (whole[:100] + "?" + whole[100:], "cannot be read: .*expected data:image/png;base64,"),
        (whole[:100] + "é" + whole[100:], "cannot be read"),
        (whole[:100] + "=" + whole[100:], "cannot be read"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "it is empty"),
        ("data:image/png;base64,A", "cannot be read"),
        (f"data:text/html;base64,{page}", "it is an HTML page"),
        ("data:image/svg+xml,%3Csvg xmlns='x'/%3E", "it is an SVG drawing"),
    ):
        for look in (picture_size, load_image):
            with pytest.raises(ValueError, match=cause) as caught:
                look(uri)
            said = str(caught.value)
            assert ("embedded picture data:" in said and "\n" not in said and uri[60:100] not in said) or len(uri) < 60
    with pytest.raises(ValueError, match="it looks like base64: write data:image/png;base64, in front"):
        load_image(whole.partition(",")[2])


@pytest.mark.parametrize(
    "url", ["https://x.org/a.jpg", "HTTP://x/a", "s3://b/a.png", "gs://b/a", "hf://d/a", " ftp://x"]
)
def test_urls_are_refused(url, tmp_path):
    for look in (picture_size, load_image):
        for folder, inside in ((None, False), (tmp_path, True)):
            with pytest.raises(
                ValueError, match="is a URL, and a run downloads nothing: download it and name the file"
            ):
                look(url, folder, inside)


def test_a_url_of_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"a run downloads nothing: leave out file:// and name the path"):
        load_image(f"file://{tmp_path}/a.png")


KINDS = {
    "an SVG drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "save it as"),
    "an SVG drawing, ": (b"<?xml version='1.0'?>\n<!-- by x -->\n<!DOCTYPE svg PUBLIC>\n<svg/>", "save it as"),
    "a HEIC/HEIF picture": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "save it as JPEG or PNG"),
    "a HEIC/HEIF picture, ": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "save it as JPEG or PNG"),
    "a HEIF picture": (b"\0\0\0\x14ftypmif1\0\0\0\0mif1", "save it as JPEG or PNG"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
    "an HTML page": (b"\n<!DOCTYPE html><html><title>403 Forbidden</title></html>", "download it anew"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "download it anew"),
    "text": (b'{"error": "not found"}', "download it anew"),
    "text, ": ("é".encode() * 2000, "download it anew"),
    "a PDF document": (b"%PDF-1.7\n%\xe2\xe3", "save its pages"),
    "a video": (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "save its frames"),
    "packed by gzip": (b"\x1f\x8b\x08\0", "unpack it"),
    "a Photoshop picture": (b"8BPS\0\1", "save it as"),
    "empty": (b"", "copy or download it anew"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_named(tmp_path, kind):
    content, advice = KINDS[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(content + bytes(64 * content.startswith(b"\0\0\0")))
    for picture in (str(path), {"bytes": path.read_bytes(), "path": None}):
        for look in (picture_size, load_image):
            with pytest.raises(
                ValueError, match=f"is not a picture .*: it is {kind.strip(', ')}.*; .*{advice}"
            ) as caught:
                look(picture)
            assert "\n" not in str(caught.value)


def test_markup_takes_no_time_to_tell(tmp_path):
    """Whose comments could be read in countless ways."""
    (tmp_path / "a.jpg").write_bytes(b"<!---->" * 140 + b"\0 <")
    with pytest.raises(ValueError, match="is not a picture"):
        picture_size(str(tmp_path / "a.jpg"))


def test_raw_pixels_normalise_to_the_same_values(photo):
    assert torch.equal(normalise(raw_pixels(photo)), normalised_pixels(photo))


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_model_takes_raw_pixels(llm_type):
    """uint8 (3, H, W) gives the very embeddings of normalised pixels, strips or not."""
    model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32).eval()
    data = golden_batch(llm_type)
    generator = torch.Generator().manual_seed(0)
    sizes = [(high * 14, wide * 14) for size in data["tgt_sizes"] for high, wide in size.view(-1, 2).tolist()]
    raw = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    # as the data set makes them: a view of rows of RGB pixels
    raw = [pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1) for pixels in raw]
    counts = [len(sample) for sample in data["pixel_values"]]
    embeddings = []
    for slices in (raw, [normalise(pixels) for pixels in raw]):
        waiting = iter(slices)
        data["pixel_values"] = [[next(waiting) for _ in range(count)] for count in counts]
        with torch.no_grad():
            embeddings.append(model.get_vllm_embedding(data)[0])
    assert torch.equal(*embeddings)
