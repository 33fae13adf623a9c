"""Resuming with other flags: each takes effect, or is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, launch, losses, outcome
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune.errors import UserError
from finetune.finetune import train
from finetune.resume import apply_settings, say_changes, settings_of_groups
from finetune.trainer import CPMTrainer

SAVED = 4  # steps of the run that is gone on with
FLAGS = (
    *("--use_lora", "true", "--lora_r", 4, "--lora_dropout", 0, "--tune_vision", "false", "--tune_resampler", "false"),
    *("--tune_embed_tokens", "false", "--batch_size", 2, "--max_slice_nums", 1, "--dataloader_num_workers", 0),
    *("--learning_rate", 1e-3, "--warmup_ratio", 0.25, "--logging_steps", 1, "--save_steps", 2, "--report_to", "none"),
    *("--disable_tqdm", "true"),
)


@pytest.fixture(scope="module")
def started(tiny, data_file, tmp_path_factory):
    """Folder of a finished run of four steps, on the cosine schedule, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("started") / "out"
    run(folder, tiny, data_file, "--max_steps", SAVED)
    return folder


@pytest.fixture
def gone_on(started, tiny, data_file, tmp_path):
    """Goes on with a copy of that run, from its newest checkpoint, or that of `step`; returns the folder."""

    def go_on(*flags: object, step: int = SAVED) -> Path:
        folder = tmp_path / "out"
        shutil.copytree(started, folder)
        for later in range(step + 2, SAVED + 2, 2):
            shutil.rmtree(folder / f"checkpoint-{later}")
        run(folder, tiny, data_file, "--resume_from_checkpoint", "true", *flags)
        return folder

    return go_on


def run(folder: Path, tiny, data_file: Path, *flags: object) -> None:
    needed = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder)
    train([str(word) for word in (*needed, *FLAGS, *flags)])


