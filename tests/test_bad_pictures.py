"""Pictures that turn out to be bad while a run lasts: their header is good, or they break after the checks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, launch, losses
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

import finetune.finetune as program
from finetune.bad_samples import BAD_SAMPLES_NAME
from finetune.checkpoints import newest_complete
from finetune.dataset import SampleError, SupervisedDataset, data_collator, load_samples
from finetune.errors import UserError
from finetune.finetune import train
from finetune.generation import Predictor
from finetune.trainer import CPMTrainer

BATCH = 2
FLAGS = (
    *("--use_lora", "true", "--lora_r", 4, "--lora_dropout", 0.1, "--tune_vision", "false"),
    *("--tune_resampler", "false", "--tune_embed_tokens", "false", "--batch_size", BATCH, "--max_slice_nums", 1),
    *("--learning_rate", 1e-3, "--logging_steps", 1, "--report_to", "none", "--disable_tqdm", "true"),
    *("--train_sampling_strategy", "sequential", "--save_strategy", "no", "--max_steps", 8),
)
SKIP = ("--bad_samples", "skip", "--max_bad_fraction", 0.2)


@pytest.fixture
def data(data_file, tmp_path) -> Path:
    """A copy of the data, whose pictures may be broken."""
    shutil.copytree(data_file.parent, tmp_path / "data")
    return tmp_path / "data" / data_file.name


def damage(data: Path, number: int) -> Path:
    """Break a picture in the middle of its pixels; header and end stay."""
    path = data.with_name(f"{number}.png")
    Image.frombytes("RGB", (60, 60), torch.randint(256, (10800,), dtype=torch.uint8).numpy().tobytes()).save(path)
    encoded = bytearray(path.read_bytes())
    encoded[len(encoded) // 2] ^= 0xFF
    path.write_bytes(encoded)
    return path


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """Runs finetune.py in this process; `after_checks` is called when all samples have been looked at."""

    def start(name: str, data: Path, *flags: object, after_checks=lambda: None, workers: int = 0) -> Path:
        needed = ("--model_name_or_path", tiny["llama3"], "--data_path", data, "--output_dir", tmp_path / name)
        words = [*map(str, (*needed, *FLAGS, "--dataloader_num_workers", workers, *flags))]
        load = program.load_model
        with monkeypatch.context() as patch:
            patch.setattr(program, "load_model", lambda *given: (after_checks(), load(*given))[1])
            patch.setattr(sys, "argv", ["finetune.py", *words])
            train(words)
        return tmp_path / name

    return start


def command_in(message: str) -> list[str]:
    """Flags of the command that a message ends with."""
    words = shlex.split(message.splitlines()[-1])
    return words[words.index("finetune.py") + 1 :]


def record(folder: Path) -> list[tuple]:
    lines = (folder / BAD_SAMPLES_NAME).read_text().splitlines()
    return [(e["split"], e["sample"], e["id"], e.get("masked", False)) for e in map(json.loads, lines)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_picture_ends_the_run_with_a_checkpoint_and_the_command_that_goes_on(run, data, workers, tmp_path):
    """The losses of the run that was ended and gone on with are those of one in which the sample is masked."""
    with pytest.raises(UserError) as caught:
        run("out", data, workers=workers, after_checks=lambda: damage(data, 9))
    message, folder = str(caught.value), tmp_path / "out"
    assert f"{data}: sample 9 (id 's9'): picture {data.with_name('9.png')} cannot be decoded" in message
    assert f"step 4; the newest checkpoint is {folder / 'checkpoint-4'}" in message
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (folder / "adapter_model.safetensors").exists() and not (folder / BAD_SAMPLES_NAME).exists()
    words = command_in(message)
    assert words[-6:] == ["--bad_samples", "skip", "--max_bad_fraction", "0.042", "--resume_from_checkpoint", "true"]
    train(words)
    assert record(folder) == [("train", 9, "s9", True)]
    shutil.copy(data.with_name("1.png"), data.with_name("9.png"))  # mended, for the checks
    unbroken = run("unbroken", data, *SKIP, workers=workers, after_checks=lambda: damage(data, 9))
    assert len(losses(folder)) == 8 and losses(folder) == losses(unbroken)


def test_the_checkpoint_is_written_once(run, data, tmp_path):
    """Also where the resumed run meets the same picture."""
    damage(data, 9)
    for flags in ((), ("--resume_from_checkpoint", "true")):
        with pytest.raises(UserError, match="after step 4; the newest checkpoint"):
            run("out", data, "--save_strategy", "steps", "--save_steps", 4, *flags)
        written = (tmp_path / "out" / "checkpoint-4").stat().st_mtime_ns
        if not flags:
            first = written
    assert written == first
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_before_the_first_step_there_is_nothing_to_save(run, data, tmp_path, caplog):
    damage(data, 0)
    damage(data, 5)
    with pytest.raises(UserError, match="after step 0; there is no checkpoint") as caught:
        run("out", data)
    assert not list((tmp_path / "out").glob("checkpoint-*")) and "single sample" not in caplog.text
    train(command_in(str(caught.value)))
    assert record(tmp_path / "out") == [("train", 0, "s0", False), ("train", 5, "s5", False)]
    assert len(losses(tmp_path / "out")) == 8


def test_the_command_allows_for_bad_pictures_that_no_step_has_met(run, data, tmp_path):
    """One of 200 samples is met, and one more would be within --max_bad_fraction 0.01; there are two more."""
    samples = json.loads(data.read_text())
    text = {"conversations": samples[3]["conversations"]}
    pictures = {place: {**samples[number], "id": place} for place, number in ((4, 0), (150, 1), (160, 2))}
    data.write_text(json.dumps([pictures.get(place, text) for place in range(200)]))
    for number in range(3):
        damage(data, number)
    with pytest.raises(UserError, match="after step 2") as caught:
        run("out", data, "--max_steps", 3)
    words = command_in(str(caught.value))
    assert words[words.index("--max_bad_fraction") + 1] == "0.015"
    train(words)
    assert [entry[1] for entry in record(tmp_path / "out")] == [4, 150, 160]
    assert len(losses(tmp_path / "out")) == 3


def test_the_command_begins_anew_where_the_checkpoint_cannot_be_resumed(run, data, tmp_path):
    damage(data, 9)
    with pytest.raises(UserError, match=r"checkpoint-4, which cannot be resumed from \(--save_only_model\)") as caught:
        run("out", data, "--save_only_model", "true")
    words = command_in(str(caught.value))
    assert "--resume_from_checkpoint" not in words
    train(words)
    assert record(tmp_path / "out") == [("train", 9, "s9", False)] and len(losses(tmp_path / "out")) == 8


def gone(path: Path) -> None:
    path.unlink()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def decoder_fails(path: Path) -> None:
    path.write_bytes(b"BM" + b"\xff" * 60)


@pytest.mark.parametrize("breaks", [gone, pytest.param(fifo, marks=pytest.mark.slow), decoder_fails])
def test_a_bad_picture_is_masked_listed_and_counted(breaks, run, data, caplog):
    folder = run("out", data, *SKIP, "--max_steps", 18, after_checks=lambda: breaks(data.with_name("9.png")))
    assert record(folder) == [("train", 9, "s9", True)]
    assert len(losses(folder)) == 18  # the sample comes twice
    assert caplog.text.count("they stay in their places") == 1


def test_a_step_of_masked_samples_alone_teaches_nothing_and_is_no_error(run, data):
    def both() -> None:
        damage(data, 8)
        damage(data, 9)

    folder = run("out", data, *SKIP, after_checks=both)
    assert losses(folder)[4] == 0 and all(loss > 0 for n, loss in enumerate(losses(folder)) if n != 4)


def test_too_many_bad_pictures_end_the_run_with_their_list(run, data, tmp_path):
    """What was left out before training counts; the command goes on with a larger part."""
    damage(data, 20)

    def two() -> None:
        damage(data, 9)
        data.with_name("12.png").unlink()

    with pytest.raises(UserError, match=r"3 of 24 samples of train .*--max_bad_fraction 0.1 allows") as caught:
        run("out", data, "--bad_samples", "skip", "--max_bad_fraction", 0.1, after_checks=two)
    message, folder = str(caught.value), tmp_path / "out"
    assert "sample 9 (id 's9')" in message and "sample 12 (id 's12')" in message
    assert newest_complete(folder) == str(folder / "checkpoint-6")
    assert record(folder) == [("train", 20, "s20", False), ("train", 9, "s9", True), ("train", 12, "s12", True)]
    train(command_in(message))
    assert len(losses(folder)) == 8


def test_a_picture_that_breaks_between_two_runs_is_masked(run, data):
    before = losses(run("out", data, *SKIP, "--save_strategy", "steps", "--save_steps", 4, "--max_steps", 4))
    gone(data.with_name("9.png"))
    folder = run("out", data, *SKIP, "--resume_from_checkpoint", "true")
    assert record(folder) == [("train", 9, "s9", True)]
    assert losses(folder)[:4] == before and len(losses(folder)) == 8


def test_a_picture_that_is_gone_leaves_the_order_by_length_as_it_was(run, data, tmp_path):
    grouped = (*SKIP, "--train_sampling_strategy", "group_by_length", "--save_strategy", "steps", "--save_steps", 4)
    unbroken = run("unbroken", data, *grouped, after_checks=lambda: gone(data.with_name("9.png")))
    assert record(unbroken) == [("train", 9, "s9", True)]
    shutil.copytree(unbroken, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    folder = run("out", data, *grouped, "--resume_from_checkpoint", "true")
    assert len(losses(folder)) == 8 and losses(folder) == losses(unbroken)


def test_a_record_of_other_data_is_not_applied(run, data, tmp_path):
    damage(data, 9)
    run("out", data, *SKIP, "--save_strategy", "steps", "--save_steps", 4, "--max_steps", 4)
    samples = json.loads(data.read_text())
    others = {"other.json": samples, "few.json": samples[:5], data.name: [samples[-1], *samples[:-1]]}
    for name, content in others.items():
        other = data.with_name(name)
        other.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            run("out", other, *SKIP, "--resume_from_checkpoint", "true")
        assert f"lists {data}: sample 9 (id 's9')" in str(caught.value) and str(other) in str(caught.value)
    moved = tmp_path / "moved"
    data.write_text(json.dumps(samples))
    data.parent.rename(moved)
    run("out", moved / data.name, *SKIP, "--resume_from_checkpoint", "true", "--max_steps", 6)


EVALUATION = ("--eval_strategy", "steps", "--eval_steps", 2, "--per_device_eval_batch_size", 4)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_bad_picture_in_an_evaluation(run, data, data_file, workers, tmp_path):
    """The checkpoint of the step is saved first; masked, it counts nothing."""
    flags = ("--eval_data_path", data, *EVALUATION, "--max_steps", 4)
    damage(data, 9)
    with pytest.raises(UserError) as caught:
        run("out", data_file, *flags, workers=workers)
    message, folder = str(caught.value), tmp_path / "out"
    assert f"{data}: sample 9 (id 's9'): picture" in message and "after step 2" in message
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    train(command_in(message))
    assert record(folder) == [("eval", 9, "s9", True)]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]


class Break(TrainerCallback):
    """Breaks a picture at the last batch of an evaluation's loss, before its questions are answered."""

    def __init__(self, data: Path):
        self.data, self.batches = data, 0

    def on_prediction_step(self, *_args, **_):
        self.batches += 1
        if self.batches == 6:
            damage(self.data, 9)


