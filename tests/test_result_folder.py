"""A folder holds one result: no other is written beside or over it, and two are not loaded as one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import outcome, write_adapter
from safetensors.torch import save_file

from finetune import chat, evaluate, merge_lora
from finetune.adapters import load_adapters
from finetune.checkpoints import written_aside
from finetune.finetune import train
from finetune.loading import load_finetuned
from finetune.result_folder import ADAPTER, WHOLE, files_of_result, weights_in

FLAGS = (
    *("--batch_size", 2, "--max_steps", 1, "--max_slice_nums", 1, "--report_to", "none", "--disable_tqdm", "true"),
    *("--dataloader_num_workers", 0, "--save_strategy", "no"),
)
MAIN_FILE = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
METHODS = {"lora": ("--use_lora", "true", "--lora_r", 4), "full": ("--tune_llm", "true")}
KINDS = {"lora": ADAPTER, "full": WHOLE}


@pytest.fixture
def call(tiny, data_file, tmp_path):
    """Words of a training run into one folder; flags given later win."""

    def words(method: str, *flags: object, model: str = "llama3") -> list[str]:
        needed = ("--model_name_or_path", tiny[model], "--data_path", data_file, "--output_dir", tmp_path / "out")
        return [str(word) for word in (*needed, *FLAGS, *METHODS[method], *flags)]

    return words


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), pytest.param("full", "lora", marks=pytest.mark.slow)])
def test_a_result_is_not_written_over_or_beside_another(first, second, call, tmp_path, capsys):
    """Nor by another model. It is moved aside where the user says so, with all that belongs to it."""
    folder = tmp_path / "out"
    train(call(first))
    before = contents(folder)
    for words in (call(second), call(second, model="minicpm"), call(second, "--resume_from_checkpoint", "true")):
        status, lines = outcome(train, words, capsys)
        assert status == 1
        (line,) = [line for line in lines if "one result" in line]
        assert line.startswith(f"--output_dir {folder} holds {KINDS[first]} ({MAIN_FILE[first]}, of ")
        assert "--overwrite_output_dir" in line
        assert contents(folder) == before
    (folder / "mine.txt").write_text("notes")
    train(call(second, "--overwrite_output_dir", "true"))
    assert list(weights_in(folder)) == [KINDS[second]]
    (aside,) = folder.glob("_earlier-*")
    assert contents(aside) == before
    assert (folder / "mine.txt").read_text() == "notes"
    load_finetuned(folder)


def test_the_record_of_bad_samples_is_the_new_runs(call, tmp_path, capsys):
    """Whose data are looked at first: refused data move nothing."""
    folder = tmp_path / "out"
    train(call("lora", "--bad_samples", "skip"))
    (folder / "bad_samples.jsonl").write_text('{"of": "before"}\n')
    before = contents(folder)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"id": 0, "image": "gone.png", "conversations": []}]))
    for flag in ("skip", "fail"):
        words = call("lora", "--data_path", bad, "--overwrite_output_dir", "true", "--bad_samples", flag)
        assert outcome(train, words, capsys)[0] == 1 and contents(folder) == before
    train(call("lora", "--bad_samples", "skip", "--overwrite_output_dir", "true"))
    assert (folder / "bad_samples.jsonl").read_text() == ""
    (aside,) = folder.glob("_earlier-*/bad_samples.jsonl")
    assert aside.read_text() == '{"of": "before"}\n'


def test_a_run_that_goes_on_replaces_its_own_result(call, tmp_path):
    folder = tmp_path / "out"
    train(call("lora", "--save_strategy", "steps", "--save_steps", 1))
    first = (folder / "adapter_model.safetensors").read_bytes()
    train(call("lora", "--max_steps", 2, "--resume_from_checkpoint", "true"))
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert not list(folder.glob("_earlier-*"))


def test_a_checkpoint_of_elsewhere_is_not_resumed_into_a_result(call, tmp_path, capsys):
    train(call("lora", "--save_strategy", "steps", "--save_steps", 1))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    words = call("lora", "--max_steps", 2, "--resume_from_checkpoint", other / "checkpoint-1")
    status, lines = outcome(train, words, capsys)
    assert status == 1 and any("one result" in line for line in lines)
    train([*words, "--overwrite_output_dir", "true"])
    assert len(list((tmp_path / "out").glob("_earlier-*/adapter_model.safetensors"))) == 1


@pytest.mark.parametrize("last", ["lora", "full"])
def test_a_folder_that_is_both_is_not_loaded(last, tiny, tmp_path, capsys):
    """By no program and no function; which of the two is newer is said."""
    both = write_adapter(tiny["llama3"], tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny["llama3"] / name, both)
    newest = MAIN_FILE[last]
    for file in both.iterdir():
        os.utime(file, (10**9 + (file.name == newest),) * 2)
    told = f"{KINDS[last]} is newer"
    for load in (load_finetuned, lambda folder: load_adapters({"a": folder})):
        with pytest.raises(ValueError, match=told):
            load(both)
    question = ("--question", "What?")
    data = tmp_path / "data.json"
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    data.write_text(json.dumps([{"conversations": turns}]))
    training = ("--data_path", data, "--output_dir", tmp_path / "new", *FLAGS)
    lora = ("--model_name_or_path", tiny["llama3"], "--use_lora", "true", "--lora_weight_path", both, *training)
    calls = [
        (chat.main, ("--model", both, *question)),
        (evaluate.main, ("--model", both, "--data_path", data, "--output", tmp_path / "scores")),
        (merge_lora.main, ("--adapter", both, "--output", tmp_path / "merged")),
        (train, ("--model_name_or_path", both, *training)),
        (train, lora),
    ]
    for main, words in calls:
        status, lines = outcome(main, words, capsys)
        assert status and any(told in line and str(both) in line for line in lines), (main, lines)
        assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(("before", "after"), [("shards", "file"), ("file", "shards"), ("shards", "adapter")])
def test_no_weights_of_an_earlier_save_stay_beside_the_new(before, after, tmp_path):
    """Trainer and Python callers save into a folder that is there; what is there and not replaced is moved aside."""
    files = {
        "shards": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "file": ("model.safetensors",),
        "adapter": ("adapter_model.safetensors",),
    }

    def save(kind: str, value: float) -> None:
        with written_aside(tmp_path / "out", writes=True, into=True) as aside:
            for name in files[kind]:
                save_file({"a": torch.full((2,), value)}, aside / name)
            if kind == "shards":
                index = {"weight_map": {"a": files[kind][0], "b": files[kind][1]}}
                (aside / "model.safetensors.index.json").write_text(json.dumps(index))

    save(before, 1.0)
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save(after, 2.0)
    found = {file.name for file in (tmp_path / "out").iterdir() if file.is_file()}
    index = {"model.safetensors.index.json"} if after == "shards" else set()
    assert found == {*files[after], *index, "notes.txt"}
    (aside,) = (tmp_path / "out").glob("_earlier-*")
    assert contents(aside) == first
    save(after, 3.0)  # the same again: nothing is in its way
    assert len(list((tmp_path / "out").glob("_earlier-*"))) == 1


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), ("full", "lora")])
def test_what_python_saves_beside_the_other_kind_moves_that_whole(first, second, tiny, tmp_path):
    """The one that was there loads from where it was moved; of it nothing is left, what is not of it stays."""
    write_result(first, tiny["llama3"], tmp_path / "out")
    (tmp_path / "out" / "bad_samples.jsonl").write_text("")
    before = contents(tmp_path / "out")
    write_result(second, tiny["llama3"], tmp_path / "new")
    with written_aside(tmp_path / "out", writes=True, into=True) as aside:
        shutil.copytree(tmp_path / "new", aside, dirs_exist_ok=True)
    (earlier,) = (tmp_path / "out").glob("_earlier-*")
    assert {**contents(earlier), "bad_samples.jsonl": b""} == before
    shutil.move(earlier, tmp_path / "earlier")
    assert contents(tmp_path / "out") == {**contents(tmp_path / "new"), "bad_samples.jsonl": b""}
    load_finetuned(tmp_path / "earlier")
    load_finetuned(tmp_path / "out")


def write_result(kind: str, base: Path, folder: Path) -> None:
    if kind == "lora":
        write_adapter(base, folder)
        (folder / "README.md").unlink()
    else:
        shutil.copytree(base, folder)


def test_names_that_a_result_has_too_are_the_users_where_there_is_none(call, tmp_path):
    """A folder of somebody's code: nothing of it is moved. Nor is code of the names of ours, beside a result."""
    folder = tmp_path / "out"
    folder.mkdir()
    own = ("vision.py", "language.py", "config.json", "tokenizer.json", "tokenizer_train.py", "my_results.json")
    for name in own:
        (folder / name).write_text("mine")
    assert files_of_result(folder) == []
    (folder / "model.safetensors").write_text("weights")
    moved = {file.name for file in files_of_result(folder)}
    assert moved == {"model.safetensors", "config.json", "tokenizer.json"}
    (folder / "model.safetensors").unlink()
    train(call("lora", "--overwrite_output_dir", "true"))
    (earlier,) = folder.glob("_earlier-*")
    assert [file.name for file in earlier.iterdir()] == ["tokenizer.json"]  # which the result was written over
    assert {(folder / name).read_text() for name in own if name != "tokenizer.json"} == {"mine"}
    assert (earlier / "tokenizer.json").read_text() == "mine" != (folder / "tokenizer.json").read_text()


def test_files_of_the_user_belong_to_no_result(tmp_path):
    for name in ("notes.md", "train.json", "model.py", "mine.safetensors", "README.md", "run.sh"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    assert files_of_result(tmp_path) == [] and weights_in(tmp_path) == {}
