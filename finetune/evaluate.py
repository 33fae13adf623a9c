"""Score a model on a data file: it answers, and its answers are compared with those of the data.

    python finetune/evaluate.py --model output/lora --data_path my/eval.json --output evaluation
    python finetune/evaluate.py --model output/lora --data_path my/eval.json --output evaluation --compare MODEL
    torchrun --nproc_per_node 8 finetune/evaluate.py ...    # the questions divided over 8 GPUs

Every answer in the data with a weight other than 0 is a question of its own, with the data's own answers to earlier
questions before it. Writes metrics.json, answers.jsonl and evaluation.html.
Exit status: 0 when all was answered, 1 when it could not be, 2 when the call itself is wrong, 128 + signal when it was
stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import numpy as np
import torch
import transformers
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from finetune.arguments import (
    DTYPES,
    FoundModel,
    add_image_folder,
    choose_dtype,
    find_model,
    fitting_length,
    load_found,
    uses_gpu,
)
from finetune.checks import Problem, loader_processes, report_problems, warn_of_remarks
from finetune.data_files import Samples, load_samples
from finetune.dataset import SampleError, SupervisedDataset
from finetune.errors import ProcessError, UserError, is_main_of_node, over_processes, processes, rank
from finetune.evaluation_page import write_evaluation
from finetune.generation import Answer, Question, compare, deal, find_questions, generate_answers, load_of
from finetune.guards import LOADER_ERRORS, death_of_loader, die_with_launcher, lacking_memory
from finetune.loaders import fitting_workers
from finetune.loading import ADAPTER_CONFIG_NAME, load_tokenizer, named_base
from finetune.machines import end_together, say_threads
from finetune.metrics import METRICS, Scores, difference_interval, mean_scores
from finetune.minicpmv import LLM_TYPES
from finetune.minicpmv.conversation import text_turns
from finetune.minicpmv.modeling_minicpmv import SAMPLING
from finetune.model_folder import access_problem
from finetune.pictures import map_pictures, record_of
from finetune.places import at_home, output_problems
from finetune.reporting import versions
from finetune.run_lock import only_one_writes

logger = logging.getLogger("finetune")

ANSWERS, METRICS_NAME, PAGE = "answers.jsonl", "metrics.json", "evaluation.html"
IDENTITY = "evaluation.json"  # in the folder of an unfinished evaluation: what it is of
NEW_TOKENS = 256  # most tokens of an answer by default, where the model takes several times as many
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal came; its number is the argument."""


@dataclass
class Task:
    """A model with the questions that it shall answer, before any weight is loaded."""

    found: FoundModel
    dataset: SupervisedDataset
    questions: list[Question]
    problems: list[Problem]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Score a model on a data file: exact match, ANLS, ROUGE-L, token F1.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint or adapter, or the name of a checkpoint on the hub")
    add("--base", help="base model of adapters, where it is not in the place that they name")
    add("--data_path", required=True, nargs="+", type=at_home, help="data files or folders, as for finetune.py")
    add(
        "--output",
        required=True,
        type=lambda path: Path(at_home(path)),
        help="folder for the result; it must be empty or not there",
    )
    add("--compare", metavar="BEFORE", help="a model that is evaluated first, or the --output of an earlier evaluation")
    add_image_folder(parser)
    add("--bad_samples", choices=("fail", "skip"), default="fail", help="samples that cannot be used; default: fail")
    add("--limit", type=int, help="evaluate the first LIMIT samples only; default: all")
    add("--batch_size", type=int, default=8, help="questions at once, per process; default: 8")
    add(
        "--max_new_tokens",
        type=int,
        help=f"longest answer in tokens; the rest is cut off; default: {NEW_TOKENS}, or a quarter of what the model "
        "takes, if that is less",
    )
    add("--max_inp_length", type=int, help="longest prompt in tokens, pictures included; default: what the model takes")
    add("--max_slice_nums", type=int, help="most slices of a picture; default: as the model was trained")
    add("--num_beams", type=int, default=1, help="1 (default): greedy; more: beam search")
    add("--temperature", type=float, default=0.0, help="0 (default): no sampling; above: sampling")
    add(
        "--top_p",
        type=float,
        help=f"with sampling: from the likeliest tokens of this part; default: {SAMPLING['top_p']}",
    )
    add("--top_k", type=int, help=f"with sampling: from so many tokens; 0: all; default: {SAMPLING['top_k']}")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: against repetition; default: 1")
    add("--seed", type=int, default=0, help="of the sampling; default: 0")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights; default: auto, as in training")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, GPUs where there are any")
    add("--num_workers", type=int, help="processes that load pictures, per GPU; default: 4, or as many as cores")
    add("--report_samples", type=int, default=200, help="most answers in evaluation.html; default: 200")
    add("--cache_dir", help="folder for what is downloaded from the hub")
    return parser


