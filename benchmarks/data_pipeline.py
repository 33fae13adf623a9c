"""How fast training samples are made, beside what Pillow alone needs for the same pictures.

    python benchmarks/data_pipeline.py [--model_name_or_path CHECKPOINT] [--step_seconds 0.7 --batch_size 2 --workers 4]

For every size a photo-like JPEG is decoded, sliced, tokenized and labelled (an item of the data set as finetune.py
trains on it), in turn with Pillow's calls for the same slices: decode, convert to RGB, resize to the overview, resize
to the grid. Both on one core; the ratio of the medians is what counts. Then a DataLoader with workers makes batches of
all sizes mixed; with --step_seconds, the measured time of one training step, it says whether the GPU would wait.
Without a checkpoint, a tiny one with its own tokenizer is made on the spot; its slices and query tokens are those of
MiniCPM-Llama3-V 2.5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoTokenizer

from finetune.dataset import SupervisedDataset, build_transform, data_collator, load_samples
from finetune.minicpmv.image_slicing import plan_slices
from finetune.minicpmv.tiny import MODELS, write_checkpoint

SIZES = ((224, 168), (448, 448), (640, 480), (800, 600), (1024, 768), (1280, 960), (1600, 1200), (1920, 1080))
SLICING = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14}
ANSWER = "The desserts are cakes with bananas and pecans on top. They are like donuts, but for the bananas."


def photo(size: tuple[int, int]) -> Image.Image:
    """Soft shapes with a little noise, which compress about as photos do."""
    rng = np.random.default_rng(size)
    shapes = Image.fromarray(rng.integers(0, 256, (size[1] // 24 + 1, size[0] // 24 + 1, 3), dtype=np.uint8))
    noise = rng.integers(-6, 7, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(shapes.resize(size)) + noise, 0, 255).astype(np.uint8))


def write_data(folder: Path) -> Path:
    """One sample for each size, and one of text only."""
    turns = [
        {"role": "user", "content": "<image>\nWhat type of desserts are on the white plate?"},
        {"role": "assistant", "content": ANSWER},
    ]
    samples = []
    for size in SIZES:
        name = f"{size[0]}x{size[1]}.jpg"
        photo(size).save(folder / name, quality=90)
        samples.append({"id": name, "image": name, "conversations": turns})
    plain = [{**turns[0], "content": "What type of desserts are on the white plate?"}, turns[1]]
    samples.append({"id": "text", "conversations": plain})
    path = folder / "samples.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def with_pillow(path: Path) -> None:
    """Pillow's calls for one picture's slices, and nothing else."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    overview, grid, cell = plan_slices(image.size, **SLICING)
    image.resize(overview, Image.Resampling.BICUBIC)
    if grid:
        image.resize((grid[0] * cell[0], grid[1] * cell[1]), Image.Resampling.BICUBIC)


def in_turn(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each call, the calls taking turns so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e3)
    return [median(taken) for taken in times]


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description="Samples per second of the data pipeline, beside Pillow's own time.")
    parser.add_argument("--model_name_or_path", help="checkpoint whose tokenizer is used; default: a tiny one")
    parser.add_argument("--repeats", type=int, default=25, help="measurements of each size")
    parser.add_argument("--workers", type=int, default=4, help="loader processes (the launchers' setting)")
    parser.add_argument("--batch_size", type=int, default=1, help="samples of a training step")
    parser.add_argument("--step_seconds", type=float, help="measured time of a training step")
    arguments = parser.parse_args()
    say = sys.stdout.write
    torch.set_num_threads(1)
    say(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores; Python "
        f"{platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}\n\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_data(folder)
        checkpoint = arguments.model_name_or_path or write_checkpoint(MODELS[0], folder / "tiny")
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        make = partial(
            SupervisedDataset,
            load_samples(path),
            tokenizer=tokenizer,
            slice_config=SLICING,
            llm_type=config.llm_type,
            query_nums=96 if config.llm_type == "llama3" else 64,
            batch_vision=config.llm_type == "llama3",
            max_length=4096,
        )
        dataset, floats = make(transform=None), make(transform=build_transform())
        say(f"{'size':>10}{'slices':>8}{'tokens':>8}{'Pillow ms':>11}{'item ms':>9}{'ratio':>7}{'floats':>8}")
        say(f"{'items/s':>9}\n")
        totals = [0.0, 0.0, 0.0]
        for index, size in enumerate(SIZES):
            picture = folder / f"{size[0]}x{size[1]}.jpg"
            calls = [partial(with_pillow, picture), partial(dataset.__getitem__, index)]
            times = in_turn([*calls, partial(floats.__getitem__, index)], arguments.repeats)
            totals = [total + taken for total, taken in zip(totals, times, strict=True)]
            pillow, item, as_floats = times
            measure = dataset.measure(index)
            say(
                f"{size[0]:>5}x{size[1]:<4}{measure.slices[0]:>8}{measure.tokens:>8}{pillow:>11.2f}{item:>9.2f}"
                f"{item / pillow:>7.2f}{as_floats / pillow:>8.2f}{1000 / item:>9.1f}\n"
            )
        pillow, item, as_floats = totals
        say(f"{'all':>10}{'':>16}{pillow:>11.2f}{item:>9.2f}{item / pillow:>7.2f}{as_floats / pillow:>8.2f}")
        say(f"{1000 * len(SIZES) / item:>9.1f}\n")
        (text,) = in_turn([partial(dataset.__getitem__, len(SIZES))], 10 * arguments.repeats)
        say(f"{'text':>10}{'':>16}{'':>11}{text:>9.2f}{'':>15}{1000 / text:>9.1f}\n\n")
        say("floats: the same with pixels normalised on the CPU (a transform given), beside uint8 for the device\n")

        order = [n % len(SIZES) for n in range(40 * len(SIZES))]
        loader = DataLoader(
            Subset(dataset, order),
            batch_size=arguments.batch_size,
            num_workers=arguments.workers,
            collate_fn=partial(data_collator, max_length=4096),
        )
        batches = iter(loader)
        for _ in range(len(SIZES)):  # the workers' start is not counted
            next(batches)
        start, count = time.perf_counter(), 0
        for batch in batches:
            count += len(batch["input_ids"])
        rate = count / (time.perf_counter() - start)
        say(f"\nloader: {arguments.workers} workers, batches of {arguments.batch_size}: {rate:.1f} samples/s\n")
        if arguments.step_seconds:
            needed = arguments.batch_size / arguments.step_seconds
            verdict = "feeds the GPU" if rate > needed else "does NOT feed the GPU: it waits"
            say(f"a step of {arguments.step_seconds} s needs {needed:.1f} samples/s: the loader {verdict}\n")


if __name__ == "__main__":
    main()
