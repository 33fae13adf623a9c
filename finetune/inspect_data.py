"""Look at training data as the model will see it, before any training: no GPU, no weights.

    python finetune/inspect_data.py --model_name_or_path openbmb/MiniCPM-Llama3-V-2_5 --data_path my/train.json \\
        --model_max_length 2048 --report data_report

Goes over every sample, decodes every picture, prints lengths, slices and problems, and recommends a
--model_max_length. With --report, a page shows samples as the model sees them: slices and supervised tokens.
Exit status: 0 when all samples can be used, 1 when some cannot, 2 when the call itself is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import numpy as np

from finetune.arguments import add_image_folder, load_config, model_folder_problems
from finetune.checks import Problem, Remarks, decode_pictures, report_problems, report_remarks, scan
from finetune.data_files import load_samples
from finetune.data_report import Card, write_report
from finetune.dataset import Measure, SampleError, SupervisedDataset, truncate
from finetune.errors import shown
from finetune.loading import load_tokenizer
from finetune.minicpmv import LLM_TYPES, MiniCPMVConfig
from finetune.places import at_home, output_problems

CANDIDATE_LENGTHS = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # tokens
LENGTH_STEP = 64  # tokens; the recommended length is rounded up to a multiple
FIRST, ODD = 6, 3  # cards in the report: of the first samples, and of each kind of odd ones


class Inspection:
    """What a look at every sample found: `problems`, `remarks`, and `measures` of the samples `indices`, which are all
    whose text and pictures can be read, be they too long or not."""

    def __init__(self, dataset: SupervisedDataset, workers: int | None = None):
        found = scan(len(dataset), partial(_look, dataset), "inspecting", workers)
        parts = list(chain.from_iterable(found))
        self.dataset = dataset
        self.problems: list[Problem] = [problem for problems, *_ in parts for problem in problems]
        self.remarks = Remarks.of(remarks for *_, remarks in parts)
        self.measures: dict[int, Measure] = {index: m for _, measures, _ in parts for index, m in measures}

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every measured sample: `text`, `picture` and `total`."""
        total = np.array([m.tokens for m in self.measures.values()], dtype=np.int64)
        picture = np.array([m.picture_tokens for m in self.measures.values()], dtype=np.int64)
        return {"text": total - picture, "picture": picture, "total": total}

    def slices(self) -> np.ndarray:
        """Slices of every picture, the overview counted."""
        return np.array([s for m in self.measures.values() for s in m.slices], dtype=np.int64)

    def summary(self, config: MiniCPMVConfig, files: Sequence[str]) -> dict:
        """All numbers that are printed, in JSON types; lengths in tokens."""
        lengths, slices, limit = self.lengths(), self.slices(), self.dataset.max_length
        total = lengths["total"]
        longest = int(total.max(initial=0))
        recommended = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, config.max_position_embeddings)
        candidates = sorted({*CANDIDATE_LENGTHS, *([limit] if limit else []), *([recommended] if longest else [])})
        with_pictures = sum(1 for m in self.measures.values() if m.slices)
        return {
            "model": LLM_TYPES[config.llm_type],
            "query_num": config.query_num,
            "max_slice_nums": config.slicing["max_slice_nums"],
            "model_max_length": limit,
            "files": list(files),
            "samples": len(self.dataset),
            "with_pictures": with_pictures,
            "text_only": len(self.measures) - with_pictures,
            "pictures": len(slices),
            "tokens": {kind: _spread(values) for kind, values in lengths.items()},
            "slices_per_picture": {str(n): count for n, count in sorted(Counter(slices.tolist()).items())},
            "truncated_at": {str(n): int((total > n).sum()) for n in candidates},
            "nothing_supervised": sum(1 for m in self.measures.values() if not m.kept),
            "recommended_model_max_length": recommended if longest else None,
            "longer_than_the_model_allows": int((total > config.max_position_embeddings).sum()),
            "problems": [{"file": p.file, "index": p.number, "id": p.id, "cause": p.cause} for p in self.problems],
            "remarks": [
                {"kind": kind, "samples": found.samples, "names": found.names, "first": found.first, "text": text}
                for (kind, found), text in zip(self.remarks.items(), report_remarks(self.remarks), strict=True)
            ],
        }

    def cards(self) -> list[Card]:
        """The samples to show: the first ones, the longest, those with most slices, and those that are cut."""
        whole = copy.copy(self.dataset)
        whole.max_length = None
        shown: dict[int, list[str]] = {}
        bad = {problem.index for problem in self.problems}
        measured = {index: m for index, m in self.measures.items() if index not in bad or not m.kept}

        def show(reason: str, indices: Sequence[int]) -> None:
            for index in indices:
                shown.setdefault(index, []).append(reason)

        show("first samples", list(measured)[:FIRST])
        show("longest", sorted(measured, key=lambda n: -measured[n].tokens)[:ODD])
        sliced = [n for n, m in measured.items() if sum(m.slices) > len(m.slices)]
        show("most slices", sorted(sliced, key=lambda n: -sum(measured[n].slices))[:ODD])
        limit = self.dataset.max_length
        show("truncated", [n for n in measured if limit and measured[n].kept and measured[n].tokens > limit][:ODD])
        show("nothing supervised", [n for n in measured if not measured[n].kept][:ODD])
        cards = []
        for index, reasons in shown.items():
            try:
                item = whole[index]
            except SampleError:  # a picture that cannot be decoded; it is among the problems
                continue
            kept = len(item["input_ids"])
            if limit:
                kept = len(truncate(item, limit)["input_ids"]) if measured[index].kept else 0
            cards.append(Card(reasons, item["id"], item, whole.grids(index), kept))
        return cards