def check_arguments(arguments: argparse.Namespace) -> list[str]:
    """All that is wrong with the arguments, one line each; nothing is loaded."""
    wrong = []
    at_least = {"batch_size": 1, "max_new_tokens": 1, "max_inp_length": 1, "max_slice_nums": 1, "num_beams": 1}
    at_least |= {"limit": 1, "num_workers": 0, "report_samples": 0, "temperature": 0, "top_k": 0}
    for flag, least in at_least.items():
        value = getattr(arguments, flag)
        if value is not None and value < least:
            wrong.append(f"--{flag} {value}: expected {least} or more")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        wrong.append(f"--top_p {arguments.top_p}: expected more than 0, and 1 at most")
    if arguments.repetition_penalty <= 0:
        wrong.append(f"--repetition_penalty {arguments.repetition_penalty}: expected more than 0, such as 1.05")
    if arguments.temperature > 0 and arguments.num_beams > 1:
        wrong.append("--num_beams with --temperature: beam search does not sample; choose one")
    for flag in ("top_p", "top_k"):
        if getattr(arguments, flag) is not None and arguments.temperature == 0:
            wrong.append(f"--{flag} {getattr(arguments, flag)}: only with sampling, such as --temperature 0.7")
    if arguments.image_folder and not Path(arguments.image_folder).is_dir():
        wrong.append(f"--image_folder {arguments.image_folder}: there is no such folder")
    if arguments.image_folder_only and not arguments.image_folder:
        wrong.append("--image_folder_only true needs --image_folder")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        wrong.append("--device cuda: PyTorch finds no GPU here")
    if why := access_problem(arguments.output):
        wrong.append(f"--output {arguments.output}: {why}")
    elif arguments.output.exists() and not arguments.output.is_dir():
        wrong.append(f"--output {arguments.output}: is a file; name a folder, new or empty")
    elif arguments.output.is_dir() and any(arguments.output.iterdir()):
        wrong.append(f"--output {arguments.output}: is not empty; nothing is overwritten, name another folder")
    elif os.path.ismount(arguments.output.resolve()):  # which no complete folder can be put in the place of
        wrong.append(f"--output {arguments.output}: is a disk's own folder; name a folder within it")
    else:
        read = [(f"--{flag}", getattr(arguments, flag)) for flag in ("model", "base", "compare")]
        read += [
            (f"the base of --{flag}", named_base(path))
            for flag in ("model", "compare")
            if (path := getattr(arguments, flag)) and arguments.base is None
        ]
        data = [("--data_path", path) for path in arguments.data_path]
        wrong += output_problems("--output", arguments.output, read, data)
    return wrong


def evaluate(arguments: argparse.Namespace, tasks: Sequence[Task], earlier: list[dict] | None, limited: str) -> dict:
    """Answer, score and save. All processes must call it.

    Args:
        tasks: of `--model`, and of the model that it is compared with, if that is evaluated too.
        earlier: the records of an earlier evaluation that it is compared with, in the order of the questions.
        limited: what `--limit` left out, in words; empty: nothing.

    Returns:
        what is saved as `metrics.json`.
    """
    start = time.monotonic()
    folder = unfinished(arguments.output)
    with only_one_writes(arguments.output, takes=is_main()):
        _begin(folder, _identity(arguments, tasks))
        before = earlier
        if len(tasks) > 1:
            before = answer_all(tasks[1], arguments, folder, "before")
        after = answer_all(tasks[0], arguments, folder, "after")
        summary = summarise(arguments, tasks[0], after, before, round(time.monotonic() - start, 1), limited)
        if is_main():
            save(arguments, tasks[0], folder, summary, after)
    return summary


def unfinished(output: Path) -> Path:
    """Where an evaluation lies until it is complete."""
    whole = output.resolve()
    return whole.with_name(f"{whole.name}.incomplete")


