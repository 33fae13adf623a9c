"""What opening a large data file costs: `load_samples` beside `json.load`, each in a process of its own.

    python benchmarks/open_file.py [--samples 1000000]

Writes text-only samples of some 300 bytes as a JSON list and as JSON Lines into a temporary folder. A line for each
reading: seconds to open, resident memory before, at its peak and by how much that is more (MB), and microseconds for
a sample at a random place, parsed. Linux only (/proc); the files are in the page cache, as they were just written.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.data_files import load_samples  # noqa: E402

ACCESSES = 20_000


def write_files(folder: Path, count: int) -> dict[str, Path]:
    words = [f"word{n}" for n in range(50)] + ['"quoted"', "back\\slash", "[brackets],", "画像", "two\nlines"]
    chance = random.Random(0)
    paths = {"JSON list": folder / "list.json", "JSON Lines": folder / "lines.jsonl"}
    with (
        paths["JSON list"].open("w", encoding="utf-8") as whole,
        paths["JSON Lines"].open("w", encoding="utf-8") as lines,
    ):
        for number in range(count):
            turns = [{"role": role, "content": " ".join(chance.choices(words, k=14))} for role in ("user", "assistant")]
            sample = json.dumps({"id": str(number), "conversations": turns}, ensure_ascii=False)
            whole.write(f"{',' if number else '['}\n{sample}")
            lines.write(f"{sample}\n")
        whole.write("\n]\n")
    return paths


def memory(field: str) -> float:
    """MB, of this process: `VmRSS` now, `VmHWM` at its peak. (getrusage's peak may be that of the parent.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def measure(reader: str, path: Path) -> str:
    before, start = memory("VmRSS"), time.perf_counter()
    if reader == "json.load":
        with path.open(encoding="utf-8") as file:
            samples = json.load(file)
    else:
        samples = load_samples(path)
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    places = random.Random(1).choices(range(len(samples)), k=ACCESSES)
    start = time.perf_counter()
    for place in places:
        samples[place]
    access = (time.perf_counter() - start) / ACCESSES * 1e6
    return f"{seconds:8.2f} s  {before:6.0f} -> {peak:6.0f} MB (+{peak - before:.0f})  {access:6.1f} us a sample"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(measure(arguments.measure[0], Path(arguments.measure[1])) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in write_files(Path(folder), arguments.samples).items():
            for reader in ("load_samples", "json.load")[: 1 + (kind == "JSON list")]:
                command = [sys.executable, __file__, "--measure", reader, str(path)]
                result = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                sys.stdout.write(f"{kind:10} {path.stat().st_size / 1e6:6.0f} MB  {reader:12} {result}")


if __name__ == "__main__":
    main()
