"""How a training step grows with slices, tokens and batch size: a table, and a picture of the same.

    python benchmarks/train_step.py --deepspeed finetune/ds_config_zero2.json --turn 4 --model_max_length 4608 \\
        --pictures 448x448,640x480,1024x768,1344x896,1344x1344,text:100,text:240,text:490,text:980,text:1960 \\
        --json growth.json
    python benchmarks/train_step.py --deepspeed finetune/ds_config_zero2.json --batch 1 --json 1.json   # and 2, 4
    python benchmarks/growth.py growth.json 1.json 2.json 4.json --plot growth.png

Takes results of train_step.py, those with `--turn` for slices and tokens, those without for batch sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def points(results: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """(size, seconds per step) by what grows, in order of size."""
    grown = {"slices": [], "tokens": [], "batch": []}
    for result in results:
        for row in result["by_entry"]:
            kind = "slices" if row["slices"] else "tokens"
            grown[kind].append((row[kind], row["seconds"]))
        if not result["by_entry"]:
            grown["batch"].append((result["samples_per_process"], result["step_seconds"]["median"]))
    return {kind: sorted(of_kind) for kind, of_kind in grown.items() if of_kind}


def table(grown: dict[str, list[tuple[int, float]]]) -> str:
    """Markdown; where growth is linear, the last column stays the same."""
    lines = ["| grows | size | seconds per step | seconds for each unit more |", "|---|---|---|---|"]
    for kind, of_kind in grown.items():
        for number, (size, seconds) in enumerate(of_kind):
            before = of_kind[number - 1] if number else None
            more = f"{(seconds - before[1]) / (size - before[0]):.6f}" if before and size > before[0] else ""
            lines.append(f"| {kind} | {size} | {seconds:.4f} | {more} |")
    return "\n".join(lines)


def plot(grown: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    figure = Figure(figsize=(4 * len(grown), 3.4), layout="constrained")
    axes = figure.subplots(1, len(grown), squeeze=False)[0]
    names = {"slices": "slices of one picture", "tokens": "tokens of one text", "batch": "samples per step"}
    for axis, (kind, of_kind) in zip(axes, grown.items(), strict=True):
        axis.plot(*zip(*of_kind, strict=True), "o-", linewidth=1.2, markersize=4)
        axis.set(xlabel=names[kind], xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per step")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of train_step.py")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    grown = points(results)
    sys.stdout.write(table(grown) + "\n")
    if arguments.plot:
        first = results[0]
        plot(grown, arguments.plot, f"MiniCPM-V {first['model']}, {first['method']}, {first['device']}")


if __name__ == "__main__":
    main()
