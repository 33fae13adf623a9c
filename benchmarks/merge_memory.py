"""Host memory that merging an adapter takes, against the sizes of model and shard.

    python benchmarks/merge_memory.py [--gigabytes 0.5 1 2] [--shard 200MB] [--model 2.5] [--dtype bfloat16]

Writes random checkpoints of the real architecture and random adapters (LoRA on q, k, v and o, and all token
embeddings), and merges each with merge_lora.py in a process of its own. All figures are over what the process held
before, when imports were done; see load_memory.py for "peak", which counts mapped pages of files, and "own".
Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from load_memory import watched, write_model  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from finetune.arguments import LORA_TARGETS  # noqa: E402
from finetune.loading import EXTRA_WEIGHTS_NAME, weight_files  # noqa: E402
from finetune.merge_lora import merge  # noqa: E402
from finetune.minicpmv import MiniCPMV  # noqa: E402
from finetune.trainer import extra_trained_tensors  # noqa: E402


def write_adapter(base: Path, folder: Path) -> None:
    """An adapter of rank 64 with random matrices, and the token embeddings."""
    model = MiniCPMV.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=64, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-2 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    torch.save(extra_trained_tensors(model), folder / EXTRA_WEIGHTS_NAME)


def measure(adapter: str, output: str, shard: str) -> dict[str, int]:
    """Merges in this process; bytes."""
    with watched() as figures:
        merge(adapter, output, max_shard_size=shard)
    return {
        "model": sum(file.stat().st_size for file in weight_files(output)),
        "shard": max(file.stat().st_size for file in weight_files(output)),
        **figures,
    }


def run(gigabytes: float, model: str, dtype: torch.dtype, shard: str, folder: Path) -> dict[str, int]:
    """Figures of a merge; `gigabytes` are those of the weights in float32."""
    write_model(folder / "base", model, gigabytes * 1e9, dtype, "safetensors")
    write_adapter(folder / "base", folder / "lora")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--measure", str(folder / "lora"), str(folder / "merged"), shard]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}")
    return json.loads(result.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        sys.stdout.write(json.dumps(measure(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of weights in float32")
    parser.add_argument("--shard", default="200MB", help="most bytes in a file of the merged checkpoint")
    parser.add_argument("--model", choices=("2.5", "2.0"), default="2.5", help="architecture")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of base and result")
    options = parser.parse_args()
    sys.stdout.write("| model, MB | largest shard, MB | peak, MB | own, MB | own / model |\n|---|---|---|---|---|\n")
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            dtype = getattr(torch, options.dtype)
            figures = run(gigabytes, options.model, dtype, options.shard, Path(folder))
        row = [f"{figures[name] / 1e6:.0f}" for name in ("model", "shard", "peak", "own")]
        row.append(f"{figures['own'] / figures['model']:.2f}")
        sys.stdout.write(f"| {' | '.join(row)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
