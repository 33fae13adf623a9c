"""What watches over a run: losses that are no number, steps without anything to learn, memory, loaders, signals."""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, ROOT, golden_batch
from torch.utils.data import get_worker_info
from transformers import AutoModel, TrainerCallback

from finetune import guards
from finetune.arguments import TrainingArguments
from finetune.checkpoints import newest_complete
from finetune.dataset import data_collator
from finetune.errors import ProcessError, UserError
from finetune.guards import RESUME_WITH, explained, memory_remedies, resume_command
from finetune.trainer import CPMTrainer


class Items(torch.utils.data.Dataset):
    """Two samples, over and over; `spoil(number, item)` may change one."""

    def __init__(self, count: int = 40, spoil=lambda number, item: item):
        data = golden_batch("llama3")
        self.rows = [{name: value[row] for name, value in data.items()} for row in (0, 1)]
        self.count, self.spoil = count, spoil

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict:
        return self.spoil(number, {**self.rows[number % 2], "id": f"sample {number}"})


def trainer_of(tmp_path, items=None, model=None, callbacks=(), evaluated=None, **arguments) -> CPMTrainer:
    settings = {"report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "logging_steps": 1, "seed": 3}
    settings |= {"save_strategy": "no", "max_steps": 6, "train_sampling_strategy": "sequential"}
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**settings, **arguments})
    model = model or AutoModel.from_pretrained(GOLDEN["llama3"], dtype=torch.float32)
    items = items or Items()
    datasets = {"train_dataset": items, "eval_dataset": evaluated}
    return CPMTrainer(model=model, args=arguments, data_collator=data_collator, callbacks=list(callbacks), **datasets)


def spoil_losses(trainer: CPMTrainer, steps, value: float) -> None:
    """Makes the loss of some steps, by number from 1, a `value` that is no number."""
    plain = trainer.compute_loss_func

    def loss(*args, **kwargs):
        bad = trainer.state.global_step + 1 in steps
        return plain(*args, **kwargs) * (value if bad else 1.0)

    trainer.compute_loss_func = loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("most", "stops_at"), [(1, 2), (3, 6)])
def test_bad_losses_stop_the_run(tmp_path, value, most, stops_at):
    """Steps 2, 4, 5 and 6 are bad, so one in a row is step 2 and three are step 6."""
    trainer = trainer_of(tmp_path, max_bad_steps=most, max_steps=20, save_strategy="steps", save_steps=1)
    spoil_losses(trainer, (2, 4, 5, 6, 7, 8), value)
    with pytest.raises(UserError, match=f"in {most} steps in a row") as caught:
        trainer.train()
    assert trainer.state.global_step == stops_at
    names = [f"sample {number}" for number in range(stops_at - most, stops_at)]
    assert f"Their samples: {'; '.join(names)}." in str(caught.value)
    # nothing is saved of a model that may be spoilt
    assert newest_complete(tmp_path) == str(tmp_path / f"checkpoint-{3 if most == 3 else 1}")


