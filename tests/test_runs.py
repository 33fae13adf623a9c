"""Training through the launchers, as a user starts it: what is trained, what is saved, what loads again.

Each run is made once and looked at by several tests; a key names it: (llm_type, lora or full, processes, DeepSpeed).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLM_TYPES, ROOT, launch, losses, same_tensors
from peft import AutoPeftModelForCausalLM
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, TrainingArguments

from finetune.arguments import load_config, parse_arguments
from finetune.dataset import SupervisedDataset, build_transform, data_collator, load_samples
from finetune.finetune import prepare_trainable
from finetune.finetune import train as finetune
from finetune.loading import EXTRA_WEIGHTS_NAME, load_finetuned
from finetune.minicpmv import MiniCPMV
from finetune.places import checkpoint_bytes
from finetune.sample_task import readme_snippet
from finetune.trainer import CPMTrainer

STEPS = 4
RUNS = {
    "lora-llama3-1-plain": ("llama3", "lora", 1, ""),
    "lora-llama3-2-plain": ("llama3", "lora", 2, ""),
    "lora-llama3-1-zero2": ("llama3", "lora", 1, "ds_config_zero2.json"),
    "lora-llama3-2-zero2": ("llama3", "lora", 2, "ds_config_zero2.json"),
    "lora-llama3-2-zero3": ("llama3", "lora", 2, "ds_config_zero3.json"),
    "lora-minicpm-1-zero2": ("minicpm", "lora", 1, "ds_config_zero2.json"),
    "lora-llama3-1-zero0": ("llama3", "lora", 1, "ds_config_zero0.json"),
    "lora-minicpm-2-zero3": ("minicpm", "lora", 2, "ds_config_zero3_offload.json"),
    "full-llama3-2-zero3": ("llama3", "full", 2, "ds_config_zero3.json"),
    "full-llama3-1-plain": ("llama3", "full", 1, ""),
    "full-minicpm-2-zero2": ("minicpm", "full", 2, "ds_config_zero2_offload.json"),
    "full-minicpm-2-zero3": ("minicpm", "full", 2, "ds_config_zero3.json"),
}


def train(name: str, folder: Path, tiny: dict[str, Path], data_file: Path, *flags: object, **variables: object) -> None:
    """The run of this name, into `folder`."""
    llm_type, method, processes, deepspeed = RUNS[name]
    if deepspeed == "ds_config_zero0.json":  # a user's own file
        own = json.loads((ROOT / "finetune" / "ds_config_zero2.json").read_text())
        deepspeed = folder.parent / deepspeed
        deepspeed.write_text(json.dumps({**own, "zero_optimization": {"stage": 0}}))
    launch(
        "finetune_lora.sh" if method == "lora" else "finetune_ds.sh",
        *("--batch_size", 4 // processes, "--max_steps", STEPS, "--logging_steps", 1, "--learning_rate", 1e-3),
        *("--lr_scheduler_type", "constant", "--warmup_ratio", 0, "--dataloader_num_workers", 0),
        *(("--lora_r", 8, "--lora_dropout", 0) if method == "lora" else ()),
        *flags,
        MODEL=tiny[llm_type],
        DATA=data_file,
        OUTPUT_DIR=folder,
        GPUS_PER_NODE=processes,
        DS_CONFIG=deepspeed,
        SAVE_STEPS=2,
        **variables,
    )


# Left to `pytest -m slow`, for the time they take: further corners of the same table. test_layouts.py trains with DDP
# and with these stages of ZeRO on two processes too.
SLOW = {
    "lora-llama3-1-zero2",
    "lora-llama3-2-plain",
    "lora-llama3-2-zero3",
    "lora-llama3-1-zero0",
    "lora-minicpm-1-zero2",
    "full-minicpm-2-zero3",
}


def named(*names: str) -> list:
    """Parameters of these runs, the slow ones marked."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.fixture(scope="session")
