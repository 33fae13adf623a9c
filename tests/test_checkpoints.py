"""Checkpoints are whole or not there: what counts as whole, which one is taken, and what a full disk does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import GOLDEN, ROOT, golden_batch, same_tensors
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, TrainerCallback

from finetune.arguments import TrainingArguments, load_config
from finetune.checkpoints import (
    ASIDE,
    MANIFEST,
    check_file,
    fault,
    lacking,
    newest_complete,
    newest_everywhere,
    optimizer_kind,
    set_checkpoints_aside,
    set_newer_aside,
    write_manifest,
    written_aside,
)
from finetune.dataset import SupervisedDataset, data_collator, load_samples
from finetune.errors import UserError
from finetune.finetune import _compare_steps, _resume_problems
from finetune.loading import SETTINGS_NAME, load_tokenizer
from finetune.trainer import CPMTrainer


def write_files(folder: Path) -> None:
    """One file of every kind that a checkpoint has."""
    save_file({"a": torch.arange(1000.0), "b": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({"a": torch.arange(1000.0)}, folder / "optimizer.pt")
    (folder / "global_step7").mkdir()
    torch.save([torch.zeros(100)], folder / "global_step7" / "states.pt")
    (folder / "latest").write_text("global_step7")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-7"
    with written_aside(folder, writes=True) as aside:
        assert aside == tmp_path / ASIDE / "checkpoint-7" and not folder.exists()
        write_files(aside)
    return folder


def test_a_checkpoint_is_there_when_it_is_whole(saved, tmp_path):
    assert fault(saved) is None
    listed = json.loads((saved / MANIFEST).read_text())["files"]
    files = {file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file()}
    assert set(listed) == files - {MANIFEST}
    modes = {file.stat().st_mode for file in saved.rglob("*") if file.is_file()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode}
    assert not (tmp_path / ASIDE).exists()
    assert newest_complete(tmp_path) == newest_everywhere(tmp_path, writes=True) == str(saved)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "global_step7/states.pt", "latest", "trainer_state.json"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_checkpoint_with_a_fault_is_passed_over(saved, tmp_path, caplog, name, listed):
    """`listed` is False in checkpoints of earlier versions: there, only what a file says of itself shows."""
    older = tmp_path / "checkpoint-5"
    shutil.copytree(saved, older)
    if not listed:
        (saved / MANIFEST).unlink()
    content = (saved / name).read_bytes()
    for damaged in (None, content[:-3], content[: len(content) // 2], b""):
        (saved / name).unlink() if damaged is None else (saved / name).write_bytes(damaged)
        if listed or (name != "latest" and "/" not in name and (damaged is not None or name == "trainer_state.json")):
            why = fault(saved)
            assert why and Path(name).name in why
            caplog.clear()
            assert newest_complete(tmp_path) == newest_everywhere(tmp_path, writes=True) == str(older)
            assert "checkpoint-7 is incomplete" in caplog.text and "checkpoint-5" not in caplog.text
        (saved / name).write_bytes(content)
    assert newest_complete(tmp_path) == str(saved)


def lora_trainer(kind: type, tiny: dict, data_file: Path, folder: Path, **arguments) -> CPMTrainer:
    """A trainer of this class that saves after each of its steps."""
    model = get_peft_model(AutoModel.from_pretrained(tiny["llama3"]), LoraConfig(r=2, target_modules=".*q_proj"))
    tokenizer = load_tokenizer(tiny["llama3"])
    config = load_config(str(tiny["llama3"]))
    dataset = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(data_file), 2048)
    settings = {"report_to": "none", "use_cpu": True, "save_steps": 1, "disable_tqdm": True, **arguments}
    return kind(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=dataset)


def writing_elsewhere(elsewhere: Path, *methods: str) -> type:
    """A Trainer some of whose files go to another place than it is told."""

    def moved(name: str):
        def write(self, _=None, *args, **kwargs):
            elsewhere.mkdir(exist_ok=True)
            return getattr(CPMTrainer, name)(self, str(elsewhere), *args, **kwargs)

        return write

    return type("Elsewhere", (CPMTrainer,), {name: moved(name) for name in methods})


@pytest.mark.parametrize(
    ("methods", "missing"),
    [
        (("_save",), "its weights"),
        (("_save_optimizer_and_scheduler",), "the optimizer's state"),
        (("_save_rng_state",), "rng_state.pth"),
        (("_get_output_dir",), "its weights"),
    ],
)
def test_only_what_can_be_resumed_is_put_in_place(methods, missing, tiny, data_file, tmp_path):
    """A good checkpoint of the same step stays, and no run goes on with less than it says."""
    folder = tmp_path / "out"
    lora_trainer(CPMTrainer, tiny, data_file, folder, max_steps=1).train()
    before = {file.name: file.read_bytes() for file in (folder / "checkpoint-1").iterdir()}
    if methods == ("_get_output_dir",):
        kind = type("Elsewhere", (CPMTrainer,), {"_get_output_dir": lambda *_, **__: str(tmp_path / "elsewhere")})
    else:
        kind = writing_elsewhere(tmp_path / "elsewhere", *methods)
    with pytest.raises(UserError, match=f"could not be saved: .*{missing}"):
        lora_trainer(kind, tiny, data_file, folder, max_steps=1).train()
    assert {file.name: file.read_bytes() for file in (folder / "checkpoint-1").iterdir()} == before
    assert [path.name for path in folder.glob("_*")] in ([], [ASIDE])


def test_a_checkpoint_without_optimizer_is_one_where_it_was_asked_for(tiny, data_file, tmp_path):
    lora_trainer(CPMTrainer, tiny, data_file, tmp_path, max_steps=1, save_only_model=True).train()
    assert fault(tmp_path / "checkpoint-1") is None and lacking(tmp_path / "checkpoint-1", resumable=False) == []
    assert lacking(tmp_path / "checkpoint-1") == ["the optimizer's state", "rng_state.pth"]


def test_a_result_that_is_written_elsewhere_is_said(tiny, data_file, tmp_path):
    trainer = lora_trainer(writing_elsewhere(tmp_path / "elsewhere", "_save"), tiny, data_file, tmp_path / "out")
    with pytest.raises(UserError, match="out could not be saved: its weights"):
        trainer.save_model()


def test_what_a_cut_off_save_left_is_not_used_and_is_replaced(tmp_path, caplog):
    left = tmp_path / ASIDE / "checkpoint-7"
    left.mkdir(parents=True)
    write_files(left)
    (left / "of_before").touch()
    assert newest_complete(tmp_path) is None and newest_everywhere(tmp_path, writes=True) is None
    assert "checkpoint-7 is incomplete (its save was cut off)" in caplog.text
    with written_aside(tmp_path / "checkpoint-7", writes=True) as aside:
        assert list(aside.iterdir()) == []
        write_files(aside)
    assert fault(tmp_path / "checkpoint-7") is None


def test_a_checkpoint_of_the_same_step_is_moved_aside(saved, tmp_path):
    (saved / "mine").touch()
    with written_aside(saved, writes=True) as aside:
        write_files(aside)
    assert not (saved / "mine").exists()
    assert [path.parent.parent for path in tmp_path.rglob("mine")] == list(tmp_path.glob("_earlier-*"))
    set_checkpoints_aside(tmp_path)
    assert not saved.exists() and len(list(tmp_path.rglob("model.safetensors"))) == 2


def test_a_whole_checkpoint_that_a_kill_kept_from_its_place_is_put_there(saved, tmp_path, caplog):
    """Killed between the check of the new one and its rename, before or after an older one of the same step moved."""
    (saved / "mine").touch()
    for older_is_there in (True, False):
        aside = tmp_path / ASIDE / saved.name
        aside.mkdir(parents=True, exist_ok=True)
        write_files(aside)
        write_manifest(aside)
        if not older_is_there:  # set_checkpoints_aside would take the new one along
            (tmp_path / "_earlier-mine").mkdir()
            saved.rename(tmp_path / "_earlier-mine" / saved.name)
        assert newest_everywhere(tmp_path, writes=False) == (str(saved) if older_is_there else None)
        assert newest_everywhere(tmp_path, writes=True) == str(saved)
        assert not (saved / "mine").exists() and not aside.exists()
    assert len(list(tmp_path.glob("_earlier-*/checkpoint-7"))) == 2 and len(list(tmp_path.rglob("mine"))) == 1
    assert "saved whole" in caplog.text


@pytest.mark.usefixtures("saved")
def test_going_on_from_an_older_checkpoint_moves_newer_ones_aside(tmp_path):
    for step in (3, 9, 12):
        with written_aside(tmp_path / f"checkpoint-{step}", writes=True) as aside:
            write_files(aside)
    set_newer_aside(f"{tmp_path}/../{tmp_path.name}/checkpoint-7", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-7"]
    assert len(list(tmp_path.glob("_earlier-*/checkpoint-*"))) == 2
    elsewhere = next(tmp_path.glob("_earlier-*/checkpoint-9"))
    set_newer_aside(elsewhere, tmp_path)  # whatever its number: those here are of another run
    assert newest_complete(tmp_path) is None and elsewhere.exists()
    assert len(list(tmp_path.glob("_earlier-*/checkpoint-*"))) == 4


@pytest.mark.usefixtures("saved")
def test_what_kills_left_of_an_earlier_run_is_not_taken_for_new(tmp_path):
    """A checkpoint that is whole but was not put in its place is moved away with the others; half of one is removed."""
    for step, whole in ((8, True), (9, False)):
        aside = tmp_path / ASIDE / f"checkpoint-{step}"
        aside.mkdir(parents=True)
        write_files(aside)
        if whole:
            write_manifest(aside)
    set_checkpoints_aside(tmp_path)
    assert newest_everywhere(tmp_path, writes=True) is None
    assert {path.name for path in tmp_path.glob("_earlier-*/*")} == {"checkpoint-7", "checkpoint-8"}
    assert not list((tmp_path / ASIDE).iterdir())


def test_errors_of_libraries_in_rust_are_about_saving(tmp_path):
    """tokenizers raises a plain Exception."""
    with pytest.raises(UserError, match="could not be saved"), written_aside(tmp_path / "checkpoint-9", True) as aside:
        (aside / "half").touch()
        raise Exception("No space left on device (os error 28)")
    assert not aside.exists()


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["optimizer.pt"], "plain"),
        (["global_step2/mp_rank_00_model_states.pt"], "ZeRO-0"),
        (["global_step2/mp_rank_00_model_states.pt",
          "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO-1/2"),
        (["global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
          "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO-3"),
        (["model.safetensors"], None),
    ],
)  # fmt: skip
def test_what_wrote_the_optimizer(tmp_path, files, kind):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert optimizer_kind(tmp_path) == kind


def test_a_file_that_is_not_whole_is_found_before_the_rename(saved, tmp_path):
    message = r"checkpoint-9 could not be saved.*optimizer\.pt is not whole.*checkpoint-7"
    with pytest.raises(UserError, match=message), written_aside(tmp_path / "checkpoint-9", writes=True) as aside:
        write_files(aside)
        (aside / "optimizer.pt").write_bytes((aside / "optimizer.pt").read_bytes()[:-1])
    assert not (tmp_path / "checkpoint-9").exists() and not any((tmp_path / ASIDE).iterdir())
    assert newest_complete(tmp_path) == str(saved)


def test_other_errors_are_not_about_saving(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), written_aside(tmp_path / "checkpoint-1", writes=True):
        raise RuntimeError("shapes do not fit")


def test_check_file_takes_any_other_file(tmp_path):
    (tmp_path / "notes.txt").write_text("{")
    check_file(tmp_path / "notes.txt")


def test_a_result_goes_into_a_folder_that_holds_more(tmp_path):
    for name in ("a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    with written_aside(tmp_path, writes=True, into=True) as aside:
        (aside / "sub").mkdir()
        for name in ("a", "sub/b"):
            (aside / name).write_text("new")
    found = {file.relative_to(tmp_path).as_posix(): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {"a": "new", "sub/b": "new", "sub/c": "old"}
    assert not (tmp_path / ASIDE).exists()


def trainer_of(tmp_path: Path, **arguments) -> CPMTrainer:
    """Two steps an epoch on a tiny model."""
    data = golden_batch("llama3")
    items = [{**{name: value[row] for name, value in data.items()}, "id": f"s{row}"} for row in (0, 1)]
    settings = {"report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "logging_steps": 1, "seed": 3}
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**settings, **arguments})
    model = AutoModel.from_pretrained(GOLDEN["llama3"], dtype=torch.float32)
    return CPMTrainer(model=model, args=arguments, train_dataset=items, eval_dataset=items, data_collator=data_collator)


def test_best_checkpoint_and_rotation(tmp_path):
    """The paths that a checkpoint names are those where it ends up."""
    arguments = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "save_total_limit": 2, "max_steps": 4}
    trainer = trainer_of(tmp_path, **arguments, load_best_model_at_end=True, learning_rate=1e-4)
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 2 and folders[-1].name == "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    for folder in folders:
        state = json.loads((folder / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).parent == tmp_path
        assert fault(folder) is None


def test_one_save_for_a_step(tmp_path):
    """As when a step's save and an epoch's meet."""
    trainer = trainer_of(tmp_path, save_steps=2, max_steps=2)

    class SaveAgain(TrainerCallback):
        def on_epoch_end(self, _args, _state, control, **_):
            (tmp_path / "checkpoint-2" / "mine").touch()
            control.should_save = True

    trainer.add_callback(SaveAgain())
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "mine").is_file() and not list(tmp_path.glob("_earlier-*"))


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path):
    """Its last step lies within an epoch."""
    trainer = trainer_of(tmp_path, save_steps=1, max_steps=3)
    trainer.train()
    again = trainer_of(tmp_path, save_steps=1, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3 and not (tmp_path / "checkpoint-4").exists()
    assert not list(tmp_path.glob("_earlier-*"))
    weights = again.model.state_dict()
    assert len(same_tensors(trainer.model.state_dict(), weights)) == len(weights)
    longer = trainer_of(tmp_path, save_steps=1, max_steps=5)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [entry["step"] for entry in longer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]


def test_a_finished_run_that_is_resumed_has_no_mean_loss(tmp_path):
    trainer_of(tmp_path, save_steps=2, max_steps=2).train()
    again = trainer_of(tmp_path, save_steps=2, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not any(entry.get("train_loss") == 0 for entry in again.state.log_history)
    assert any("train_runtime" in entry for entry in again.state.log_history)


def test_the_hub_is_given_the_result_alone(tmp_path, monkeypatch):
    """Not what lies aside; and the result is written once."""
    uploads, saves = [], []

    class Hub:
        def create_repo(self, *_, **__):
            return SimpleNamespace(repo_id="me/it")

        def upload_folder(self, *, folder_path, ignore_patterns=None, **_):
            files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*")]
            uploads.append({name for name in files if not any(fnmatch(name, p) for p in ignore_patterns or ())})

    for name, stand_in in (("hf_api", Hub), ("create_repo", Hub().create_repo), ("upload_folder", Hub().upload_folder)):
        if hasattr(transformers.trainer, name):
            monkeypatch.setattr(transformers.trainer, name, stand_in)
    trainer = trainer_of(tmp_path, max_steps=1, push_to_hub=True, hub_strategy="end")
    trainer.create_model_card = lambda *_, **__: None
    plain = trainer._save
    trainer._save = lambda *args, **kwargs: (saves.append(1), plain(*args, **kwargs))
    trainer.train()
    set_checkpoints_aside(tmp_path)
    (tmp_path / ASIDE / "checkpoint-9").mkdir(parents=True)
    saves.clear()
    trainer.save_model()
    assert len(uploads) == 1 and len(saves) == 1
    assert "model.safetensors" in uploads[0]
    assert not [name for name in uploads[0] if "checkpoint-" in name or "optimizer" in name]
    trainer.state.global_step += 1  # trained further
    trainer.push_to_hub()
    assert len(uploads) == 2 and len(saves) == 2


LIMITED = """
import resource, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_checkpoints import trainer_of
from transformers import TrainerCallback
class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
trainer = trainer_of(Path({folder!r}), save_steps=1, max_steps=3)
trainer.add_callback(Limit())
trainer.train()
"""


@pytest.mark.parametrize("limit", [pytest.param(100, marks=pytest.mark.slow), 200_000])
def test_a_file_that_cannot_be_written_leaves_the_checkpoint_before(tmp_path, limit):
    """A limit on file sizes, which tokenizer, weights or optimizer states meet, in place of a full disk."""
    folder = tmp_path / "out"
    program = LIMITED.format(paths=[str(ROOT), str(ROOT / "tests")], limit=limit, folder=str(folder))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "checkpoint-2 could not be saved" in result.stderr
    assert f"the newest complete checkpoint is {folder / 'checkpoint-1'}" in result.stderr
    assert fault(folder / "checkpoint-1") is None
    assert not list(folder.rglob("checkpoint-2"))


FULL = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_checkpoints import trainer_of
from finetune.checkpoints import fault
folder = Path({folder!r})
try:
    trainer_of(folder / "out", save_steps=1, max_steps=3).train()
finally:
    left = sorted(path.name for path in (folder / "out").glob("**/checkpoint-*"))
    sys.stderr.write(f"left {{left}} {{fault(folder / 'out' / 'checkpoint-1')}}\\n")
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A disk of 12 MiB; a checkpoint has 8."""
    disk = tmp_path / "disk"
    disk.mkdir()
    program = tmp_path / "program.py"
    program.write_text(FULL.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(disk)))
    command = f"mount -t tmpfs -o size=12m none {disk} && exec {sys.executable} {program}"
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    result = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "checkpoint-2 could not be saved" in result.stderr, result.stderr[-3000:]
    assert "left ['checkpoint-1'] None" in result.stderr


