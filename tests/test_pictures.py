"""Picture files: every mode comes out as a person sees it, and every kind of damage as one sentence."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN, LLM_TYPES, golden_batch
from PIL import Image
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
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    causes = {
        "pipe.png": "is no file",
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
