"""Damaged samples and pictures: each is used or refused in a sentence of ours; nothing hangs, nothing eats memory."""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from finetune.dataset import SampleError, SupervisedDataset

SAMPLES, PICTURES = 10_000, 1_000
MEMORY = 2 * 2**30  # bytes
WORDS = [
    *("<image>", "</image>", "<unk>", "<slice>", "<image_00>", "<image_99999999999999999999>", "<|eot_id|>"),
    *(
        "<AI>",
        "<用户>",
        "</s>",
        "\ud800",
        "\0",
        "",
        " ",
        "\n",
        "😀",
        "a" * 3000,
        "\u202e",
        "<|start_header_id|>",
        "<0x0A>",
    ),
]
VALUES = [
    None,
    True,
    0,
    -1,
    0.5,
    float("nan"),
    10**400,
    "",
    "user",
    "x.png",
    [],
    {},
    [[]],
    {"bytes": "x"},
    b"\x00",
    *WORDS,
]
KEYS = ["id", "image", "conversations", "role", "content", "weight", "<image_00>", "<image>", "bytes", "path"]


def mutate(value, rng: random.Random, depth: int = 0):
    """The value with one thing changed somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.15:
            del value[key]
        elif what < 0.3:
            value[rng.choice(KEYS)] = value.pop(key)
        elif what < 0.4:
            value[rng.choice(KEYS)] = rng.choice(VALUES)
        else:
            value[key] = mutate(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        what = rng.random()
        if what < 0.15:
            del value[place]
        elif what < 0.3:
            value.insert(place, copy.deepcopy(rng.choice(value)))
        elif what < 0.4:
            rng.shuffle(value)
        else:
            value[place] = mutate(value[place], rng, depth + 1)
        return value
    if isinstance(value, str) and rng.random() < 0.7:
        place = rng.randrange(len(value) + 1)
        return value[:place] + rng.choice(WORDS) + value[place + rng.randrange(3) :]
    return copy.deepcopy(rng.choice(VALUES))


@pytest.mark.parametrize("llm_type", GOLDEN)
def test_mutated_samples(llm_type, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": "What <image> is\n<image>?"},
        {"role": "assistant", "content": "A thing.", "weight": 1},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    named = copy.deepcopy(turns)
    named[0]["content"], named[2]["content"] = "What <image_00>?", "Sure <image_01>?"
    seeds = [
        {"id": 1, "image": ["a.png", "a.png"], "conversations": turns},
        {"id": 2, "image": {"<image_00>": "a.png", "<image_01>": "a.png"}, "conversations": named},
        {"id": 3, "image": "a.png", "conversations": turns[2:]},
        {"id": 4, "conversations": [{"role": "system", "content": "Be brief."}, *turns[2:]]},
    ]
    rng = random.Random(0)
    samples = []
    for number in range(SAMPLES // len(GOLDEN)):
        sample = copy.deepcopy(seeds[number % len(seeds)])
        for _ in range(rng.randint(1, 4)):
            sample = mutate(sample, rng)
        samples.append(sample)
    config = AutoConfig.from_pretrained(GOLDEN[llm_type])
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, samples, 2048, tmp_path)
    refused = 0
    for number in range(len(samples)):
        try:
            item = dataset[number]
        except SampleError as error:
            refused += 1
            assert str(error).startswith(f"sample {number} (id ")
            with pytest.raises(ValueError, match=r"."):
                dataset.check(number)
            continue
        assert len(item["image_bound"]) == len(item["pixel_values"])
        if (item["labels"] != -100).any():
            dataset.check(number)
    assert 0.3 < refused / len(samples) < 0.95


def bombs(folder: Path) -> None:
    """Small files that are enormous pictures."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    def png(width: int, height: int, mode: int, data: bytes) -> bytes:
        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, mode, 0, 0, 0])
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(40_000_000), 9)
    for number, (width, height, mode) in enumerate(
        [(11_000, 11_000, 6), (30_000, 30_000, 2), (2**31 - 1, 1, 0), (13_000, 13_000, 2), (1, 2**31 - 1, 6)]
    ):
        (folder / f"bomb{number}.png").write_bytes(png(width, height, mode, zeros))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    whole = png(8, 8, 0, zlib.compress(bytes(72)))
    (folder / "text.png").write_bytes(whole[:33] + text + whole[33:])
    Image.new("1", (12_000, 11_000)).save(folder / "bits.tif", compression="group4")
    Image.new("L", (11_500, 11_500)).save(folder / "large.gif")


