"""Host memory that loading a checkpoint takes, in every process, against the size of the model.

    python benchmarks/load_memory.py [--gigabytes 0.1 0.5 1] [--model 2.5] [--format safetensors] [--dtype float32]

Writes random checkpoints of the real architecture in several files and loads each through finetune.py's `load_model`
on the CPU, in processes of their own: one; two with DDP; two and four with ZeRO-3. A table row for each run. All
figures but the first are of the process with most, over what it held before, when imports, arguments and the
connection between the processes were done:

* model: all weights in the dtype that they are loaded in, which is float32 on CPUs
* peak: the most that was resident at once (VmHWM), mapped pages of checkpoint files counted. These belong to the
  page cache, are there once for all processes, and the kernel takes them back when it needs the room.
* own: the most that was the process's own (RssAnon and RssShmem, read every 2 ms), which nobody can take back
* after: resident when all is loaded, mapped pages counted

Linux only (/proc).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import finetune.finetune as toolkit  # noqa: E402
from finetune.minicpmv import MiniCPMV, MiniCPMVConfig  # noqa: E402
from finetune.minicpmv.tiny import MODELS, write_checkpoint  # noqa: E402

LAYOUTS = {  # name: processes, DeepSpeed configuration
    "1 process": (1, ""),
    "2 processes, DDP": (2, ""),
    "2 processes, ZeRO-3": (2, "finetune/ds_config_zero3.json"),
    "4 processes, ZeRO-3": (4, "finetune/ds_config_zero3.json"),
}
WIDTH = 1024
FILES = 4
EMBEDDINGS = 0.06  # of all weights, the largest tensor: as in 2.5


def write_model(folder: Path, model: str, size: float, dtype: torch.dtype, form: str) -> None:
    """A random checkpoint whose weights take some `size` bytes in float32: real layers, as many as that needs."""
    write_checkpoint(MODELS[model == "2.0"], folder)
    (folder / "model.safetensors").unlink()
    config = MiniCPMVConfig.from_pretrained(folder)
    config.update({"hidden_size": WIDTH, "intermediate_size": 3584, "num_attention_heads": 8, "dtype": "float32"})
    config.vocab_size = max(config.vocab_size, round(EMBEDDINGS * size / 4 / WIDTH))
    with torch.device("meta"):
        few, more = (MiniCPMV(MiniCPMVConfig(**{**config.to_dict(), "num_hidden_layers": n})) for n in (1, 2))
    first, second = (sum(p.numel() for p in network.parameters()) for network in (few, more))
    config.num_hidden_layers = max(1, 1 + round((size / 4 - first) / (second - first)))
    network = MiniCPMV(config).to(dtype)
    network.save_pretrained(folder, max_shard_size=int(size / 4 * dtype.itemsize / FILES))
    if form == "bin":
        from safetensors.torch import load_file

        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            text = index.read_text(encoding="utf-8").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text, encoding="utf-8")
            index.unlink()
        else:
            (folder / "model.bin").rename(folder / "pytorch_model.bin")


def memory(*fields: str) -> int:
    """Bytes that /proc says of this process, added up."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in fields) * 1024


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Yields a dict that holds, afterwards, `peak`, `own` and `after` in bytes, over what the process held before."""
    gc.collect()
    own = before_own = memory("RssAnon", "RssShmem")
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    done = threading.Event()

    def watch() -> None:
        nonlocal own
        while not done.wait(0.002):
            own = max(own, memory("RssAnon", "RssShmem"))

    watcher = threading.Thread(target=watch)
    figures: dict[str, int] = {}
    watcher.start()
    try:
        yield figures
    finally:
        done.set()
        watcher.join()
    figures["peak"] = memory("VmHWM") - before
    figures["own"] = max(own, memory("RssAnon", "RssShmem")) - before_own
    figures["after"] = memory("VmRSS") - before


def measure(argv: list[str]) -> dict[str, int]:
    """Loads the model as `finetune.py` with these flags would; bytes."""
    model_args, _, args, lora_args = toolkit.parse_arguments(argv)
    config = toolkit.load_config(model_args.model_name_or_path, None)
    if args.deepspeed:
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False)  # imports and threads that loading is not to blame for
    elif args.world_size > 1:
        torch.distributed.barrier()
    with watched() as figures:
        model = toolkit.load_model(model_args, args, lora_args, config)
    return {
        "model": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters()),
        **figures,
    }


def run(layout: str, model: Path, method: str, output: Path) -> dict[str, int]:
    """A layout's figures, of the process with most."""
    processes, deepspeed = LAYOUTS[layout]
    flags = ["--model_name_or_path", model, "--output_dir", output / "out", "--data_path", "none"]
    flags += ["--use_lora", "true"] if method == "lora" else []
    flags += ["--deepspeed", ROOT / deepspeed] if deepspeed else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = list(map(str, [*command, "--measure", output, *flags]))
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{layout}: {result.stdout[-2000:]}\n{result.stderr[-6000:]}")
    ranks = [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        result = measure(sys.argv[3:])
        Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="of weights in float32")
    parser.add_argument("--model", choices=("2.5", "2.0"), default="2.5", help="architecture")
    parser.add_argument("--method", choices=("lora", "full"), default="full", help="what is trained")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors", help="of the files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="in the files")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="which runs")
    options = parser.parse_args()
    sys.stdout.write("| model, MB | layout | peak, MB | own, MB | after, MB | peak / model | own / model |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder, "model")
            write_model(model, options.model, gigabytes * 1e9, getattr(torch, options.dtype), options.format)
            for layout in options.layouts:
                figures = run(layout, model, options.method, Path(folder))
                size, peak, own, after = (figures[name] for name in ("model", "peak", "own", "after"))
                row = [f"{size / 1e6:.0f}", layout, *(f"{figure / 1e6:.0f}" for figure in (peak, own, after))]
                row += [f"{peak / size:.2f}", f"{own / size:.2f}"]
                sys.stdout.write(f"| {' | '.join(row)} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