def run(tiny, data_file, tmp_path_factory):
    """Runs by name, made on first use: 4 steps of 4 samples over all processes, in float32, a checkpoint at step 2."""
    done = {}

    def make(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            evaluation = ("--eval_steps", STEPS, "--per_device_eval_batch_size", 5)
            train(name, done[name], tiny, data_file, *evaluation, EVAL_DATA=data_file)
        return done[name]

    return make


@pytest.fixture(params=named(*RUNS))
def each(request, run) -> tuple[Path, str, str]:
    """(folder, llm_type, method) of every run."""
    llm_type, method, _, _ = RUNS[request.param]
    return run(request.param), llm_type, method


def grad_norms(folder: Path) -> list[float]:
    """Gradient norms of a run, one for each logged step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["grad_norm"] for entry in history if "grad_norm" in entry]


def base_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def example(tokenizer) -> dict:
    return {"input_ids": torch.tensor([tokenizer("What colour is it? red")["input_ids"]])}


def test_files_and_history(each):
    folder, _, method = each
    names = {"tokenizer_config.json", "trainer_state.json", "training_settings.json", "loss.png"}
    if method == "lora":
        weights = {"adapter_config.json", "adapter_model.safetensors", EXTRA_WEIGHTS_NAME}
    else:
        weights = {"config.json", "model.safetensors", "modeling_minicpmv.py", "configuration_minicpm.py"}
    present = {file.name for file in folder.iterdir()}
    assert names | weights <= present
    assert not [name for name in present if name.endswith(".tmp")]
    for step in (2, 4):
        assert weights | {"training_settings.json", "trainer_state.json"} <= {
            file.name for file in (folder / f"checkpoint-{step}").iterdir()
        }
    assert len(losses(folder)) == STEPS and losses(folder)[-1] < losses(folder)[0]
    assert list(folder.glob("runs/*/events.out.tfevents*"))
    entry = next(e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in e)
    norm = set() if "zero0" in folder.name else {"grad_norm"}  # DeepSpeed reports none at stage 0 in float32
    assert norm | {"learning_rate"} <= set(entry)
    settings = json.loads((folder / "training_settings.json").read_text())
    assert settings["resolved"]["slicing"]["max_slice_nums"] == 9
    assert settings["arguments"]["training"]["max_steps"] == STEPS


def test_what_is_trained(each, tiny):
    folder, llm_type, method = each
    base = base_weights(tiny[llm_type])
    if method == "lora":
        adapter = load_file(folder / "adapter_model.safetensors")
        layers = {re.search(r"llm\.model\.layers\.\d+\.self_attn\.(\w+)", name)[1] for name in adapter}
        assert layers == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert all(".lora_" in name for name in adapter)
        assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
        extra = torch.load(folder / EXTRA_WEIGHTS_NAME, weights_only=True)
        extra = {name.removeprefix("base_model.model."): tensor for name, tensor in extra.items()}
        expected = {n for n in base if n.startswith(("vpm.", "resampler.")) and n != "resampler.pos_embed"}
        assert set(extra) == expected | {"llm.model.embed_tokens.weight"}
        unchanged = same_tensors(base, extra)
    else:
        trained = base_weights(folder)
        assert set(trained) == set(base)
        unchanged = [name for name in same_tensors(base, trained) if name != "resampler.pos_embed"]
    # Embedding rows of unseen tokens stay; whole tensors do not, but for key biases, whose gradient is zero.
    assert [name for name in unchanged if not name.endswith("k_proj.bias")] == []


def test_reloaded_model_is_the_trained_one(each, tiny):
    """Checkpoint folder and final folder, both taken after the last step, give the same logits."""
    folder, llm_type, method = each
    logits = []
    for place in (folder, folder / "checkpoint-4"):
        model, tokenizer = load_finetuned(place)
        logits.append(model(data=example(tokenizer)).logits)
    assert torch.equal(*logits)
    base = AutoModel.from_pretrained(tiny[llm_type])
    assert (logits[0] - base(data=example(tokenizer)).logits).abs().max() > 1e-3
    if method == "lora":
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"
        assert config["base_model_name_or_path"] == str(tiny[llm_type].resolve())


@pytest.mark.parametrize(
    "name",
    named(
        "lora-llama3-2-plain",
        "lora-llama3-1-zero2",
        "lora-llama3-2-zero2",
        "lora-llama3-2-zero3",
        "lora-llama3-1-zero0",
        "full-llama3-2-zero3",
    ),
)
def test_one_process_equals_two_and_every_zero_stage(name, run):
    """The global batch is the same: so are losses and gradient norms, step by step, and weights."""
    reference = run(f"{RUNS[name][1]}-llama3-1-plain")
    assert losses(run(name)) == pytest.approx(losses(reference), rel=2e-4)
    if "zero0" not in name:  # reports no norms
        assert grad_norms(run(name)) == pytest.approx(grad_norms(reference), rel=2e-3)
    if RUNS[name][1] == "lora":  # in full runs Adam turns key biases' rounding noise into steps of full size
        weights = load_file(reference / "adapter_model.safetensors")
        for key, tensor in load_file(run(name) / "adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, weights[key], atol=1e-3, rtol=0, msg=key)


def reloaded_eval_loss(folder: Path, data_file: Path, tmp_path: Path, batch: int) -> float:
    model, tokenizer = load_finetuned(folder)
    config = getattr(model, "base_model", model).config
    dataset = SupervisedDataset(
        load_samples(data_file),
        build_transform(),
        tokenizer,
        config.slicing,
        llm_type=config.llm_type,
        query_nums=config.query_num,
        batch_vision=config.llm_type == "llama3",
        image_folder=data_file.parent,
    )
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=batch, report_to="none", remove_unused_columns=False, use_cpu=True
    )
    trainer = CPMTrainer(model=model, args=arguments, eval_dataset=dataset, data_collator=data_collator)
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("name", named(*RUNS))
def test_a_checkpoint_takes_the_disk_that_is_estimated(name, run, tiny):
    """At least, and no more than small files beside."""
    folder = run(name) / "checkpoint-2"
    llm_type, method, _, deepspeed = RUNS[name]
    flags = ["--model_name_or_path", tiny[llm_type], "--output_dir", folder, "--report_to", "none"]
    flags += ["--use_lora", "true", "--lora_r", 8] if method == "lora" else []
    model_args, _, args, lora_args = parse_arguments(list(map(str, flags)))
    if deepspeed:
        stage = re.search(r"zero(\d)", deepspeed)[1]
        args.deepspeed = {"zero_optimization": {"stage": int(stage)}}
    with torch.device("meta"):
        model = prepare_trainable(MiniCPMV(load_config(model_args.model_name_or_path)), args, lora_args)
    estimated = sum(checkpoint_bytes(model, args, tiny[llm_type]))
    taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0.7 * taken < estimated < taken


@pytest.mark.parametrize("name", ["full-llama3-1-plain", "full-minicpm-2-zero2"])
def test_no_setting_of_the_model_changes(name, run, tiny):
    """Neither by the tokenizer's special tokens ("!", the pad token of 2.5) nor by what training needs."""
    for file in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / file).read_text()) for folder in (tiny[RUNS[name][0]], run(name)))
        assert after == before
        assert after["use_cache"] and after.get("pad_token_id") is None