@pytest.mark.parametrize("max_grad_norm", [0.5, 0])
def test_a_bad_step_changes_no_weight(tmp_path, max_grad_norm):
    before, changed = [], []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, _args, _state, _control, model=None, **_):
            before[:] = [p.detach().clone() for p in model.parameters()]

        def on_optimizer_step(self, _args, _state, _control, model=None, **_):
            changed.append(any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)))

    trainer = trainer_of(tmp_path, callbacks=[Look()], max_steps=4, max_grad_norm=max_grad_norm)
    spoil_losses(trainer, (2, 3), float("nan"))
    trainer.train()
    assert changed == [True, False, False, True]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_run_that_ends_in_a_bad_step_is_a_success_where_no_weight_is_spoilt(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    spoil_losses(trainer, (2,), float("nan"))
    trainer.train()
    assert "the loss of the last step, 2, is infinite or no number" in caplog.text
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = trainer_of(tmp_path / "sgd", max_steps=2, optim="sgd", save_strategy="steps", save_steps=2)
    spoil_losses(trainer, (2,), float("nan"))
    with pytest.raises(UserError, match="training ended at step 2"):
        trainer.train()
    assert newest_complete(tmp_path / "sgd") is None


def test_a_step_without_supervised_tokens_names_its_samples(tmp_path):
    def spoil(number, item):
        return {**item, "labels": torch.full_like(item["labels"], -100)} if number in (4, 5, 7) else item

    trainer = trainer_of(
        tmp_path, Items(spoil=spoil), gradient_accumulation_steps=2, save_strategy="steps", save_steps=1
    )
    with pytest.raises(UserError, match=r"step 3 has no supervised token.*sample 4; sample 5"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")


def run_out_of_memory(trainer: CPMTrainer, message: str) -> None:
    """At the first loss, of training or evaluation, behind step 1."""
    plain = trainer.compute_loss_func

    def loss(*args, **kwargs):
        if trainer.state.global_step == 1:
            raise torch.OutOfMemoryError(message)
        return plain(*args, **kwargs)

    trainer.compute_loss_func = loss


def test_out_of_memory_says_what_was_computed_and_what_helps(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=2, model_max_length=2048)
    run_out_of_memory(trainer, "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    with pytest.raises(ProcessError) as caught:
        trainer.train()
    items = [trainer.train_dataset[number] for number in (2, 3)]
    tokens = sum(len(item["input_ids"]) for item in items)
    slices = sum(len(item["pixel_values"]) for item in items)
    assert f"a step of 2 samples, {tokens} tokens and {slices} slices" in str(caught.value)
    assert "--batch_size 1 --gradient_accumulation_steps 2" in str(caught.value)
    assert "Tried to allocate 2.00 GiB" in str(caught.value)


def test_out_of_memory_before_the_first_step_and_in_an_evaluation(tmp_path):
    class Fail(TrainerCallback):
        def on_train_begin(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ProcessError, match="out of memory before the first step"):
        trainer_of(tmp_path, callbacks=[Fail()]).train()
    trainer = trainer_of(
        *(tmp_path, None, None, (), Items(count=4)),
        **{"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2},
    )
    run_out_of_memory(trainer, "CUDA out of memory")
    with pytest.raises(
        ProcessError, match=r"out of memory in an evaluation .*costs least: --per_device_eval_batch_size 1"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "Tried to allocate"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "CUDA error: out of memory"),
        (MemoryError("Unable to allocate 9 GiB"), "of the host: Unable to allocate 9 GiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "of the host: "),
    ],
)
def test_out_of_memory_while_the_model_is_loaded(tmp_path, error, where):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ProcessError, match=f"out of memory while loading the model .*{where}"):  # noqa: SIM117
        with explained(None, arguments):
            raise error
    with pytest.raises(OSError, match="No space"), explained(None, arguments):
        raise OSError(errno.ENOSPC, "No space left")


def test_remedies_are_those_that_are_left():
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    settings |= {"use_lora": True, "tune_vision": False, "tune_embed_tokens": True, "model_max_length": 900}
    settings |= {"world_size": 2, "hf_deepspeed_config": None}
    config = SimpleNamespace(slicing={"max_slice_nums": 9})
    remedies = memory_remedies(SimpleNamespace(**settings), config)
    assert remedies[:2] == ["--max_slice_nums 4", "--tune_embed_tokens false"]
    assert not any("batch_size" in r or "checkpointing" in r or "vision" in r or "max_length" in r for r in remedies)
    assert sum("zero" in remedy for remedy in remedies) == 3
    offload = SimpleNamespace(get_value=lambda *_: 3, is_offload=lambda: True)
    remedies = memory_remedies(SimpleNamespace(**{**settings, "hf_deepspeed_config": offload}), config)
    assert not any("zero" in remedy for remedy in remedies)


def signal_worker(at: int, number: int):
    """For `Items`: the loader process that makes sample `at` gets a signal."""

    def spoil(sample, item):
        if sample == at and get_worker_info():
            os.kill(os.getpid(), number)
        return item

    return spoil


def test_death_of_a_loader_process_is_reported(tmp_path):
    trainer = trainer_of(tmp_path, Items(spoil=signal_worker(4, signal.SIGKILL)), dataloader_num_workers=1)
    with pytest.raises(ProcessError, match=r"a loader process died.*--dataloader_num_workers \(it is 1"):
        trainer.train()


def test_death_of_a_loader_process_that_breaks_off_what_it_sends_is_reported(tmp_path):
    """The broken pipe is met first, word of the death comes a moment later."""
    trainer = trainer_of(tmp_path, dataloader_num_workers=1)

    def loss(*_args, **_kwargs):
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.2, worker.kill).start()
        raise ConnectionResetError("Connection reset by peer")

    trainer.compute_loss_func = loss
    with pytest.raises(ProcessError, match="a loader process died"):
        trainer.train()


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_step_begin(self, _args, state, _control, **_):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(tmp_path, number, capfd, request):
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, before)))  # in a background it is ignored
    trainer = trainer_of(tmp_path, callbacks=[SignalAt(3, number)], eval_strategy="no")
    trainer.train()
    assert trainer.guard.signal == number and trainer.state.global_step == 3
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-3")
    assert signal.getsignal(number) == before
    assert f"{number.name}: a checkpoint is saved" in capfd.readouterr().err