def _look(dataset: SupervisedDataset, indices: range) -> tuple[list[Problem], list[tuple[int, Measure]], Remarks]:
    problems, measures, remarks = [], [], Remarks()
    for index in indices:
        remarks.see(dataset, index)
        try:
            measures.append((index, dataset.measure(index)))
            decode_pictures(dataset, index)
            dataset.check_supervised(measures[-1][1])
        except ValueError as error:
            problems.append(Problem(index, *dataset.place(index), str(error)))
    return problems, measures, remarks


def _spread(values: np.ndarray) -> dict[str, int] | None:
    if len(values) == 0:
        return None
    points = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: int(np.percentile(values, p, method="higher")) for name, p in points.items()}


def as_text(summary: dict) -> str:
    """The summary for a reader."""
    problems = [
        f"  {p['file'] + ': ' if p['file'] else ''}sample {p['index']} (id {shown(p['id'])}): {p['cause']}"
        for p in summary["problems"]
    ]
    count = summary["samples"]
    lines = [
        f"{summary['model']}, at most {summary['max_slice_nums']} slices a picture beside its overview",
        f"{count:,} samples: {summary['with_pictures']:,} with pictures, {summary['text_only']:,} text only, "
        f"{len(problems):,} with problems; {summary['pictures']:,} pictures",
    ]
    if summary["tokens"]["total"]:
        lines.append(f"\n{'tokens':<10}" + "".join(f"{name:>9}" for name in summary["tokens"]["total"]))
        for kind, spread in summary["tokens"].items():
            lines.append(f"{kind:<10}" + "".join(f"{value:>9,}" for value in spread.values()))
        lines.append("\nslices of a picture (overview counted): pictures")
        lines += [f"{n:>9}: {pictures:,}" for n, pictures in summary["slices_per_picture"].items()]
        lines.append("\n--model_max_length: samples that it cuts")
        lines += [f"{n:>9}: {cut:,} ({cut / count:.1%})" for n, cut in summary["truncated_at"].items()]
    lines.append(f"\nsamples with nothing supervised: {summary['nothing_supervised']:,}")
    if problems:
        lines += ["\nproblems:", report_problems(problems)]
    if summary["remarks"]:
        lines += ["\nremarks:", *(f"  {remark['text']}" for remark in summary["remarks"])]
    if summary["longer_than_the_model_allows"]:
        lines.append(
            f"\n{summary['longer_than_the_model_allows']:,} samples are longer than the model allows: shorten them, or "
            "lower --max_slice_nums"
        )
    if summary["recommended_model_max_length"]:
        lines.append(
            f"\nrecommended: --model_max_length {summary['recommended_model_max_length']} (a batch is padded to its "
            "own longest sample, so room costs nothing by itself)"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        description="Show what the model will see of training data; no GPU, no weights.", allow_abbrev=False
    )
    model_help = "folder of a checkpoint, or its name on the hub"
    parser.add_argument("--model_name_or_path", required=True, type=at_home, help=model_help)
    parser.add_argument(
        "--data_path", required=True, nargs="+", type=at_home, help="data files or folders, as for finetune.py"
    )
    add_image_folder(parser)
    parser.add_argument("--model_max_length", type=int, help="judge samples by this length in tokens; default: do not")
    parser.add_argument("--max_slice_nums", type=int, help="most slices of a picture; default: the checkpoint's")
    parser.add_argument("--num_workers", type=int, help="processes; default: as many as there are cores")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    report = {"type": lambda path: Path(at_home(path)), "metavar": "DIR", "help": "write DIR/report.html"}
    parser.add_argument("--report", **report)
    parser.add_argument("--cache_dir", help="folder for what is downloaded from the hub")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    config = load_config(arguments.model_name_or_path, arguments.cache_dir)
    wrong = [config] if isinstance(config, str) else []
    if not wrong:
        wrong = model_folder_problems(
            "--model_name_or_path", arguments.model_name_or_path, weights=False, cache_dir=arguments.cache_dir
        )
    if arguments.report:
        model = [("--model_name_or_path", arguments.model_name_or_path)]
        wrong += output_problems("--report", arguments.report, model, around=False)
    for flag in ("model_max_length", "max_slice_nums"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            wrong.append(f"--{flag} {getattr(arguments, flag)}: expected 1 or more")
    if arguments.num_workers is not None and arguments.num_workers < 0:
        wrong.append(f"--num_workers {arguments.num_workers}: expected 0 or more")
    if arguments.image_folder and not Path(arguments.image_folder).is_dir():
        wrong.append(f"--image_folder {arguments.image_folder}: there is no such folder")
    if arguments.image_folder_only and not arguments.image_folder:
        wrong.append("--image_folder_only true needs --image_folder")
    try:
        samples = load_samples(arguments.data_path)
    except ValueError as error:
        wrong.append(str(error))
    if not wrong:
        try:
            tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.cache_dir)
        except ValueError as error:
            wrong += [f"--model_name_or_path {line}" for line in str(error).splitlines()]
    if wrong:
        parser.exit(2, "".join(f"inspect_data.py: {line}\n" for line in wrong))

    if arguments.max_slice_nums is not None:
        config.set_max_slice_nums(arguments.max_slice_nums)
    dataset = SupervisedDataset.for_checkpoint(
        config,
        tokenizer,
        samples,
        arguments.model_max_length,
        arguments.image_folder,
        arguments.image_folder_only,
    )
    found = Inspection(dataset, arguments.num_workers)
    summary = found.summary(config, arguments.data_path)
    if arguments.json:
        sys.stdout.write(json.dumps(summary, indent=1, ensure_ascii=False, default=repr) + "\n")
    else:
        sys.stdout.write(as_text(summary) + "\n")
    if arguments.report:
        path = arguments.report / "report.html"
        try:
            arguments.report.mkdir(parents=True, exist_ok=True)
            write_report(path, tokenizer, config.llm_type, summary, found.lengths(), found.slices(), found.cards())
        except OSError as error:  # such as a disk that is full
            parser.exit(2, f"inspect_data.py: --report {arguments.report}: cannot be written: {error}\n")
        sys.stderr.write(f"wrote {path}\n")
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