def history(folder: Path, name: str) -> dict[int, float]:
    """What was logged under a name, by step."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in entries if name in entry}


@pytest.mark.parametrize("whole", [True, False])
def test_the_command_of_a_stopped_run_is_not_refused(whole, tiny, data_file, tmp_path, monkeypatch, caplog):
    """It goes on, or begins anew where the checkpoint holds weights alone."""
    step = CPMTrainer.training_step

    def stopped_at_3(trainer, *given):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *given)

    words = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", tmp_path / "out", *FLAGS]
    words = [str(word) for word in (*words, "--max_steps", 4, "--save_steps", 100, "--save_only_model", not whole)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(CPMTrainer, "training_step", stopped_at_3)
        train(words)
    assert ended.value.code == 128 + signal.SIGTERM
    said = next(message for message in caplog.messages if "To go on" in message)
    assert f"SIGTERM: stopped after step 3 of 4; the newest checkpoint is {tmp_path / 'out' / 'checkpoint-3'}" in said
    assert ("which cannot be resumed from (--save_only_model)" in said) != whole
    command = shlex.split(said.splitlines()[-1])
    assert command[-2:] == ["--resume_from_checkpoint" if whole else "--overwrite_output_dir", "true"]
    train(command[command.index("finetune.py") + 1 :])
    assert len(losses(tmp_path / "out")) == 4
    assert len(list(tmp_path.glob("out/_earlier-*/checkpoint-3"))) == (not whole)


def rates(folder: Path) -> dict[int, float]:
    return history(folder, "learning_rate")


def optimizer_settings(checkpoint: Path) -> list[dict]:
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


SCHEDULES = ["cosine", "polynomial"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "constant_with_warmup", "inverse_sqrt")]


@pytest.mark.parametrize("schedule", [*SCHEDULES, *OTHERS])
def test_a_finished_run_is_extended_at_the_rates_of_an_unbroken_one(schedule, gone_on, tiny, data_file, tmp_path):
    flags = ("--max_steps", 8, "--lr_scheduler_type", schedule)
    run(tmp_path / "unbroken", tiny, data_file, *flags, "--save_strategy", "no")
    folder = gone_on(*flags)
    assert sorted(rates(folder)) == list(range(1, 9))
    for step in range(SAVED + 1, 9):
        assert rates(folder)[step] == pytest.approx(rates(tmp_path / "unbroken")[step], rel=1e-9), step
        assert rates(folder)[step] > 0


def test_epochs_are_added(gone_on, tiny, data_file, tmp_path):
    """24 samples, two at a time: 12 steps an epoch."""
    flags = ("--max_steps", -1, "--num_train_epochs", 2)
    run(tmp_path / "unbroken", tiny, data_file, *flags, "--save_strategy", "no")
    folder = gone_on(*flags)
    expected = rates(tmp_path / "unbroken")
    assert len(expected) == 24
    assert [rates(folder)[step] for step in range(5, 25)] == pytest.approx([expected[step] for step in range(5, 25)])


@pytest.mark.parametrize(
    ("flags", "named"),
    [(("--max_steps", 3), "--max_steps 3: "), (("--num_train_epochs", 0.25), "--num_train_epochs 0.25 (3 steps): ")],
)
def test_a_run_cannot_end_before_its_checkpoint(flags, named, gone_on, started, tmp_path):
    with pytest.raises(UserError) as caught:
        gone_on(*flags)
    folder = tmp_path / "out"
    assert f"{named}{folder / 'checkpoint-4'} is at step 4 already; give more, or the path of an" in str(caught.value)
    assert (folder / "trainer_state.json").read_bytes() == (started / "trainer_state.json").read_bytes()


def test_a_finished_run_says_that_no_step_is_left(gone_on, started, caplog):
    folder = gone_on("--max_steps", SAVED)
    assert f"{folder / 'checkpoint-4'}: is at the last step, 4: none is left to take" in caplog.text
    assert losses(folder) == losses(started)


def test_a_new_learning_rate_takes_effect(gone_on, started, caplog):
    folder = gone_on("--max_steps", SAVED, "--learning_rate", 2e-3, step=2)
    before, after = rates(started), rates(folder)
    assert [after[1], after[2]] == [before[1], before[2]]
    assert [after[3], after[4]] == pytest.approx([2 * before[3], 2 * before[4]])
    assert all(group["initial_lr"] == 2e-3 for group in optimizer_settings(folder / "checkpoint-4"))
    said = "the run goes on with other flags than it had: --learning_rate 0.002 (was 0.001)\n"
    assert said in caplog.text


def test_the_flags_that_are_said_to_change_were_given(caplog):
    """Others are made to fit. Where an earlier version did not record which were given, all are compared."""
    then = {"arguments": {"training": {"seed": 1, "workers": 4, "bf16": True, "max_steps": 2, "deepspeed": {"a": 1}}}}
    now = {"arguments": {"training": {"seed": 2, "workers": 2, "bf16": False, "max_steps": 2, "deepspeed": {"a": 2}}}}
    now["flags_given"] = ["--seed", "--deepspeed"]
    said = "--seed 2 (was 1), {}--bf16 False (was True), --deepspeed (another a)\n"
    for record, others in ({}, "--workers 2 (was 4), "), ({"flags_given": ["--max_steps"]}, ""):
        caplog.clear()
        say_changes({**then, **record}, now)
        assert caplog.text.endswith(said.format(others))


class Counting(torch.optim.SGD):
    """Keeps state in its parameter groups, as schedule-free optimizers do."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr, weight_decay=weight_decay)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
        return super().step(closure)


def test_state_in_the_groups_of_parameters_is_the_checkpoints():
    """Two steps, then two more with another rate and decay."""

    def optimizer(rate: float, decay: float) -> tuple:
        made = Counting([torch.nn.Parameter(torch.ones(2))], rate, decay)
        return made, torch.optim.lr_scheduler.LambdaLR(made, lambda _: 1.0)

    before, schedule = optimizer(0.1, 0.0)
    for _ in range(2):
        before.step()
        schedule.step()
    after, other = optimizer(0.2, 0.5)
    asked = settings_of_groups(after, ["lr"])
    after.load_state_dict(before.state_dict())
    other.load_state_dict(schedule.state_dict())
    apply_settings(after, other, asked)
    (group,) = after.param_groups
    assert (group["lr"], group["weight_decay"], group["k"]) == (0.2, 0.5, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("then", "now"), [(False, True), (True, False), (True, True)])