def test_signals_are_those_of_the_system(monkeypatch):
    """Windows has no SIGHUP."""
    assert set(guards.SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    monkeypatch.delattr(signal, "SIGHUP")
    found = importlib.util.find_spec("finetune.guards")
    other = importlib.util.module_from_spec(found)
    found.loader.exec_module(other)
    assert other.SIGNALS == (signal.SIGTERM, signal.SIGINT)


def test_loader_processes_survive_the_signal_that_ends_training(tmp_path):
    """Ctrl-C and SLURM reach every process of the group."""
    trainer = trainer_of(tmp_path, Items(spoil=signal_worker(3, signal.SIGTERM)), dataloader_num_workers=1)
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_signal_within_an_evaluation(tmp_path):
    """It reaches the loader processes too; the run ends with a checkpoint, without the rest of the evaluation."""
    evaluations = []

    class Stop(TrainerCallback):
        def on_prediction_step(self, *_args, **_):
            os.kill(os.getpid(), signal.SIGTERM)

        def on_evaluate(self, *_args, **_):
            evaluations.append(1)

    arguments = {"eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 1, "max_steps": 2}
    trainer = trainer_of(
        tmp_path, callbacks=[Stop()], evaluated=Items(count=3, spoil=signal_worker(1, signal.SIGTERM)), **arguments
    )
    trainer.train()
    assert trainer.guard.signal == signal.SIGTERM and not evaluations
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")


class SignalInEvaluation(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_prediction_step(self, _args, state, _control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("stop", [SignalAt(4, signal.SIGTERM), SignalInEvaluation(4)])
def test_an_evaluation_that_a_signal_ended_is_made_up_for(tmp_path, stop, strategy):
    """The resumed run has the losses and evaluations of the unbroken one, and knows the same best checkpoint."""

    def run(folder, callbacks=(), resume=None):
        trainer = trainer_of(
            *(tmp_path / folder, Items(count=4), None, callbacks, Items(count=3)),
            **{"eval_strategy": strategy, "eval_steps": 2, "save_strategy": strategy, "save_steps": 2, "max_steps": 8},
            **{"metric_for_best_model": "loss", "greater_is_better": False, "train_sampling_strategy": "random"},
        )
        plain = trainer.compute_loss_func

        def loss(*args, **kwargs):  # random in training, as dropout makes it
            return plain(*args, **kwargs) * (0.5 + torch.rand(()) if trainer.model.training else 1.0)

        trainer.compute_loss_func = loss
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def figures(trainer, name):
        return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]

    unbroken = run("unbroken")
    stopped = run("broken", [stop])
    assert stopped.guard.signal and stopped.state.global_step == 4
    assert figures(stopped, "eval_loss") == figures(unbroken, "eval_loss")[: 1 if strategy == "steps" else 0]
    resumed = run("broken", resume=newest_complete(tmp_path / "broken"))
    for name in ("loss", "eval_loss"):
        assert figures(resumed, name) == figures(unbroken, name)
    assert resumed.state.best_global_step == unbroken.state.best_global_step
    assert Path(resumed.state.best_model_checkpoint).name == Path(unbroken.state.best_model_checkpoint).name


def test_a_run_that_is_stopped_keeps_its_newest_checkpoint(tmp_path):
    """Also where only the best, here the first, is to be kept at the end."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, callbacks=[SignalAt(4, signal.SIGTERM)], evaluated=Items(count=2), **saving, **best)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(("optim", "saved"), [("adamw_torch_fused", True), ("sgd", False)])
def test_a_signal_at_a_bad_step_saves_what_is_not_spoilt(tmp_path, optim, saved):
    trainer = trainer_of(tmp_path, callbacks=[SignalAt(3, signal.SIGTERM)], optim=optim)
    spoil_losses(trainer, (3,), float("nan"))
    trainer.train()
    assert newest_complete(tmp_path) == (str(tmp_path / "checkpoint-3") if saved else None)


def test_a_process_whose_launcher_is_gone_ends():
    """Killed before the process had asked to be told of it."""
    program = "from finetune.guards import die_with_launcher; die_with_launcher(); print('lives')"
    for launcher, status in ((os.getpid(), 0), (2**30, -signal.SIGKILL)):
        environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "FINETUNE_LAUNCHER": str(launcher)}
        result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True)
        assert result.returncode == status and (b"lives" in result.stdout) == (status == 0)


def test_resume_command(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", *RESUME_WITH):
        monkeypatch.delenv(name, raising=False)
    argv = ["finetune/finetune.py", "--data_path", "my data.json", "b.json", "--overwrite_output_dir", "true"]
    argv += ["--resume_from_checkpoint=x", "--bf16", "--overwrite_output_dir", "--fp16", "false"]
    command = resume_command(argv)
    assert command.endswith(
        "finetune/finetune.py --data_path 'my data.json' b.json --bf16 --fp16 false --resume_from_checkpoint true"
    )
    names = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert "launch.py --nproc_per_node 2 --standalone finetune/finetune.py" in resume_command(argv)
    assert resume_command(argv).startswith("DS_ACCELERATOR=cpu ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert resume_command(argv).startswith("DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=2,3 ")
    for name, value in {"WORLD_SIZE": "6", "GROUP_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    expected = "--nproc_per_node 2 --nnodes 3 --node_rank 1 --master_addr a --master_port 7 finetune/finetune.py"
    assert expected in resume_command(argv)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_looked_at_a_step_later_and_before_a_save(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20, save_strategy="steps", save_steps=4)
    spoil_losses(trainer, (2, 3, 4, 5, 6, 7), float("nan"))
    with pytest.raises(UserError, match=r"in 3 steps in a row.*sample 1; sample 2; sample 3\."):
        trainer.train()
    assert trainer.state.global_step == 4  # where a checkpoint would be saved, all losses are looked at
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    trainer = trainer_of(tmp_path, max_steps=20)
    spoil_losses(trainer, (2, 3, 4, 5, 6, 7), float("nan"))
    with pytest.raises(UserError, match=r"in 3 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_on_a_gpu(tmp_path, precision):
    """With the scaler of float16, and dropout."""
    losses = []
    for folder in ("whole", "halves"):
        for steps in (6,) if folder == "whole" else (3, 6):
            model = AutoModel.from_pretrained(GOLDEN["llama3"], dtype=torch.float32)
            model.llm.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.2))
            arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, precision: True}
            callbacks = [SignalAt(steps, signal.SIGTERM)] if steps == 3 else []
            trainer = trainer_of(tmp_path / folder, model=model, callbacks=callbacks, **arguments)
            trainer.train(resume_from_checkpoint=folder == "halves" and steps == 6)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)