def damaged(folder: Path, count: int) -> None:
    rng = random.Random(1)
    pixels = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((240, 180))
    exif = image.getexif()
    exif[274], exif[270] = 6, "a description"
    originals = []
    for kind, options in [
        *(
            ("JPEG", {"exif": exif}),
            ("JPEG", {"progressive": True}),
            ("PNG", {"exif": exif}),
            ("GIF", {}),
            ("WEBP", {}),
        ),
        *(("WEBP", {"lossless": True, "exif": exif}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("PPM", {})),
        *(("TIFF", {"compression": "jpeg"}), ("JPEG2000", {}), ("ICO", {}), ("AVIF", {})),
    ]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        originals.append((kind, buffer.getvalue()))
    for number in range(count):
        kind, whole = originals[number % len(originals)]
        data = bytearray(whole)
        what = rng.randrange(4)
        if what == 0:
            del data[rng.randrange(len(data)) :]
        elif what == 1:
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif what == 2:  # the header, where sizes and offsets are
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(min(200, len(data)))] = rng.choice([0, 1, 127, 255])
        else:
            begin = rng.randrange(len(data))
            data[begin : begin + rng.randrange(200)] = rng.randbytes(rng.randrange(200))
        (folder / f"{number}.{kind.lower()}").write_bytes(data)


LOOK = """
import faulthandler, os, resource, sys
from pathlib import Path
from finetune.pictures import load_image, picture_size
for path in sorted(Path(sys.argv[1]).iterdir()):
    faulthandler.dump_traceback_later(30, exit=True)
    said = []
    for look in (picture_size, load_image):
        try:
            found = look(str(path))
            said.append("ok")
            found = None
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error), repr(error)
            said.append("refused")
    os.write(1, f"{path.name} {said[0]} {said[1]} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n".encode())
"""


def test_damaged_pictures(tmp_path):
    """In a process of its own: a crash, a hang (of 30 seconds at one picture) or memory would show."""
    damaged(tmp_path, PICTURES)
    bombs(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (300, 300))

    result = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        preexec_fn=limit,
    )
    assert result.returncode == 0, result.stdout[-200:] + result.stderr[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == len(list(tmp_path.iterdir())) >= PICTURES
    assert max(int(memory) for *_, memory in lines) * 1024 < MEMORY
    refused = {name for name, _, loaded, _ in lines if loaded == "refused"}
    assert 0.3 * PICTURES < len(refused) < 0.95 * PICTURES
    assert {f"bomb{n}.png" for n in range(5)} <= refused
    # the header tells of what decoding would refuse, wherever the damage is a missing end
    assert sum(size == "refused" for _, size, _, _ in lines) > 0.5 * len(refused)


def test_mutated_files_open_or_say_why(tmp_path):
    """Bytes of a JSON file changed at random: no error but ValueError, through to the item."""
    from finetune.data_files import load_samples

    turns = [{"role": "user", "content": 'What is “it” \\ "here"?'}, {"role": "assistant", "content": "A thing, [1]."}]
    whole = json.dumps([{"id": n, "conversations": turns} for n in range(5)], indent=1).encode()
    rng = random.Random(2)
    path = tmp_path / "a.json"
    config, tokenizer = (auto.from_pretrained(GOLDEN["llama3"]) for auto in (AutoConfig, AutoTokenizer))
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.choice(
                [b"'", b'"', b"\\", b"[", b"}", b",", b"\xff", b"\n", b"1"]
            )
        path.write_bytes(data)
        try:
            samples = load_samples(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        dataset = SupervisedDataset.for_checkpoint(config, tokenizer, samples)
        for number in range(len(samples)):
            try:
                dataset[number]
            except SampleError as error:
                assert str(error).startswith(f"{path}: sample {number} (id ")