def test_a_run_goes_on_with_another_kernel_of_the_same_optimizer(then, now):
    """Step counts are where it reads them: of two steps and two more, the same weights."""

    def optimizer(fused: bool) -> tuple:
        weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
        made = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        return weight, made, torch.optim.lr_scheduler.LambdaLR(made, lambda _: 1.0)

    def steps(weight: torch.nn.Parameter, made: torch.optim.Optimizer, schedule, count: int) -> None:
        for _ in range(count):
            weight.grad = weight.detach() * 0.5 + 1
            made.step()
            schedule.step()

    whole = optimizer(now)
    steps(*whole, 4)
    before, after = optimizer(then), optimizer(now)
    steps(*before, 2)
    asked = settings_of_groups(after[1], ["betas", "eps"])
    after[0].data.copy_(before[0].data)
    states = before[1].state_dict()
    counts = {name: {**state, "step": state["step"].cpu()} for name, state in states["state"].items()}
    after[1].load_state_dict({**states, "state": counts})  # as Trainer loads it, by way of the CPU
    after[2].load_state_dict(before[2].state_dict())
    apply_settings(after[1], after[2], asked)
    steps(*after, 2)
    assert bool(after[1].param_groups[0]["fused"]) == now
    torch.testing.assert_close(after[0], whole[0])


def test_unchanged_flags_say_nothing_and_change_nothing(gone_on, started, caplog):
    folder = gone_on("--max_steps", SAVED, step=2)
    assert rates(folder) == rates(started) and losses(folder) == pytest.approx(losses(started), rel=1e-6)
    assert optimizer_settings(folder / "checkpoint-4") == optimizer_settings(started / "checkpoint-4")
    assert "other flags" not in caplog.text


def test_settings_of_the_optimizer_take_effect(gone_on):
    new = ("--weight_decay", 0.2, "--adam_beta1", 0.8, "--adam_beta2", 0.9, "--adam_epsilon", 1e-6)
    folder = gone_on("--max_steps", 6, *new)
    for group in optimizer_settings(folder / "checkpoint-6"):
        assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6
    assert max(group["weight_decay"] for group in optimizer_settings(folder / "checkpoint-6")) == 0.2


def test_steps_of_logs_checkpoints_and_evaluations_take_effect(gone_on, data_file):
    evaluation = ("--eval_strategy", "steps", "--eval_steps", 3, "--eval_data_path", data_file)
    folder = gone_on("--max_steps", 9, "--logging_steps", 2, "--save_steps", 3, *evaluation)
    assert sorted(rates(folder)) == [1, 2, 3, 4, 6, 8]
    assert sorted(history(folder, "eval_loss")) == [6, 9]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 9)]


def test_another_form_of_the_schedule_takes_effect(gone_on):
    folder = gone_on("--max_steps", 8, "--lr_scheduler_type", "constant", "--warmup_ratio", 0)
    assert [rates(folder)[step] for step in range(5, 9)] == [1e-3] * 4


def test_schedules_by_steps_and_by_evaluations_are_not_exchanged(started, tiny, data_file, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(started, folder)
    needed = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder)
    new = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--eval_data_path", data_file)
    words = (*needed, *FLAGS, "--max_steps", 6, "--resume_from_checkpoint", "true", *new)
    status, lines = outcome(train, words, capsys)
    assert status == 1
    assert any(line.startswith("--lr_scheduler_type reduce_lr_on_plateau: the checkpoint's rate") for line in lines)


def test_the_rate_of_a_plateau_is_kept(tiny, data_file, tmp_path, capsys):
    """Resumed without a change it goes on at the rate that evaluations have made; another rate is refused."""
    folder = tmp_path / "out"
    flags = (
        *("--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"mode": "max", "patience": 0}'),
        *("--eval_strategy", "steps", "--eval_steps", 1, "--eval_data_path", data_file),
        *("--save_steps", 1, "--warmup_ratio", 0),
    )
    run(folder, tiny, data_file, *flags, "--max_steps", 3)
    assert rates(folder)[3] < 1e-3
    reached = optimizer_settings(folder / "checkpoint-3")[0]["lr"]
    resumed = ("--max_steps", 4, "--resume_from_checkpoint", "true")
    needed = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder)
    status, lines = outcome(train, (*needed, *FLAGS, *flags, *resumed, "--learning_rate", 5e-4), capsys)
    assert status == 1 and any(line.startswith("--learning_rate 0.0005: the checkpoint's rate") for line in lines)
    run(folder, tiny, data_file, *flags, *resumed)
    assert rates(folder)[4] <= reached