@pytest.mark.parametrize("skip", [False, True])
def test_a_bad_picture_among_the_questions_of_an_evaluation(skip, run, data, data_file, monkeypatch, tmp_path):
    answered = []
    answer = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", lambda *given: answered.append(answer(*given)) or answered[-1])
    begin = CPMTrainer.__init__
    monkeypatch.setattr(CPMTrainer, "__init__", lambda self, **given: begin(self, callbacks=[Break(data)], **given))
    flags = ("--eval_data_path", data, *EVALUATION, "--max_steps", 2, "--predict_with_generate", "true")
    flags += ("--predict_max_new_tokens", 2)
    if not skip:
        with pytest.raises(UserError, match=r"sample 9 .*(?s:.*)after step 2"):
            run("out", data_file, *flags)
        assert newest_complete(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2") and not answered
        return
    folder = run("out", data_file, *flags, *SKIP)
    assert record(folder) == [("eval", 9, "s9", True)]
    assert len(answered[0]) == 24 + 6 - 1  # six samples have two questions


def test_in_a_notebook_the_error_goes_on_with_a_checkpoint_saved(data, tiny, tmp_path):
    """The data set raises, as it does where nobody asks for more."""
    damage(data, 9)
    config, tokenizer = AutoConfig.from_pretrained(tiny["llama3"]), AutoTokenizer.from_pretrained(tiny["llama3"])
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(data), max_length=2048)
    model = program.MiniCPMV.from_pretrained(tiny["llama3"], config=config, dtype=torch.float32)
    args = program.TrainingArguments(
        output_dir=str(tmp_path / "out"), report_to="none", per_device_train_batch_size=2, dataloader_num_workers=1,
        train_sampling_strategy="sequential", max_steps=8, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = CPMTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=data_collator, processing_class=tokenizer
    )
    with pytest.raises(SampleError, match=r"sample 9 \(id 's9'\): picture"):
        trainer.train()
    # accelerate asks for a batch ahead, whose error comes in the place of step 4's
    assert newest_complete(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-3")


def end_together(tiny, data: Path, tmp_path: Path, deepspeed: str = "") -> str:
    """Two processes, of which one meets the picture: they end together. Returns the command that they say."""
    damage(data, 9)
    flags = ("--max_steps", 8, "--logging_steps", 1, "--lora_r", 4, "--batch_size", 2, "--dataloader_num_workers", 1)
    flags += ("--report_to", "none", "--save_strategy", "no", "--train_sampling_strategy", "sequential")
    variables = {"MODEL": tiny["llama3"], "DATA": data, "OUTPUT_DIR": tmp_path / "out", "GPUS_PER_NODE": 2}
    result = launch("finetune_lora.sh", *flags, check=False, DS_CONFIG=deepspeed, **variables)
    output = result.stdout + result.stderr
    assert result.returncode == 1 and 'Traceback (most recent call last):\n  File "/' not in output, output[-6000:]
    assert output.count("sample 9 (id 's9'): picture") == 1
    assert newest_complete(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    return re.search(r"^.*--bad_samples skip.*$", output, re.M)[0]


@pytest.mark.slow
def test_processes_end_together(tiny, data, tmp_path):
    end_together(tiny, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["", "ds_config_zero2.json", "ds_config_zero3.json"])
def test_the_command_that_processes_say_goes_on(deepspeed, tiny, data, tmp_path):
    command = end_together(tiny, data, tmp_path, deepspeed)
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-6000:]
    assert record(tmp_path / "out") == [("train", 9, "s9", True)] and len(losses(tmp_path / "out")) == 8