def _identity(arguments: argparse.Namespace, tasks: Sequence[Task]) -> dict:
    """What tells evaluations apart, in JSON types: answers of one are not to be taken for another's."""
    free = ("output", "num_workers", "batch_size", "report_samples", "device", "cache_dir", "bad_samples")
    settings = {name: value for name, value in vars(arguments).items() if name not in free}
    paths = [path for task in tasks for path in (task.found.path, task.found.base) if Path(path).is_dir()]
    paths += arguments.data_path
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*")) if path.is_dir() else [path])]
    stats = {str(file.resolve()): file.stat() for file in files if file.is_file()}
    return {
        "settings": settings,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "questions": [len(task.questions) for task in tasks],
    }


def _begin(folder: Path, identity: dict) -> None:
    """Make the folder of an unfinished evaluation, or go on with the one that is there."""
    problem = None
    if is_main():
        try:
            if folder.exists():
                other = json.loads((folder / IDENTITY).read_text(encoding="utf-8")) != identity
                if other and any(part.stat().st_size for part in folder.glob("*.jsonl")):
                    problem = (
                        f"{folder} holds answers of another call, model or data; remove it, or name another --output"
                    )
                elif other:  # that ended before the first answer, such as over a model that could not be loaded
                    (folder / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")
            else:
                folder.mkdir(parents=True)
                (folder / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")
        except (OSError, ValueError) as error:
            problem = f"{folder}: cannot be used for the answers: {error}; remove it, or name another --output"
    for found in over_processes(problem):
        if found is not None:
            raise UserError(found)


def answer_all(task: Task, arguments: argparse.Namespace, folder: Path, name: str) -> list[dict]:
    """The records of all questions of a task, in the order of the data; those that are in the folder already are not
    asked again. All processes must call it."""
    done = {key: record for part in over_processes(_read_parts(folder, name)) for key, record in part.items()}
    asked = [question for question in task.questions if (question.index, question.turn) not in done]
    if done and is_main():
        logger.info("%d of %d answers are in %s already", len(done), len(task.questions), folder)
    if asked:
        own = _answer(task, asked, arguments, folder / f"{name}-{rank()}.jsonl")
        gc.collect()  # there may be another model to load
        torch.cuda.empty_cache()
        done.update({key: record for part in over_processes(own) for key, record in part.items()})
    return [done[question.index, question.turn] for question in task.questions]


def _answer(
    task: Task, asked: Sequence[Question], arguments: argparse.Namespace, path: Path
) -> dict[tuple[int, int], dict]:
    """This process's share of the answers, which are in a file as soon as they are made."""
    batches = deal(asked, arguments.batch_size, rank(), processes())
    workers = loader_processes() if arguments.num_workers is None else arguments.num_workers
    workers = fitting_workers([load_of(task.dataset, asked, arguments.batch_size)], workers, "--num_workers")
    model = load_model(task, arguments)
    title = f"answering ({Path(task.found.path).name})"
    transformers.set_seed(arguments.seed + rank())
    records = {}
    said = generate_answers(model, task.dataset, asked, batches, workers, **generation_settings(arguments))
    bar = tqdm(total=sum(map(len, batches)), desc=title, unit=" answers", disable=not is_main())
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file, bar:
        try:
            for answers in said:
                for place, answer in answers.items():
                    question = asked[place]
                    record = make_record(task.dataset, question, answer)
                    records[question.index, question.turn] = record
                    line = {"key": [question.index, question.turn], **record}
                    file.write(json.dumps(line, ensure_ascii=False, default=repr) + "\n")
                file.flush()
                bar.update(len(answers))
        except (torch.OutOfMemoryError, MemoryError, *LOADER_ERRORS) as error:
            kept = f"the answers so far are in {path.parent}, and the call goes on from there"
            if cause := lacking_memory(error):
                raise ProcessError(
                    f"out of memory ({cause}): lower --batch_size, which is {arguments.batch_size}; {kept}"
                ) from error
            if death := death_of_loader(error):
                raise ProcessError(
                    f"a loader process died ({' '.join(str(death).split())[:300]}): lower --num_workers (0 loads in "
                    f"this process); {kept}"
                ) from error
            raise
    return records


def chosen_dtype(task: Task, arguments: argparse.Namespace) -> tuple[str, str | None]:
    """As `choose_dtype` says for this call."""
    return choose_dtype(arguments.dtype, task.found, uses_gpu(arguments.device))


def load_model(task: Task, arguments: argparse.Namespace) -> torch.nn.Module:
    """The model of a task on the device that the call asks for.

    Raises:
        ProcessError: when it cannot be loaded.
    """
    name, remark = chosen_dtype(task, arguments)
    if is_main():
        logger.info("loading %s (%s) in %s", task.found.path, task.found.kind, name)
        if remark:
            logger.warning(remark)
    return load_found(task.found, name, arguments.device, processes(), arguments.cache_dir)[0]


def generation_settings(arguments: argparse.Namespace) -> dict:
    """Generation arguments of transformers."""
    settings = {"max_new_tokens": arguments.max_new_tokens, "repetition_penalty": arguments.repetition_penalty}
    if arguments.temperature > 0:
        given = {name: getattr(arguments, name) for name in ("top_p", "top_k")}
        draw = {name: SAMPLING[name] if value is None else value for name, value in given.items()}
        return {**settings, "do_sample": True, "temperature": arguments.temperature, **draw}
    return {**settings, "num_beams": arguments.num_beams}


def make_record(dataset: SupervisedDataset, question: Question, answer: Answer) -> dict:
    """What is saved of an answer, in JSON types."""
    answered = compare(dataset, question, answer)
    file, number, identity = dataset.place(question.index)
    return {
        "file": file,
        "sample": number,
        "id": identity,
        "turn": dataset.turn_in_data(question.index, question.turn),
        "image": [record_of(picture, dataset.folder(question.index)) for picture in pictures_of(dataset, question)],
        "question": answered.question,
        "answer": answer.text,
        "reference": answered.reference,
        "cut": answer.cut,
        **answered.scores._asdict(),
    }


def pictures_of(dataset: SupervisedDataset, question: Question) -> list:
    """The pictures that stand before an answer, as the data have them."""
    sample, found = dataset.sample(question.index), []
    wrapped = map_pictures(sample.get("image"), lambda picture: (picture,))
    text_turns(sample["conversations"], wrapped, lambda one: found.append(one[0]) or "", question.turn)
    return found


def _read_parts(folder: Path, name: str) -> dict[tuple[int, int], dict]:
    """Records in the folder, by sample and turn; the last line of a file may have been cut off."""
    found = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")) if is_main_of_node() else []:
        text = path.read_text(encoding="utf-8", errors="replace")
        whole, _, rest = text.rpartition("\n")
        for line in whole.split("\n") if whole else []:  # not splitlines: U+2028 and others may stand in a text
            record = json.loads(line)
            found[tuple(record.pop("key"))] = record
        if rest:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    return found


def read_answers(folder: Path) -> list[dict]:
    """The records of an earlier evaluation.

    Raises:
        ValueError: naming a line that is no record.
    """
    records = []
    text = (folder / ANSWERS).read_text(encoding="utf-8").removesuffix("\n")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = json.loads(line)
            _ = [0 <= record[name] <= 1 for name in METRICS], hash(_keys([record])[0]), record["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / ANSWERS}, line {number}: is no answer of an evaluation ({error!r})") from error
        records.append(record)
    return records


def _keys(records: Sequence[Mapping]) -> list[tuple]:
    """For each record what makes two of them answers to the same question. Data may have moved since: a file is known
    by its name, or, where several have the same, by its path within the folder that all of them are in."""
    paths = {record["file"]: Path(record["file"]).absolute() for record in records}
    names = {file: path.name for file, path in paths.items()}
    if len(set(names.values())) < len(set(paths.values())):
        top = os.path.commonpath([path.parent for path in paths.values()])
        names = {file: str(path.relative_to(top)) for file, path in paths.items()}
    return [(names[r["file"]], *(r[name] for name in ("sample", "turn", "question", "reference"))) for r in records]


def matched(task: Task, before: Sequence[dict], name: str) -> list[dict]:
    """The records of an earlier evaluation, in the order of a task's questions.

    Raises:
        UserError: when they are not answers to the same questions, or it cannot be told which answers which.
    """
    keys = _keys([make_record(task.dataset, question, Answer("", False)) for question in task.questions])
    others = dict(zip(_keys(before), before, strict=True))
    missing = [key for key in keys if key not in others]
    if missing or len(others) != len(set(keys)):
        raise UserError(
            f"--compare {name}: has answers to other questions ({len(missing)} of these {len(keys)} are missing there, "
            f"it has {len(others)}); evaluate both with the same --data_path and --limit"
        )
    if twice := max(len(before), len(keys)) - len(others):
        raise UserError(
            f"--compare {name}: {twice} answers have the same file, sample and turn as another one, so that it cannot "
            "be told which belong together; evaluate anew what it is compared with"
        )
    return [others[key] for key in keys]


def summarise(
    arguments: argparse.Namespace,
    task: Task,
    after: list[dict],
    before: list[dict] | None,
    seconds: float,
    limited: str,
) -> dict:
    """What is saved as `metrics.json`; records get `score`, and `before` where there is one."""
    settings = {
        **generation_settings(arguments),
        "max_inp_length": arguments.max_inp_length or room_for_prompts(task.found, arguments),
        **{name: getattr(arguments, name) for name in ("batch_size", "limit", "seed", "bad_samples")},
        "max_slice_nums": task.found.config.slicing["max_slice_nums"],
        "dtype": chosen_dtype(task, arguments)[0],
        "device": torch.cuda.get_device_name() if uses_gpu(arguments.device) else "cpu",
        "processes": processes(),
    }
    summary = {
        "model": arguments.model,
        "kind": f"{task.found.kind} of {LLM_TYPES[task.found.config.llm_type]}",
        "data": list(arguments.data_path),
        "metrics": _means(after),
        "samples": len({question.index for question in task.questions}),
        "questions": len(after),
        "limited": limited or None,
        "left_out": [{"file": p.file, "sample": p.number, "id": p.id, "cause": p.cause} for p in task.problems],
        "cut_answers": sum(record["cut"] for record in after),
        "seconds": seconds,
        "settings": settings,
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    for record in after:
        record["score"] = _scores(record).mean
    if before is not None:
        for record, other in zip(after, before, strict=True):
            record["before"] = {name: other[name] for name in ("answer", "cut", *METRICS) if name in other} | {
                "score": _scores(other).mean
            }
        summary["compared_with"] = {
            "model": arguments.compare,
            "metrics": _means(before),
            "difference": {name: _difference(name, after, before) for name in METRICS},
        }
    return summary


def _scores(record: Mapping) -> Scores:
    return Scores(*(record[name] for name in METRICS))


def _means(records: Sequence[Mapping]) -> dict[str, float]:
    return mean_scores([_scores(record) for record in records])


def _difference(name: str, after: Sequence[Mapping], before: Sequence[Mapping]) -> dict:
    values = np.array([a[name] - b[name] for a, b in zip(after, before, strict=True)])
    interval = difference_interval(values, [(record["file"], record["sample"]) for record in after])
    better, worse = int((values > 0).sum()), int((values < 0).sum())
    return {"mean": float(values.mean()), "interval_95": list(interval), "better": better, "worse": worse}


def save(arguments: argparse.Namespace, task: Task, folder: Path, summary: dict, records: Sequence[dict]) -> None:
    """Write the result into the unfinished folder, then put that in the place of `--output`."""
    result = folder / "result"
    result.mkdir(exist_ok=True)
    text = json.dumps(summary, indent=1, ensure_ascii=False, default=repr) + "\n"
    (result / METRICS_NAME).write_text(text, encoding="utf-8", errors="backslashreplace")
    with (result / ANSWERS).open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, default=repr) + "\n" for record in records)

    def load_pictures(place: int) -> list[Image.Image]:
        question = task.questions[place]
        return [task.dataset.load_image(picture, question.index) for picture in pictures_of(task.dataset, question)]

    write_evaluation(result / PAGE, summary, records, arguments.report_samples, load_pictures)
    os.replace(result, arguments.output.resolve())  # which is empty or not there
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def as_text(summary: Mapping) -> str:
    """The summary for a reader."""
    lines = [
        f"model      {summary['model']}, {summary['kind']}",
        f"answered   {summary['questions']:,} questions of {summary['samples']:,} samples, in {summary['seconds']:,} s",
    ]
    if summary["limited"]:
        lines.append(f"limit      {summary['limited']}")
    if summary["left_out"]:
        lines.append(f"left out   {len(summary['left_out']):,} samples that cannot be used, see {METRICS_NAME}")
    if summary["cut_answers"]:
        limit = summary["settings"]["max_new_tokens"]
        lines.append(f"cut off    {summary['cut_answers']:,} answers at --max_new_tokens {limit}")
    if "compared_with" not in summary:
        lines += ["", *(f"{name:<12}{value:>8.3f}" for name, value in summary["metrics"].items())]
        return "\n".join(lines)
    compared = summary["compared_with"]
    lines.insert(0, f"before     {compared['model']}")
    lines.append(
        f"\n{'metric':<12}{'before':>8}{'after':>8}{'difference':>12}{'95 % interval':>18}{'better':>8}{'worse':>7}"
    )
    for name, value in summary["metrics"].items():
        change = compared["difference"][name]
        interval = "{:+.3f} to {:+.3f}".format(*change["interval_95"])
        lines.append(
            f"{name:<12}{compared['metrics'][name]:>8.3f}{value:>8.3f}{change['mean']:>+12.3f}{interval:>18}"
            f"{change['better']:>8,}{change['worse']:>7,}"
        )
    return "\n".join(lines)


def is_main() -> bool:
    """Whether this process writes the result."""
    return rank() == 0


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Within it, a signal raises `Stopped`."""

    def stop(number: int, _frame: object) -> None:
        for each in SIGNALS:  # torchrun passes on what the terminal has sent to all
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def room_for_prompts(found: FoundModel, arguments: argparse.Namespace) -> int:
    """Tokens of the model's context that `--max_new_tokens` leaves."""
    return found.config.max_position_embeddings - arguments.max_new_tokens


def length_problems(arguments: argparse.Namespace, models: Sequence[tuple[FoundModel, str]]) -> list[str]:
    """Where a length that was given is more than a model takes; `--max_new_tokens`, where it was not, is set to what
    all of them have room for, so that their answers can be compared.

    Args:
        models: with the flags that name them.
    """
    arguments.length_by_default = arguments.max_new_tokens is None
    if arguments.length_by_default:
        shares = [fitting_length(NEW_TOKENS, found.config, share=4) for found, _ in models]
        arguments.max_new_tokens = min(shares, default=NEW_TOKENS)
    wrong = []
    for found, flag in models:
        whole = found.config.max_position_embeddings
        if room_for_prompts(found, arguments) < 1:
            wrong.append(
                f"--max_new_tokens {arguments.max_new_tokens}: {flag} {found.path} takes {whole} tokens, question and "
                "answer together"
            )
        if (arguments.max_inp_length or 0) > whole:
            wrong.append(f"--max_inp_length {arguments.max_inp_length}: {flag} {found.path} takes {whole} tokens")
    return wrong


def prepare(arguments: argparse.Namespace, found: FoundModel, flag: str, samples: Samples, decode: bool) -> Task:
    """The task of a model; its weights are not touched.

    Args:
        flag: that names the model.
        decode: also decode every picture, to find damaged ones before anything is answered.

    Raises:
        UserError: when its tokenizer cannot be used.
    """
    try:
        tokenizer = load_tokenizer(found.path, arguments.cache_dir, found.base)
    except ValueError as error:
        raise UserError("\n".join(f"{flag} {line}" for line in str(error).splitlines())) from error
    if arguments.max_slice_nums is not None:
        found.config.set_max_slice_nums(arguments.max_slice_nums)
    whole = found.config.max_position_embeddings
    room = whole - 1 if arguments.length_by_default else room_for_prompts(found, arguments)
    dataset = SupervisedDataset.for_checkpoint(
        found.config, tokenizer, samples, None, arguments.image_folder, arguments.image_folder_only
    )
    questions, problems = find_questions(dataset, decode=decode)
    allowed = min(arguments.max_inp_length or room, room)
    long = {question.index: question for question in questions if question.tokens > allowed}
    for index, question in long.items():
        leaves = "an answer of one token" if arguments.length_by_default else "--max_new_tokens"
        limit = f"--max_inp_length {allowed}" if allowed < room else f"the {allowed} that {leaves} leaves"
        turn = dataset.turn_in_data(index, question.turn)
        cause = (
            f"turn {turn} has a prompt of {question.tokens} tokens, more than {limit}; lower --max_slice_nums"
            f"{', or raise --max_inp_length' if allowed < room else ''}"
        )
        problems.append(Problem(index, *dataset.place(index), cause))
    questions = [question for question in questions if question.index not in long]
    behind_longest = whole - max((question.tokens for question in questions), default=0)
    if behind_longest < arguments.max_new_tokens:  # which then is a default
        arguments.max_new_tokens = behind_longest
        if is_main():
            logger.warning(
                "answers can have %d tokens: with the longest prompt the model takes %d; fewer slices "
                "(--max_slice_nums) or --bad_samples skip with --max_inp_length leave more",
                *(behind_longest, whole),
            )
    return Task(found, dataset, questions, sorted(problems))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The whole evaluation: checks, answers, files, and the table on stdout.

    Raises:
        SystemExit: with status 2, after all that is wrong with the call.
        UserError: when it cannot be done.
    """
    if "LOCAL_RANK" in os.environ:
        PartialState(cpu=not uses_gpu(arguments.device))
    wrong = check_arguments(arguments)
    samples, limited, tasks, earlier = None, "", [], None
    try:
        samples = load_samples(arguments.data_path)
        if arguments.limit is not None and arguments.limit < len(samples):
            limited = f"the first {arguments.limit:,} of {len(samples):,} samples, as --limit says"
            samples = samples.without(np.arange(max(arguments.limit, 0), len(samples)))
    except ValueError as error:
        wrong.append(f"--data_path {error}")
    compared = Path(at_home(arguments.compare)) if arguments.compare else None
    also_adapter = compared is not None and os.path.exists(compared / ADAPTER_CONFIG_NAME)
    adapter = os.path.exists(Path(at_home(arguments.model), ADAPTER_CONFIG_NAME))
    models = [(arguments.model, arguments.base if adapter or not also_adapter else None, "--model")]
    if compared is not None and not os.path.exists(compared / ANSWERS):
        models.append((arguments.compare, arguments.base if also_adapter else None, "--compare"))
    elif compared is not None:
        try:
            earlier = read_answers(compared)
        except (OSError, ValueError) as error:
            wrong.append(f"--compare {error}")
    found = []
    for model, base, flag in models:
        try:
            found.append((find_model(model, base, arguments.cache_dir, flag), flag))
        except UserError as error:
            wrong.append(str(error))
    wrong = _of_all([*wrong, *length_problems(arguments, found)])  # or the processes would part ways below, where they
    if not wrong:  # work together: samples are looked at only in a call that is right
        for one, flag in found:
            try:
                tasks.append(prepare(arguments, one, flag, samples, decode=not tasks))
            except UserError as error:
                wrong.append(str(error))
    wrong = _of_all(wrong)
    if wrong:
        if is_main_of_node():
            sys.stderr.write("".join(f"evaluate.py: {line}\n" for found in wrong for line in found.splitlines()))
        over_processes(None)  # torchrun stops all when the first one has ended
        parser.exit(2)
    warn_of_remarks([tasks[0].dataset])
    _settle_problems(arguments, tasks)
    if earlier is not None:
        earlier = matched(tasks[0], earlier, arguments.compare)
    summary = evaluate(arguments, tasks, earlier, limited)
    if is_main():
        sys.stdout.write(f"{as_text(summary)}\n")
        sys.stderr.write(f"wrote {arguments.output / PAGE}, {ANSWERS} and {METRICS_NAME} beside it\n")


def _of_all(problems: Sequence[str]) -> list[str]:
    """What any process has found, once."""
    return list(dict.fromkeys(problem for own in over_processes(list(problems)) for problem in own))


def _settle_problems(arguments: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Stop at bad samples, or leave them out of all tasks.

    Raises:
        UserError: listing them.
    """
    bad = {problem.index: problem for task in tasks for problem in task.problems}
    problems = [bad[index] for index in sorted(bad)]
    if problems and arguments.bad_samples == "fail":
        raise UserError(
            f"These samples cannot be used (--bad_samples skip would leave them out):\n{report_problems(problems)}"
        )
    for task in tasks:
        task.questions = [question for question in task.questions if question.index not in bad]
        task.problems = problems
        if not task.questions:
            raise UserError(f"There is no question left to ask:\n{report_problems(problems)}")
    if problems and is_main():
        logger.warning("%d samples are left out:\n%s", len(problems), report_problems(problems))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    die_with_launcher()
    say_threads()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        with _signals_stop():
            run(arguments, parser)
        end_together()
    except Stopped as stopped:
        number = signal.Signals(stopped.args[0])
        if is_main_of_node():
            sys.stderr.write(
                f"\nevaluate.py: {number.name}: stopped; the answers so far are in {unfinished(arguments.output)}, and "
                "the same call goes on from there\n"
            )
        sys.exit(128 + number)
    except (ProcessError, SampleError, OSError) as error:  # met by one process
        sys.exit(f"evaluate.py: {error}")
    except ValueError as error:  # every process finds the same
        sys.exit(f"evaluate.py: {error}" if is_main_of_node() else 1)


if __name__ == "__main__":
    main()