def test_another_metric_chooses_the_best_anew(tiny, data_file, tmp_path, caplog):
    """A loss is not compared with a score."""
    folder = tmp_path / "out"
    flags = (
        *("--eval_strategy", "steps", "--eval_steps", 2, "--eval_data_path", data_file, "--load_best_model_at_end"),
        *("true", "--predict_with_generate", "true", "--predict_samples", 2, "--predict_max_new_tokens", 4),
    )
    run(folder, tiny, data_file, *flags, "--max_steps", 2)
    new = ("--metric_for_best_model", "token_f1", "--max_steps", 4, "--resume_from_checkpoint", "true")
    run(folder, tiny, data_file, *flags, *new)
    state = json.loads((folder / "trainer_state.json").read_text())
    scores = history(folder, "eval_token_f1")
    assert "was chosen by another metric: by eval_token_f1 it is that of step 2 now" in caplog.text
    assert state["best_metric"] == scores[state["best_global_step"]] == max(scores.values())


BEST = (
    *("--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end", "true"),
    *("--lr_scheduler_type", "constant", "--warmup_ratio", 0, "--learning_rate", 3),
)


@pytest.fixture(scope="module")
def risen(tiny, data_file, tmp_path_factory):
    """A run whose loss rises: of three checkpoints the first is the best."""
    folder = tmp_path_factory.mktemp("risen") / "out"
    run(folder, tiny, data_file, "--eval_data_path", data_file, *BEST, "--max_steps", 3)
    found = history(folder, "eval_loss")
    assert min(found, key=found.get) == 1
    return folder


@pytest.mark.parametrize("how", ["moved", "copied", "spelled", pytest.param("named", marks=pytest.mark.slow)])
def test_the_best_checkpoint_is_found_where_it_now_is(how, risen, tiny, data_file, tmp_path, monkeypatch):
    """And is kept, though one checkpoint is to be left."""
    original, folder = tmp_path / "before" / "out", tmp_path / "after"
    shutil.copytree(risen, original)
    for file in original.rglob("trainer_state.json"):
        file.write_text(file.read_text().replace(str(risen), str(original)))
        (file.parent / "complete.json").unlink(missing_ok=True)  # which has its size
    if how == "copied":
        shutil.copytree(original, folder)
        weights = original / "checkpoint-1" / "adapter_model.safetensors"
        weights.write_bytes((original / "checkpoint-3" / weights.name).read_bytes())  # not the copy's business
    elif how == "spelled":
        folder = original
    else:
        original.rename(folder)
    monkeypatch.chdir(folder.parent)
    output = Path(folder.name) if how == "spelled" else folder
    newest = output / "checkpoint-3" if how == "named" else "true"
    flags = ("--eval_data_path", data_file, *BEST, "--max_steps", 5, "--save_total_limit", 2)
    run(output, tiny, data_file, *flags, "--resume_from_checkpoint", newest)
    best = load_file(risen / "checkpoint-1" / "adapter_model.safetensors")
    result = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in best.items())
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).resolve() == (folder / "checkpoint-1").resolve()


@pytest.mark.parametrize("gone", [True, False])
def test_a_best_checkpoint_that_is_gone_is_said_at_the_start(gone, risen, tiny, data_file, tmp_path, caplog):
    """Or that is not whole; the best of the others takes its place."""
    folder = tmp_path / "out"
    shutil.copytree(risen, folder)
    for file in folder.rglob("trainer_state.json"):  # the original is gone as well
        file.write_text(file.read_text().replace(str(risen), str(tmp_path / "gone")))
        (file.parent / "complete.json").unlink(missing_ok=True)  # which has its size
    if gone:
        shutil.rmtree(folder / "checkpoint-1")
    else:
        (folder / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"")
    flags = ("--eval_data_path", data_file, *BEST, "--max_steps", 4, "--resume_from_checkpoint", "true")
    run(folder, tiny, data_file, *flags)
    found = {step: loss for step, loss in history(folder, "eval_loss").items() if step > 1}
    best = min(found, key=found.get)
    assert "of step 1, is not in" in caplog.text
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_global_step"] == best and state["best_metric"] == found[best]