@pytest.mark.parametrize("name", named(*RUNS))
def test_saved_logits_equal_those_of_the_running_model(name, run, data_file, tmp_path):
    """The evaluation loss after the last step, computed by the running model, is that of the reloaded one."""
    folder = run(name)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    running = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    # whatever the batch, and though two processes with five samples each have some to fill up at the end
    assert reloaded_eval_loss(folder, data_file, tmp_path, batch=7) == pytest.approx(running, rel=1e-6)


RESUMED = [pytest.param("lora-llama3-1-plain", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", [*RESUMED, *named("lora-llama3-2-zero3", "full-minicpm-2-zero2")])
def test_resume_equals_an_unbroken_run(name, run, tiny, data_file, tmp_path):
    """A run stopped after step 2 and continued takes the steps that the unbroken run took."""
    folder = tmp_path / "resumed"
    shutil.copytree(run(name), folder)
    shutil.rmtree(folder / "checkpoint-4")
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    train(name, folder, tiny, data_file, "--resume_from_checkpoint", "true")
    assert losses(folder) == pytest.approx(losses(run(name)), rel=1e-5)
    file = "adapter_model.safetensors" if RUNS[name][1] == "lora" else "model.safetensors"
    for key, tensor in load_file(folder / file).items():
        torch.testing.assert_close(tensor, load_file(run(name) / file)[key], atol=1e-6, rtol=1e-4, msg=key)


PATCHED = """
import os, sys
sys.path.insert(0, {root!r})
import finetune.finetune as toolkit
import finetune.guards
toolkit.GROUP_ELEMENTS = 30_000  # as 2.5 has groups of many sizes, and the tiny model one
if os.environ.get("NAN_STEP"):
    plain = toolkit.CPMTrainer.compute_loss
    def compute_loss(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == int(os.environ["NAN_STEP"]) else loss
    toolkit.CPMTrainer.compute_loss = compute_loss
    finetune.guards.Guard._hold_back = lambda *_: None  # the checkpoint of that step shows what it did to the weights
toolkit.main()
"""


def zero2_with_small_groups(
    folder: Path, tiny, data_file: Path, tmp_path: Path, *flags: object, **variables: str
) -> None:
    """4 steps with a checkpoint at 2, as the run `lora-llama3-1-zero2`, but in parameter groups of 30,000 elements."""
    program = tmp_path / "program.py"
    program.write_text(PATCHED.format(root=str(ROOT)))
    words = (
        *("--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", folder, "--batch_size", 4),
        *("--deepspeed", ROOT / "finetune" / "ds_config_zero2.json", "--max_steps", STEPS, "--learning_rate", 1e-3),
        *("--use_lora", "true", "--lora_r", 8, "--lora_dropout", 0, "--weight_decay", 0.1, "--adam_beta2", 0.95),
        *("--lr_scheduler_type", "constant", "--dataloader_num_workers", 0, "--report_to", "none"),
        *("--gradient_checkpointing", "true", "--save_steps", 2, "--logging_steps", 1, *flags),
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run([*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"


@pytest.mark.slow
def test_parameter_groups_are_those_of_the_checkpoint(run, tiny, data_file, tmp_path):
    """A limited size of groups changes no loss, is kept on resume, and is not forced on checkpoints from before it."""
    whole = run("lora-llama3-1-zero2")
    split, old = tmp_path / "split", tmp_path / "old"
    zero2_with_small_groups(split, tiny, data_file, tmp_path)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    shutil.copytree(whole, old)
    settings = old / "checkpoint-2" / "training_settings.json"
    stripped = json.loads(settings.read_text())
    assert stripped["resolved"].pop("param_group_elements") == 2**26
    settings.write_text(json.dumps(stripped))
    for folder in (split, old):
        shutil.rmtree(folder / "checkpoint-4")
        zero2_with_small_groups(folder, tiny, data_file, tmp_path, "--resume_from_checkpoint", "true")
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(tiny, data_file, tmp_path):
    """DeepSpeed leaves the weights as they were, told by the norm alone."""
    folder = tmp_path / "nan"
    zero2_with_small_groups(folder, tiny, data_file, tmp_path, "--logging_steps", 100, "--save_steps", 1, NAN_STEP="1")
    steps = [load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2, 3)]
    names = [name for name in steps[0] if "lora_B" in name]
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in names)
    assert all(not torch.equal(steps[1][name], steps[2][name]) and steps[2][name].isfinite().all() for name in names)


def test_adapter_snippet_of_the_readme(run, tmp_path):
    """The README's lines, verbatim, in a fresh process that starts at the repository root."""
    folder, picture = run("lora-llama3-2-zero2"), tmp_path / "picture.jpg"
    Image.new("RGB", (120, 80), "red").save(picture)
    program = readme_snippet(folder, picture)
    program += "\nassert msg.unexpected_keys == [], msg.unexpected_keys\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_adapter_snippet_without_the_toolkit(run, tmp_path):
    """The base carries its code: a process that never imports the toolkit loads the adapter too."""
    program = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM
folder = {str(run("lora-minicpm-2-zero3"))!r}
model = AutoPeftModelForCausalLM.from_pretrained(folder, device_map="auto", trust_remote_code=True).eval()
msg = model.load_state_dict(torch.load(f"{{folder}}/vpm_resampler_embedtokens.pt"), strict=False)
assert msg.unexpected_keys == [] and "finetune" not in sys.modules
torch.save(model(data={{"input_ids": torch.arange(9)[None]}}).logits, "logits.pt")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    model, _ = load_finetuned(run("lora-minicpm-2-zero3"))
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), model(data={"input_ids": torch.arange(9)[None]}).logits, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_full_checkpoint_answers(llm_type, run):
    folder = run("full-llama3-1-plain" if llm_type == "llama3" else "full-minicpm-2-zero2")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(
        model.chat(None, [{"role": "user", "content": "Say a colour."}], tokenizer, max_new_tokens=5), str
    )


def test_switches_and_continued_adapter(run, tiny, data_file, tmp_path):
    """--tune_vision false, --tune_embed_tokens false, --lora_modules_to_save, --lora_weight_path, --max_slice_nums."""
    first = run("lora-llama3-1-plain")
    launch(
        "finetune_lora.sh",
        *("--tune_vision", "false", "--tune_embed_tokens", "false", "--lora_weight_path", first),
        *("--max_slice_nums", 2, "--max_steps", 2, "--logging_steps", 1, "--dataloader_num_workers", 1),
        *("--evaluation_strategy", "steps", "--eval_steps", 2, "--logging_dir", tmp_path / "events", "--batch_size", 2),
        *("--learning_rate", 1e-3, "--save_strategy", "no"),
        MODEL=tiny["llama3"],
        DATA=data_file,
        EVAL_DATA=data_file,
        OUTPUT_DIR=tmp_path / "out",
        GPUS_PER_NODE=2,
        DS_CONFIG="ds_config_zero3.json",
        cwd=tmp_path,
    )
    assert list((tmp_path / "events").glob("events.out.tfevents*"))
    before = load_file(first / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(after) == set(before)
    assert all(0 < (after[name] - before[name]).abs().max() < 0.01 for name in after if "lora_B" in name)
    settings = json.loads((tmp_path / "out" / "training_settings.json").read_text())
    assert settings["resolved"]["slicing"]["max_slice_nums"] == 2
    # What the first run trained and this one kept frozen is in the new folder too: it is complete.
    extra = torch.load(tmp_path / "out" / EXTRA_WEIGHTS_NAME, weights_only=True)
    old = torch.load(first / EXTRA_WEIGHTS_NAME, weights_only=True)
    changed = set(extra) - set(same_tensors(extra, old))
    assert set(extra) == set(old) and {name.split(".")[2] for name in changed} == {"resampler"}
    model, _ = load_finetuned(tmp_path / "out")
    assert model.get_base_model().config.slicing["max_slice_nums"] == 2
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    running = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    assert reloaded_eval_loss(tmp_path / "out", data_file, tmp_path, batch=2) == pytest.approx(running, rel=1e-6)


def test_lora_modules_to_save_and_layers(tiny, data_file, tmp_path):
    finetune(
        f"--model_name_or_path {tiny['llama3']} --data_path {data_file} --output_dir {tmp_path} --use_lora true "
        "--lora_modules_to_save resampler --lora_target_modules q_proj,gate_proj --lora_bias all "
        "--lora_layers_to_transform 1 --lora_layers_pattern layers --tune_vision false --max_steps 1 "
        "--save_strategy no --report_to none".split()
    )
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    lora = [name for name in adapter if ".lora_" in name]
    assert all("layers.1." in name and ("q_proj" in name or "gate_proj" in name) for name in lora) and lora
    assert any("resampler.query" in name for name in adapter)
    extra = torch.load(tmp_path / EXTRA_WEIGHTS_NAME, weights_only=True)
    vision = [name for name in extra if ".vpm." in name]
    assert vision and all(name.endswith("bias") for name in vision)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert model.load_state_dict(extra, strict=False).unexpected_keys == []
    assert not [name for name in extra if "original_module" in name]


@pytest.fixture
def bad_data(data_file, tmp_path) -> list[Path]:
    """The samples of `data_file` in two files, with three among them that cannot be used."""
    samples = json.loads(data_file.read_text())
    damaged = bytearray((data_file.parent / "1.png").read_bytes())
    damaged[-20] ^= 0xFF  # in the pixels' checksum: the header is well
    (tmp_path / "damaged.png").write_bytes(damaged)
    samples.insert(2, {"id": "no answer", "conversations": samples[0]["conversations"][:1]})
    samples.insert(9, {**samples[0], "id": "no file", "image": str(tmp_path / "gone.png")})
    samples.insert(20, {**samples[0], "id": "damaged", "image": str(tmp_path / "damaged.png")})
    (tmp_path / "a.json").write_text(json.dumps(samples[:12]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples[12:]))
    return [tmp_path / "a.json", tmp_path / "b.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora-llama3-1-plain", "lora-llama3-2-zero2"])
def test_bad_samples_are_skipped(name, run, tiny, data_file, bad_data, tmp_path):
    """The run is the one over the good samples alone, on every process, and so is its resumption, though the missing
    file has come back meanwhile."""
    flags = ("--bad_samples", "skip", "--max_bad_fraction", 0.2, "--image_folder", data_file.parent)
    folder = tmp_path / "out"
    data = " ".join(map(str, bad_data))
    train(name, folder, tiny, data, *flags)
    assert losses(folder) == pytest.approx(losses(run(name)), rel=1e-5)
    record = (folder / "bad_samples.jsonl").read_text()
    assert [json.loads(line)["id"] for line in record.splitlines()] == ["no answer", "no file", "damaged"]
    assert [json.loads(line)["index"] for line in record.splitlines()] == [2, 9, 8]
    settings = json.loads((folder / "training_settings.json").read_text())["resolved"]
    assert settings["train_samples"] == 24 and settings["left_out"] == {"train": 3}

    shutil.rmtree(folder / "checkpoint-4")
    shutil.copy(data_file.parent / "0.png", tmp_path / "gone.png")
    train(name, folder, tiny, data, *flags, "--resume_from_checkpoint", "true")
    assert losses(folder) == pytest.approx(losses(run(name)), rel=1e-5)
    assert (folder / "bad_samples.jsonl").read_text() == record


def test_bad_samples_stop_every_process_with_one_message(tiny, data_file, bad_data, tmp_path):
    result = launch(
        "finetune_lora.sh",
        *("--image_folder", data_file.parent),
        check=False,
        MODEL=tiny["llama3"],
        DATA=f"{tmp_path}/*.json*",
        OUTPUT_DIR=tmp_path / "out",
        GPUS_PER_NODE=2,
        DS_CONFIG="",
    )
    assert result.returncode != 0
    assert result.stderr.count("These samples cannot be used") == 1
    assert f"{bad_data[0]}: sample 2 (id 'no answer')" in result.stderr
    assert f"{bad_data[0]}: sample 9 (id 'no file')" in result.stderr
    assert "ValueError" not in result.stderr
    assert not (tmp_path / "out" / "trainer_state.json").exists()