@pytest.mark.parametrize(
    ("stage", "processes", "message"),
    [
        (None, 2, None),
        (None, 1, None),  # with other random numbers, which is said
        (2, 2, "was saved without DeepSpeed, and this run goes on with ZeRO-1/2"),
    ],
)
def test_a_plain_checkpoint_is_one_of_such_a_run(tmp_path, stage, processes, message, caplog):
    check_resuming(tmp_path, ["optimizer.pt"], stage, processes, message)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "seed": 1}
    record = {"resolved": {"processes": 2, "train_samples": 9}, "arguments": {"training": settings}}
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(record))
    args = SimpleNamespace(**{**settings, "gradient_accumulation_steps": 8 // processes}, world_size=processes)
    _compare_steps(str(tmp_path), args, 9)
    assert ("processes were 2, now 1" in caplog.text) == (processes == 1)
    caplog.clear()
    _compare_steps(str(tmp_path), args, 10)
    assert "samples were 9, now 10" in caplog.text


@pytest.mark.parametrize(
    ("stage", "processes", "message"),
    [
        (2, 2, None),
        (1, 2, None),
        (3, 2, "was saved with ZeRO-1/2, and this run goes on with ZeRO-3"),
        (None, 2, "goes on without DeepSpeed"),
        (2, 4, "was saved by 2 processes with ZeRO-1/2, and this run has 4"),
    ],
)
def test_a_partitioned_checkpoint_is_one_of_such_a_run(tmp_path, stage, processes, message):
    names = [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    check_resuming(tmp_path, names, stage, processes, message)


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(tmp_path):
    check_resuming(tmp_path, ["model.safetensors"], None, 2, "holds no state of the optimizer")


def check_resuming(folder: Path, files: list[str], stage: int | None, processes: int, message: str | None) -> None:
    """What a run says that is to go on from these files, which two processes saved."""
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / SETTINGS_NAME).write_text(json.dumps({"resolved": {"processes": 2}}))
    deepspeed = None if stage is None else {"zero_optimization": {"stage": stage}}
    problems = _resume_problems(str(folder), SimpleNamespace(deepspeed=deepspeed, world_size=processes))
    assert len(problems) == (message is not None) and all(message in problem for problem in problems)