def test_a_run_that_goes_on_elsewhere_keeps_its_best(risen, tiny, data_file, tmp_path):
    """It stays where it was written, twice; a checkpoint of the same name of another run is not taken for it."""
    folder, flags = tmp_path / "out", ("--eval_data_path", data_file, *BEST)
    run(folder, tiny, data_file, *flags, "--max_steps", 4, "--resume_from_checkpoint", risen / "checkpoint-3")
    run(folder, tiny, data_file, *flags, "--max_steps", 5, "--resume_from_checkpoint", "true")
    best = load_file(risen / "checkpoint-1" / "adapter_model.safetensors")
    result = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in best.items())


@pytest.mark.parametrize("damage", ["removed", "cut off"])
def test_a_best_checkpoint_that_goes_during_the_run_is_said(damage, risen, tiny, data_file, tmp_path, caplog):
    folder = tmp_path / "out"
    shutil.copytree(risen, folder)

    class Damage(TrainerCallback):
        def on_step_end(self, *_, **__):
            if damage == "removed":
                shutil.rmtree(folder / "checkpoint-1")
            else:
                (folder / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"")

    before = CPMTrainer.__init__

    def init(self, *args, **kwargs):
        before(self, *args, **kwargs)
        self.add_callback(Damage())

    with mock.patch.object(CPMTrainer, "__init__", init):
        flags = ("--eval_data_path", data_file, *BEST, "--max_steps", 4, "--resume_from_checkpoint", "true")
        run(folder, tiny, data_file, *flags)
    assert "checkpoint-1, cannot be loaded" in caplog.text and "the last step is the result" in caplog.text
    last = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    result = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in last.items())


def test_an_evaluation_that_is_made_up_for_can_be_the_best(risen, tiny, data_file, tmp_path):
    """A signal stopped the run behind the checkpoint of step 1, before the evaluation that was due."""
    folder = tmp_path / "out"
    shutil.copytree(risen, folder)
    for later in (2, 3):
        shutil.rmtree(folder / f"checkpoint-{later}")
    path = folder / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "eval_loss" not in entry]
    path.write_text(json.dumps({**state, **dict.fromkeys([name for name in state if name.startswith("best_")])}))
    (path.parent / "complete.json").unlink()  # which has its size
    flags = ("--eval_data_path", data_file, *BEST, "--max_steps", 3, "--save_total_limit", 1)
    run(folder, tiny, data_file, *flags, "--resume_from_checkpoint", "true")
    assert json.loads((folder / "trainer_state.json").read_text())["best_global_step"] == 1
    best = load_file(risen / "checkpoint-1" / "adapter_model.safetensors")
    result = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in best.items())


def test_evaluations_before_the_resume_count_where_the_best_is_asked_for_then(risen, tiny, data_file, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(risen, folder)
    for file in folder.rglob("trainer_state.json"):
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, **dict.fromkeys([n for n in state if n.startswith("best_")])}))
        (file.parent / "complete.json").unlink(missing_ok=True)
    flags = ("--eval_data_path", data_file, *BEST, "--max_steps", 4, "--resume_from_checkpoint", "true")
    run(folder, tiny, data_file, *flags)
    assert json.loads((folder / "trainer_state.json").read_text())["best_global_step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("own_optimizer", [False, True])
def test_deepspeed_runs_are_extended_at_the_rates_of_unbroken_ones(stage, own_optimizer, tiny, data_file, tmp_path):
    """Also where the DeepSpeed file has the optimizer."""
    config = json.loads((ROOT / "finetune" / f"ds_config_zero{stage}.json").read_text())
    if own_optimizer:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))

    def go(folder: Path, *flags: object) -> None:
        words = (*FLAGS, "--save_steps", 4, "--weight_decay", 0.1, *flags)
        variables = {"MODEL": tiny["llama3"], "DATA": data_file, "OUTPUT_DIR": folder, "GPUS_PER_NODE": 2}
        launch("finetune_lora.sh", *words, DS_CONFIG=file, **variables)

    go(tmp_path / "out", "--max_steps", 4)
    go(tmp_path / "out", "--max_steps", 8, "--resume_from_checkpoint", "true", "--learning_rate", 3e-3)
    go(tmp_path / "unbroken", "--max_steps", 8, "--learning_rate", 3e-3)
    after, expected = rates(tmp_path / "out"), rates(tmp_path / "unbroken")
    assert [after[step] for step in range(5, 9)] == pytest.approx([expected[step] for step in range(5, 9)], rel=1e-9)
