"""Shared by all tests: golden files, tiny checkpoints, small data, and the launchers run as a user runs them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed compiles a small extension on first use on CPUs. In a folder of its own, the lock of a build that somebody
# killed elsewhere cannot hold up the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose processes inherit the folder
    EXTENSIONS = tempfile.TemporaryDirectory(prefix="torch_extensions")
    os.environ["TORCH_EXTENSIONS_DIR"] = EXTENSIONS.name

from finetune import finetune  # noqa: E402
from finetune.errors import UserError  # noqa: E402
from finetune.loading import EXTRA_WEIGHTS_NAME, load_tokenizer  # noqa: E402
from finetune.minicpmv.tiny import MODELS, write_checkpoint  # noqa: E402
from finetune.minicpmv.vision import to_strip  # noqa: E402
from finetune.reporting import settings_record, write_settings  # noqa: E402
from finetune.trainer import extra_trained_tensors  # noqa: E402

GOLDEN = {"llama3": TESTS / "golden" / "minicpm_llama3_v2_5", "minicpm": TESTS / "golden" / "minicpm_v2"}
GOLDEN_DATA = TESTS / "golden" / "data"
LLM_TYPES = tuple(GOLDEN)
PATIENCE = 600  # seconds; two launchers at a time are slow where there are two cores


# Every run draws the same examples and random numbers. Another search each time, by name:
#   sh run_tests.sh -k "test_name" --hypothesis-profile search
hypothesis.settings.register_profile("fixed", derandomize=True, database=None)
hypothesis.settings.register_profile("search", derandomize=False, max_examples=2000)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw numbers without a seed of their own draw the same ones in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """On a machine with GPUs: `-m gpu` runs on them, all other tests run on the CPU as everywhere. Said before torch
    looks for GPUs, after which it would not be heard."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The module that takes longest first, since two processes share the modules."""
    items.sort(key=lambda item: item.path.name != "test_runs.py")


def golden_batch(llm_type: str) -> dict:
    """`data` for the model, from `batch.safetensors`; also `labels`."""
    stored = load_file(GOLDEN[llm_type] / "batch.safetensors")
    data = {name: stored[name] for name in ("position_ids", "attention_mask", "labels")}
    data["input_ids"] = stored["input_ids"].long()
    for name in ("tgt_sizes", "image_bound"):
        data[name] = [stored[f"{name}.{sample}"] for sample in range(3)]
    data["pixel_values"] = []
    for sample in range(3):
        pictures = [stored[f"image.{sample}.{n}"].float() for n in range(len(data["image_bound"][sample]))]
        data["pixel_values"].append([to_strip(p, 14) for p in pictures] if llm_type == "llama3" else pictures)
    return data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A tiny random checkpoint of each model."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        llm_type: write_checkpoint(model, folder / llm_type) for llm_type, model in zip(LLM_TYPES, MODELS, strict=True)
    }


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """24 samples: one picture, a large one (slices), several turns, and text only, in turn."""
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for number in range(24):
        colour = [(200, 30, 30), (30, 160, 60), (40, 70, 200)][number % 3]
        word = ["red", "green", "blue"][number % 3]
        turns = [
            {"role": "user", "content": "<image>\nWhat colour is it?"},
            {"role": "assistant", "content": f"It is {word}." * (1 + number % 3)},
        ]
        sample = {"id": f"s{number}", "image": f"{number}.png", "conversations": turns}
        size = (200, 120) if number % 4 == 1 else (112, 112 - 14 * (number % 3))
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
        if number % 4 == 2:
            turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        if number % 4 == 3:
            del sample["image"]
            turns[0]["content"] = "Say a colour."
        samples.append(sample)
    path = folder / "train.json"
    path.write_text(json.dumps(samples))
    return path


def launch(script: str, *flags: object, cwd: Path | None = None, check: bool = True, timeout: int = 240, **variables):
    """Run a launcher with `sh` as a user does: variables in the environment, further flags behind it."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    result = subprocess.run(
        ["sh", str(ROOT / "finetune" / script), *map(str, flags)],
        cwd=cwd or ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result


def launch_nodes(script: str, *flags: object, nodes: Sequence[Mapping[str, object]], **variables: object) -> list:
    """The launcher as two or more nodes would run it at the same time, one process each, with a node's own variables;
    results in their order."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    rendezvous = {"NNODES": len(nodes), "GPUS_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def node(rank: int):
        own = {"NODE_RANK": rank, **nodes[rank]}
        return launch(script, *flags, check=False, timeout=PATIENCE, **rendezvous, **own, **variables)

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(node, range(len(nodes))))


def outcome(main: Callable[[list[str]], object], words: Iterable[object], capsys) -> tuple[int, list[str]]:
    """Exit status of a program that is run in this process, and what it says on stderr, line by line."""
    try:
        main([str(word) for word in words])
    except UserError as error:
        status, last = 1, str(error)
    except SystemExit as end:
        status, last = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
    else:
        status, last = 0, ""
    return status, f"{capsys.readouterr().err}{last}".splitlines()


def losses(folder: Path) -> list[float]:
    """Training losses of a run, one for each logged step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def write_adapter(base: Path, folder: Path, *flags: object, seed: int = 0) -> Path:
    """An adapter folder as a LoRA run with these flags leaves it; what it would have trained is changed at random."""
    arguments = ["--model_name_or_path", base, "--output_dir", folder, "--use_lora", "true", "--report_to", "none"]
    model_args, _, args, lora_args = finetune.parse_arguments([*map(str, arguments), *map(str, flags)])
    config = finetune.load_config(str(base))
    if args.max_slice_nums is not None:
        config.set_max_slice_nums(args.max_slice_nums)
    model = finetune.load_model(model_args, args, lora_args, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * (0.1 * parameter.std(correction=0) + 0.02)
    model.save_pretrained(folder)
    torch.save(extra_trained_tensors(model), folder / EXTRA_WEIGHTS_NAME)
    load_tokenizer(base).save_pretrained(folder)
    write_settings(settings_record({}, {"slicing": config.slicing, "dtype": "float32"}), folder)
    return folder


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors whose values are the same in both."""
    return [name for name in left if name in right and torch.equal(left[name], right[name])]
