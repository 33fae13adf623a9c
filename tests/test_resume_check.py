"""A checkpoint that a run cannot go on from is told before weights load, with the flags that are the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PATIENCE, ROOT, launch, losses, outcome
from safetensors.torch import load_file, save_file

from finetune import finetune
from finetune.minicpmv import MiniCPMV

LORA = "--use_lora true --lora_r 4 --lora_target_modules q_proj --tune_vision false"
RUN = "--report_to none --dataloader_num_workers 0 --logging_steps 1 --save_steps 1 --save_total_limit 1"
RESUME = "--resume_from_checkpoint true --max_steps 2"


@pytest.fixture(scope="module")
def runs(tiny, data_file, tmp_path_factory) -> dict[str, Path]:
    """A run of one step with LoRA, and one of all parameters, each with its checkpoint."""
    folders = {}
    for name, flags in {"lora": LORA, "full": "", "sgd": "--optim sgd --vision_learning_rate 1e-6"}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        base = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folders[name])
        finetune.train([*map(str, base), *RUN.split(), "--max_steps", "1", *flags.split()])
    return folders


@pytest.fixture
def resume(tiny, data_file, monkeypatch, capsys) -> Callable[[Path, str], list[str]]:
    """What a run says that is to go on in a folder with these flags, and must not load weights."""
    monkeypatch.setattr(MiniCPMV, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))

    def call(folder: Path, flags: str) -> list[str]:
        base = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder]
        words = [*base, *RUN.split(), *RESUME.split(), *flags.format(**tiny).split()]
        status, lines = outcome(finetune.train, words, capsys)
        assert status == 1 and "These settings cannot work:" in lines, lines
        return lines[lines.index("These settings cannot work:") + 1 :]

    return call


CASES = [
    ("lora", LORA.replace("lora_r 4", "lora_r 8"), "it was saved with --lora_r 4, and this run has --lora_r 8"),
    ("lora", LORA.replace("q_proj", "v_proj"), "with --lora_target_modules q_proj, and this run has --lora_target_"),
    ("lora", f"{LORA} --lora_bias all", "with --lora_bias none, and this run has --lora_bias all"),
    ("lora", f"{LORA} --lora_modules_to_save resampler", "no --lora_modules_to_save, and this run has --lora_modules"),
    ("lora", f"{LORA} --lora_alpha 8", "was trained with --lora_alpha 64, and this run has 8"),
    ("lora", f"{LORA} --tune_vision true", "with --tune_vision false, and this run has --tune_vision true"),
    ("lora", f"{LORA} --tune_embed_tokens false", "--tune_embed_tokens true, and this run has --tune_embed_tokens f"),
    ("lora", f"{LORA} --tune_resampler false", "with --tune_resampler true, and this run has --tune_resampler false"),
    ("lora", f"{LORA} --optim adafactor", "with --optim adamw_torch_fused, and this run has --optim adafactor"),
    ("lora", f"{LORA} --model_name_or_path {{minicpm}}", "this run has --model_name_or_path "),
    ("lora", "", "saved by a run with LoRA, and this run trains without it: give --use_lora true"),
    ("full", LORA, "saved by a run without LoRA, and this run trains with it: give --use_lora false"),
    ("full", "--tune_llm false", "with --tune_llm true, and this run has --tune_llm false"),
    ("full", "--optim sgd", "holds the state of another optimizer than --optim sgd"),
    ("full", "--model_name_or_path {minicpm}", "this run has --model_name_or_path "),
    ("full", "--vision_learning_rate 1e-6", "with no --vision_learning_rate, and this run has --vision_learning_rate"),
    ("sgd", "--vision_learning_rate 1e-6", "with --optim sgd, and this run has --optim adamw_torch_fused"),
    ("sgd", "--optim sgd", "with --vision_learning_rate 1e-06, and this run has no --vision_learning_rate"),
]


@pytest.mark.parametrize(("run", "flags", "said"), CASES)
def test_flags_of_another_run(runs, resume, run, flags, said):
    lines = resume(runs[run], flags)
    assert len(lines) == 1 and said in lines[0] and "checkpoint-1: " in lines[0], lines


@pytest.mark.parametrize(("run", "flags"), [case[:2] for case in CASES])
def test_checkpoints_without_recorded_settings(runs, resume, tmp_path, run, flags):
    """Of earlier versions: what they hold is compared all the same."""
    shutil.copytree(runs[run] / "checkpoint-1", tmp_path / "checkpoint-1")
    for name in ("training_settings.json", "complete.json"):
        (tmp_path / "checkpoint-1" / name).unlink()
    assert "checkpoint-1: " in resume(tmp_path, flags)[0]


def test_another_base_of_the_same_kind(runs, resume, tiny, tmp_path):
    model = shutil.copytree(tiny["llama3"], tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    [line] = resume(runs["lora"], f"{LORA} --model_name_or_path {model}")
    assert "is not the base that the adapter was trained on" in line


@pytest.mark.parametrize("flags", [LORA, LORA.replace("q_proj", r"llm\..*q_proj")])
def test_the_same_in_other_words_goes_on(runs, tiny, data_file, tmp_path, flags):
    folder = shutil.copytree(runs["lora"], tmp_path / "run")
    base = ("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder)
    finetune.train([*map(str, base), *RUN.split(), *RESUME.split(), *flags.split(), "--optim", "adamw_torch"])
    assert len(losses(folder)) == 2


class Packed(torch.optim.Adam):
    """Saves its state in a form of its own, as the optimizers of bitsandbytes do."""

    __module__ = "another_package.optim"

    def state_dict(self) -> dict:
        saved = super().state_dict()
        return {**saved, "state": {number: {"packed": kept} for number, kept in saved["state"].items()}}

    def load_state_dict(self, saved: dict) -> None:
        super().load_state_dict({**saved, "state": {number: kept["packed"] for number, kept in saved["state"].items()}})


def test_an_optimizer_of_another_package_goes_on(tiny, data_file, tmp_path, monkeypatch, capsys):
    def made(args: transformers.TrainingArguments, *_) -> tuple:
        return Packed, {"lr": args.learning_rate}

    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(made))
    base = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", tmp_path]
    words = [str(word) for word in (*base, *RUN.split(), *LORA.split())]
    finetune.train([*words, "--max_steps", "1"])
    finetune.train([*words, *RESUME.split()])
    assert len(losses(tmp_path)) == 2
    status, lines = outcome(finetune.train, [*words, *RESUME.split(), "--optim", "sgd"], capsys)
    assert status == 1 and "holds the state of --optim adamw_torch_fused: it was saved with --optim" in lines[-1]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed(runs, resume, tmp_path, stage):
    """Laid out as DeepSpeed 0.19.8 does; `test_runs_of_deepspeed` makes real ones."""
    folder = shutil.copytree(runs["lora"], tmp_path / "run") / "checkpoint-1"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    state, groups = saved["state"], saved["param_groups"]
    shapes = [{f"of {n}": state[n]["exp_avg"].shape for n in group["params"]} for group in groups]
    inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    (folder / "global_step1").mkdir()
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save({"param_shapes": shapes}, folder / "global_step1" / f"{prefix}mp_rank_00_model_states.pt")
    optimizer = {"optimizer_state_dict": {inner: saved}}
    torch.save(optimizer, folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "optimizer.pt").unlink()
    (folder / "complete.json").unlink()
    file = ROOT / "finetune" / f"ds_config_zero{stage}.json"
    lines = resume(tmp_path / "run", f"{LORA} --deepspeed {file} --optim adafactor")
    assert "was trained with other tensors than this run's" in lines[0] and "of 0" in lines[0]
    assert "holds the state of another optimizer than --optim adafactor" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_runs_of_deepspeed(tiny, data_file, tmp_path, stage):
    variables = {"MODEL": tiny["llama3"], "DATA": data_file, "OUTPUT_DIR": tmp_path, "GPUS_PER_NODE": 1}
    variables["DS_CONFIG"] = ROOT / "finetune" / f"ds_config_zero{stage}.json"
    flags = (*RUN.split(), *LORA.split())
    launch("finetune_lora.sh", *flags, "--max_steps", "1", timeout=PATIENCE, **variables)
    for other, said in (
        ("--lora_r 8", "it was saved with --lora_r 4, and this run has --lora_r 8"),
        ("--tune_vision true", "it was saved with --tune_vision false, and this run has --tune_vision true"),
        ("--optim adafactor", "with --optim adamw_torch_fused, and this run has --optim adafactor"),
        ("--vision_learning_rate 1e-6 --tune_vision true", "with --tune_vision false"),
    ):
        words = (*flags, *RESUME.split(), *other.split())
        result = launch("finetune_lora.sh", *words, check=False, timeout=PATIENCE, **variables)
        assert result.returncode != 0 and "Traceback" not in result.stderr
        assert said in result.stderr, result.stderr[-3000:]
    launch("finetune_lora.sh", *flags, *RESUME.split(), timeout=PATIENCE, **variables)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
