"""Where the programs write: never over what they read, nowhere that cannot be written, and with room for it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import outcome, write_adapter

from finetune import evaluate, finetune, inspect_data, loading, merge_lora, sample_task
from finetune.minicpmv import MiniCPMV
from finetune.minicpmv import tiny as tiny_program
from finetune.model_folder import empty_model
from finetune.places import checkpoint_bytes, contains, size_text, writing_problem
from finetune.result_folder import files_of_result

MAINS = {
    "finetune": finetune.train,
    "evaluate": evaluate.main,
    "merge_lora": merge_lora.main,
    "inspect_data": inspect_data.main,
    "tiny": tiny_program.main,
    "sample_task": sample_task.main,
}


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    return write_adapter(tiny["llama3"], tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture
def said(capsys, monkeypatch) -> Callable[..., tuple[int, list[str]]]:
    """Calls a program, which may load no weight; its exit status, and what it says, line by line."""

    def fails(*_, **__):
        pytest.fail("weights are loaded")

    monkeypatch.setattr(MiniCPMV, "from_pretrained", fails)
    monkeypatch.setattr(loading, "load_checkpoint", fails)

    def call(program: str, *words: object) -> tuple[int, list[str]]:
        return outcome(MAINS[program], words, capsys)

    return call


def train_flags(model: Path | str, data: Path | str, output: Path | str, *more: object) -> tuple:
    named = ("--model_name_or_path", model, "--data_path", data, "--output_dir", output)
    return (*named, "--report_to", "none", "--dataloader_num_workers", 0, *more)


@pytest.fixture
def place(tiny, data_file, tmp_path, monkeypatch) -> Path:
    """A working folder with model/, its link, and data/train.json."""
    shutil.copytree(tiny["llama3"], tmp_path / "models" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "models" / "model")
    (tmp_path / "data").mkdir()
    shutil.copy(data_file, tmp_path / "data" / "train.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("model", "output", "how"),
    [
        ("models/model", "models/model", "is the folder of"),
        ("models/model", "models/model/", "is the folder of"),
        ("models/model", "./data/../models/model", "is the folder of"),
        ("link", "models/model", "is the folder of"),
        ("models/model", "link", "is the folder of"),
        ("~/models/model", "models/model", "is the folder of"),
        ("models/model", "~/models/model", "is the folder of"),
        ("models/model", "models/model/output/lora", "lies in the folder of"),
        ("models/model", "link/output", "lies in the folder of"),
        ("models/model", "models", "holds"),
        ("link", "models", "holds"),
        ("models/model", ".", "holds"),
    ],
)
def test_output_dir_is_not_the_models(said, place, model, output, how):
    before = files(place)
    status, lines = said("finetune", *train_flags(model, "data/train.json", output, "--batch_size", 0))
    told = [line for line in lines if f"{how} --model_name_or_path" in line]
    assert status == 1 and len(told) == 1 and told[0].startswith("--output_dir ")
    assert any("--per_device_train_batch_size 0" in line for line in lines)  # with all other problems
    assert files(place) == before


@pytest.mark.parametrize(
    ("flags", "output"),
    [
        (("--data_path", "data/train.json"), "data"),
        (("--data_path", "data"), "data"),
        (("--data_path", "data"), "."),
        (("--data_path", "~/data/train.json"), "data/"),
        (("--data_path", "other/linked.json"), "other"),
        (("--data_path", "other/linked.json"), "data"),
        (("--eval_strategy", "steps", "--eval_data_path", "data/train.json"), "data"),
        (("--eval_strategy", "steps", "--eval_data_path", "data"), "data"),
    ],
)
def test_output_dir_holds_no_data(said, place, data_file, flags, output):
    (place / "other").mkdir()
    (place / "other" / "linked.json").symlink_to(place / "data" / "train.json")
    status, lines = said("finetune", *train_flags("models/model", data_file, output, *flags))
    told = [line for line in lines if "holds the data of" in line]
    assert status == 1 and len(told) == 1 and flags[-2] in told[0] and told[0].startswith("--output_dir ")


def test_output_dir_is_not_the_adapters(said, place, adapter, tiny):
    lora = shutil.copytree(adapter, place / "output" / "lora")
    shutil.copytree(adapter, lora / "checkpoint-4")
    (place / "same").symlink_to(lora)
    call = ("--use_lora", "true", "--batch_size", 0, "--lora_weight_path")
    for path, output in (("output/lora", "output/lora/"), ("same", "output/lora"), ("~/output/lora", "same")):
        status, lines = said("finetune", *train_flags(tiny["llama3"], "data/train.json", output, *call, path))
        assert status == 1 and sum("is the folder of --lora_weight_path" in line for line in lines) == 1, lines
    for path in ("output/lora", "output/lora/checkpoint-4"):  # what README.md does: elsewhere; a run's own checkpoint
        output = "output/lora" if "checkpoint" in path else "output/more"
        if "checkpoint" in path:  # of a run that was stopped, and left no result
            for file in files_of_result(lora):
                file.unlink()
        _, lines = said("finetune", *train_flags(tiny["llama3"], "data/train.json", output, *call, path))
        assert not any(line.startswith("--output_dir") for line in lines), lines


def test_output_dir_is_not_the_checkpoint_to_resume(said, place, tiny):
    checkpoint = place / "output" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    resume = ("--batch_size", 0, "--resume_from_checkpoint", "output/checkpoint-3")
    _, lines = said("finetune", *train_flags(tiny["llama3"], "data/train.json", "output/checkpoint-3/", *resume))
    assert any("is the folder of --resume_from_checkpoint" in line for line in lines)
    _, lines = said("finetune", *train_flags(tiny["llama3"], "data/train.json", "output", *resume))
    assert not any(line.startswith("--output_dir") for line in lines), lines


@pytest.mark.usefixtures("place")
def test_a_name_on_the_hub_lies_nowhere(said):
    """Unless there is a folder of that name."""
    _, lines = said("finetune", *train_flags("openbmb/x", "data/train.json", "openbmb_x"))
    assert not any(line.startswith("--output_dir") for line in lines)
    _, lines = said("finetune", *train_flags("models/model", "data/train.json", "models/model/x"))
    assert any(line.startswith("--output_dir") for line in lines)


def test_containment(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    for outer, inner in (
        ("a", "a/b"),
        ("a", "c"),
        ("c", "a/b/new/er"),
        (".", "a"),
        ("a/b/..", "a"),
        ("", "c"),
        ("c/new", "a/b/new/er"),
    ):
        assert contains(outer, inner), (outer, inner)
    for outer, inner in (("a/b", "a"), ("a/b", "a/bc"), ("c", "a"), ("a", "new"), ("a", "ab")):
        assert not contains(outer, inner), (outer, inner)


@pytest.mark.parametrize("where", ["model", "base", "adapter's base", "compare", "earlier evaluation"])
def test_evaluations_are_not_written_into_models(said, place, adapter, data_file, where):
    lora = shutil.copytree(adapter, place / "lora")
    model = place / "models" / "model"
    shutil.copytree(model, place / "other")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))
    (place / "earlier").mkdir()
    (place / "earlier" / "answers.jsonl").write_text("")
    flags, output = {
        "model": (("--model", "other"), "other/evaluation"),
        "base": (("--model", lora, "--base", "link"), "models/model/evaluation"),
        "adapter's base": (("--model", lora), "link/evaluation"),
        "compare": (("--model", model, "--compare", "other"), "~/other/evaluation"),
        "earlier evaluation": (("--model", model, "--compare", "earlier"), "earlier/new"),
    }[where]
    before = files(place)
    status, lines = said("evaluate", *flags, "--data_path", data_file, "--output", output, "--batch_size", 0)
    told = [line for line in lines if "lies in the folder of" in line]
    assert status == 2 and len(told) == 1 and "--output " in told[0], lines
    assert any("--batch_size 0" in line for line in lines) and files(place) == before


def test_merging_does_not_write_into_what_it_reads(said, place, adapter):
    lora = shutil.copytree(adapter, place / "lora")
    for output, flags in (
        ("lora/merged", ("--adapter", lora)),
        ("link/merged", ("--adapter", lora, "--base", place / "models" / "model")),
        ("~/models/model/new", ("--modernize", "link")),
    ):
        before = files(place)
        status, lines = said("merge_lora", *flags, "--output", output)
        assert status == 1 and any("--output " in line and "lies in the folder of" in line for line in lines), lines
        assert files(place) == before
    for output in ("lora", "models/model", "models"):
        status, lines = said("merge_lora", "--adapter", lora, "--base", "models/model", "--output", output)
        assert status == 1 and any("--output " in line for line in lines), lines
        assert files(place) == before


def test_reports_are_not_written_into_models(said, place, data_file):
    for report in ("models/model", "link/", "models/model/report"):
        flags = ("--model_name_or_path", "models/model", "--data_path", data_file, "--report", report)
        status, lines = said("inspect_data", *flags, "--num_workers", 0)
        assert status == 2 and len(lines) == 1 and "--report " in lines[0] and "--model_name_or_path" in lines[0]
    assert not (place / "models" / "model" / "report.html").exists()


# ---- what cannot be written


UNWRITABLE = ("a file", "a file/below/it", "/proc/x", "nowhere/x")


@pytest.fixture
def unwritable(tmp_path) -> dict[str, str]:
    """Places by what they are, with what is said of them."""
    (tmp_path / "a file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    return {
        "a file": "is a file",
        "a file/below/it": "which is a file",
        "/proc/x": "cannot be written: /proc takes no new files",
        "nowhere/x": "is a link to",
    }


@pytest.mark.parametrize("output", UNWRITABLE)
@pytest.mark.parametrize("program", MAINS)
def test_what_cannot_be_written_is_said_at_once(said, tiny, adapter, data_file, tmp_path, unwritable, program, output):
    path = tmp_path / output
    calls = {
        "finetune": train_flags(tiny["llama3"], data_file, path, "--batch_size", 0),
        "evaluate": ("--model", tiny["llama3"], "--data_path", data_file, "--output", path, "--batch_size", 0),
        "merge_lora": ("--adapter", adapter, "--output", path, "--max_shard_size", "five"),
        "inspect_data": (
            *("--model_name_or_path", tiny["llama3"], "--data_path", data_file),
            *("--report", path, "--num_workers", -1),
        ),
        "tiny": ("--model", "minicpm-v-2", "--output", path),
        "sample_task": ("--output", path, "--train", 1, "--held_out", 1),
    }
    status, lines = said(program, *calls[program])
    assert status == (2 if program in ("evaluate", "inspect_data") else 1)
    if program in ("tiny", "sample_task"):
        assert len(lines) == 1 and lines[0].startswith(f"{program}: "), lines
    else:
        told = [line for line in lines if str(path) in line]
        assert len(told) == 1, lines
        assert unwritable[output] in told[0]
        assert any(wrong in line for line in lines for wrong in ("size 0", "size five", "workers -1")), lines
    assert not any("Traceback" in line for line in lines)


def test_trying_leaves_nothing(tmp_path):
    assert writing_problem(tmp_path / "new" / "er") is None and list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    assert writing_problem(tmp_path / "old") is None and list((tmp_path / "old").iterdir()) == []


def test_a_report_whose_disk_is_full(said, tiny, data_file, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inspect_data, "write_report", full)
    flags = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--num_workers", 0)
    status, lines = said("inspect_data", *flags, "--report", tmp_path / "report")
    assert status == 2 and "cannot be written: [Errno 28] No space left on device" in lines[-1]


def test_the_words_of_a_tiny_checkpoint(said, tmp_path):
    for name, text in (("none.json", None), ("text.json", "{"), ("other.json", '[{"id": 1}]')):
        if text is not None:
            (tmp_path / name).write_text(text)
        flags = ("--model", "minicpm-v-2", "--output", tmp_path / "out", "--text", tmp_path / name)
        status, lines = said("tiny", *flags)
        assert status == 1 and len(lines) == 1 and name in lines[0]


# ---- room on the disk


def trial(tiny, data_file, output: Path, *more: object):
    """Arguments of a run, and its model without values."""
    words = map(str, train_flags(tiny["llama3"], data_file, output, *more))
    model_args, _, args, lora_args = finetune.parse_arguments([*words])
    config = finetune.load_config(model_args.model_name_or_path)
    return args, finetune.prepare_trainable(empty_model(config), args, lora_args)


LORA = ("--use_lora", "true", "--lora_r", "4")


@pytest.mark.parametrize(
    "flags",
    [(), LORA, (*LORA, "--tune_vision", "false"), ("--save_only_model", "true"), ("--optim", "sgd"), ("--bf16", "true"),
     ("--tune_llm", "false", "--bf16", "true")],
    ids=lambda flags: " ".join(flags) or "full",
)  # fmt: skip
def test_the_estimate_is_what_a_checkpoint_takes(tiny, data_file, tmp_path, flags):
    """At most, and not much less."""
    flags = tuple(map(str, flags))
    args, model = trial(tiny, data_file, tmp_path / "out", *flags)
    weights, optimizer = checkpoint_bytes(model, args, tiny["llama3"])
    finetune.train([*map(str, train_flags(tiny["llama3"], data_file, tmp_path / "out", *flags, "--max_steps", 1))])
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out" / "checkpoint-1").iterdir()}
    found = sizes.pop("optimizer.pt", 0)
    assert 0.8 * sum(sizes.values()) <= weights <= sum(sizes.values())
    if "sgd" not in flags:  # whose momentum depends on its arguments
        assert 0.8 * found <= optimizer <= found


def test_masters_and_moments_of_deepspeed(tiny, data_file, tmp_path):
    args, model = trial(tiny, data_file, tmp_path / "out", "--bf16", "true")
    elements = sum(p.numel() for p in model.parameters())
    tokenizer = sum(file.stat().st_size for file in tiny["llama3"].glob("tokenizer*"))
    assert checkpoint_bytes(model, args, tiny["llama3"]) == (4 * elements + tokenizer, 8 * elements)
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    assert checkpoint_bytes(model, args, tiny["llama3"]) == (2 * elements + tokenizer, 12 * elements)
    args.deepspeed["optimizer"] = {"type": "Lion"}
    assert checkpoint_bytes(model, args, tiny["llama3"]) == (2 * elements + tokenizer, 4 * elements)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    assert checkpoint_bytes(model, args, tiny["llama3"]) == (2 * elements + tokenizer, (2 + 12) * elements)


@pytest.mark.parametrize(("flags", "what"), [
    ((), "one checkpoint ("),
    (LORA, "one checkpoint ("),
    (("--save_strategy", "no"), "the result needs"),
    (("--save_only_model", "true"), "one checkpoint, its weights alone, needs"),
], ids=["full", "LoRA", "no checkpoint", "weights alone"])  # fmt: skip
def test_a_full_disk_is_said_before_anything_is_loaded(said, tiny, data_file, tmp_path, monkeypatch, flags, what):
    args, model = trial(tiny, data_file, tmp_path / "out", *flags)
    needed = sum(checkpoint_bytes(model, args, tiny["llama3"]))
    usage = shutil.disk_usage(tmp_path)
    call = train_flags(tiny["llama3"], data_file, tmp_path / "not" / "yet", *flags, "--batch_size", 0)
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        status, lines = said("finetune", *call)
        told = [line for line in lines if line.startswith("--output_dir")]
        assert status == 1 and len(told) == (0 if fits else 1), lines
    assert what in told[0] and size_text(needed) in told[0] and size_text(free) in told[0]
    assert "make room, or name a folder on another disk" in told[0]
    assert any("--per_device_train_batch_size 0" in line for line in lines)
