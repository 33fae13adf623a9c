"""No code in a checkpoint or data file is executed, pictures stay in their folder, no run asks the network."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, launch, losses
from PIL import Image

from finetune import inspect_data
from finetune.checkpoints import MANIFEST
from finetune.checks import find_problems
from finetune.data_files import load_samples
from finetune.dataset import SampleError, SupervisedDataset
from finetune.errors import UserError
from finetune.finetune import train
from finetune.loading import EXTRA_WEIGHTS_NAME, load_finetuned
from finetune.safe_files import code_in, no_code_from_files

POISONED = (
    "rng_state.pth",
    "rng_state_1.pth",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "training_args.bin",
    "pytorch_model.bin",
    "adapter_model.bin",
    EXTRA_WEIGHTS_NAME,
    "global_step2/mp_rank_00_model_states.pt",
    "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
    "pytorch_model_fsdp_0/.metadata",
)


class Payload:
    """When unpickled, runs a command that leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def as_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def as_old_torch(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content: object, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file)


def as_torch_of_new_protocol(content: object, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


KINDS = (as_torch, as_old_torch, as_pickle, as_torch_of_new_protocol)


def flags(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    """Of a short run on one process."""
    words = ("--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--report_to", "none")
    short = ("--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--dataloader_num_workers", 0)
    return [str(word) for word in (*words, *short, *more)]


LORA = ("--use_lora", "true", "--lora_r", 4)


@pytest.fixture(scope="module")
def lora_run(tiny, data_file, tmp_path_factory) -> Path:
    """Output of a LoRA run of 4 steps, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("lora_run")
    train(flags(tiny["llama3"], data_file, folder, *LORA))
    return folder


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that a payload leaves; it must not be there at the end."""
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("save", KINDS)
def test_a_payload_would_run(save, tmp_path):
    """What the other tests refuse does run where nothing refuses it."""
    save({"a": Payload(tmp_path / "run")}, tmp_path / "file.pt")
    if save is as_pickle:
        with (tmp_path / "file.pt").open("rb") as file:
            pickle.load(file)
    else:
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("name", POISONED)
def test_resume_refuses_code_in_any_file(name, lora_run, tiny, data_file, tmp_path, marker):
    """In one message that names the file and what it would have called, before anything of the checkpoint is loaded."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(lora_run / "checkpoint-2", checkpoint)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    with (checkpoint / name).open("wb") as file:
        torch.save({"state": Payload(marker)}, file)
    (checkpoint / MANIFEST).unlink()  # who poisons a file would not leave its old size there
    call = flags(tiny["llama3"], data_file, tmp_path / "out", *LORA, "--resume_from_checkpoint", checkpoint)
    with pytest.raises(UserError) as caught:
        train(call)
    (line,) = [line for line in str(caught.value).splitlines() if str(checkpoint / name) in line]
    assert "would run code" in line and "system" in line


@pytest.mark.parametrize("save", KINDS)
def test_code_is_found_however_it_was_pickled(save, tmp_path, marker):
    save([torch.ones(2), Payload(marker)], tmp_path / "a.pt")
    save({"weights": torch.ones(2)}, tmp_path / "b.pt")
    problems = code_in(tmp_path)
    assert str(tmp_path / "a.pt") in problems[0]
    # Plain pickles and those of newer protocols are nothing that torch.load(weights_only=True) reads.
    assert len(problems) == (1 if save in (as_torch, as_old_torch) else 2)


def test_unreadable_files_are_named(tmp_path):
    torch.save(torch.ones(1000), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (problem,) = code_in(tmp_path)
    assert str(tmp_path / "cut.pt") in problem and "damaged" in problem and "\n" not in problem


def deepspeed_state() -> dict:
    """The classes that DeepSpeed's checkpoints hold, in float16 runs too."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    dynamic = DynamicLossScaler(2**16, 1000, 1, 2, False)
    return {
        "loss_scaler": [LossScaler(scale=8.0), dynamic],
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [{"a": fragment_address(numel=3, start=5)}],
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, 0.95)},
    }


def random_state() -> dict:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}


def test_what_checkpoints_hold_is_let_through(tmp_path, monkeypatch):
    """By the look at the files, and by DeepSpeed's own loader."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    torch.save({"optimizer_state_dict": deepspeed_state()}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(random_state(), tmp_path / "rng_state_0.pth")
    assert code_in(tmp_path) == []
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # PyTorch takes one of the two variables only
    before = dict(os.environ)
    with no_code_from_files(deepspeed=True):
        loaded = TorchCheckpointEngine().load(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert dict(os.environ) == before
    state = loaded["optimizer_state_dict"]
    assert [scaler.cur_scale for scaler in state["loss_scaler"]] == [8.0, 2**16]
    assert state["zero_stage"] == 2 and state["param_slice_mappings"][0]["a"].start == 5


def test_deepspeeds_loader_refuses_code(tmp_path, marker):
    """By itself, had nobody looked at the file before."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    torch.save({"module": Payload(marker)}, tmp_path / "mp_rank_00_model_states.pt")
    with no_code_from_files(deepspeed=True), pytest.raises(pickle.UnpicklingError):
        TorchCheckpointEngine().load(tmp_path / "mp_rank_00_model_states.pt")


def test_all_of_training_refuses_code(tiny, data_file, tmp_path, marker, monkeypatch):
    torch.save(Payload(marker), tmp_path / "state.pt")
    load = lambda *a, **k: torch.load(tmp_path / "state.pt", weights_only=False)  # noqa: E731
    monkeypatch.setattr(transformers.Trainer, "train", load)
    with pytest.raises(pickle.UnpicklingError):
        train(flags(tiny["llama3"], data_file, tmp_path / "out", *LORA))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_weights_are_written_without_pickles_of_objects(lora_run):
    """safetensors, and one .pt of plain tensors; the arguments, which nothing reads, are Trainer's pickle."""
    for folder in (lora_run, lora_run / "checkpoint-4"):
        pickled = {path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
        states = {"optimizer.pt", "scheduler.pt", "rng_state.pth"} if folder.name == "checkpoint-4" else set()
        assert pickled == {"training_args.bin", EXTRA_WEIGHTS_NAME} | states
        assert (folder / "adapter_model.safetensors").is_file() and code_in(folder) == []
        tensors = torch.load(folder / EXTRA_WEIGHTS_NAME, weights_only=True)
        assert all(type(tensor) is torch.Tensor for tensor in tensors.values())


def test_full_runs_write_safetensors(tiny, data_file, tmp_path):
    train(flags(tiny["minicpm"], data_file, tmp_path, "--max_steps", 2, "--save_only_model", "true"))
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert (folder / "model.safetensors").is_file()
        assert [path.name for path in folder.glob("*.[bp][it]*")] == ["training_args.bin"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_poisoned_base_weights(name, tiny, data_file, tmp_path, marker):
    model = shutil.copytree(tiny["llama3"], tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"llm.lm_head.weight": Payload(marker)}, model / name)
    with pytest.raises(UserError, match=f"{name}: would run code"):
        train(flags(model, data_file, tmp_path / "out", *LORA))
    with pytest.raises(ValueError, match=f"{name}: would run code"):
        load_finetuned(model)


@pytest.mark.parametrize("name", ["adapter_model.bin", EXTRA_WEIGHTS_NAME])
def test_poisoned_adapter(name, lora_run, tiny, data_file, tmp_path, marker):
    adapter = shutil.copytree(lora_run, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    if name == "adapter_model.bin":
        (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.llm.lm_head.weight": Payload(marker)}, adapter / name)
    with pytest.raises(UserError, match=f"{name}: would run code"):
        train(flags(tiny["llama3"], data_file, tmp_path / "out", *LORA, "--lora_weight_path", adapter))
    with pytest.raises(ValueError, match=f"{name}: would run code"):
        load_finetuned(adapter)


@pytest.fixture
def with_code(tiny, tmp_path, marker, monkeypatch):
    """Makes a copy of the tiny checkpoint with code in it, and entries of its JSON files changed."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run the code"))

    def make(**changes: dict) -> Path:
        model = shutil.copytree(tiny["llama3"], tmp_path / "with_code")
        (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
        for file, entries in changes.items():
            path = model / f"{file}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return model

    return make


def inspected(model: Path, data: Path, monkeypatch, *more: object) -> int:
    """Exit status of inspect_data.py."""
    words = ["--model_name_or_path", model, "--data_path", data, "--num_workers", 0, *more]
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        inspect_data.main()
    return caught.value.code


def test_another_models_code_is_not_executed(with_code, data_file, tmp_path, monkeypatch, capsys):
    auto_map = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    model = with_code(config={"model_type": "evil", "auto_map": auto_map})
    with pytest.raises(UserError, match="is a 'evil' model, expected 'minicpmv'"):
        train(flags(model, data_file, tmp_path / "out"))
    assert inspected(model, data_file, monkeypatch) == 2
    assert "is a 'evil' model, expected 'minicpmv'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="custom code"):
        load_finetuned(model, trust_remote_code=True)


def test_a_vision_tower_is_not_fetched(with_code, tiny, data_file, tmp_path):
    model = with_code(
        config={**json.loads((tiny["minicpm"] / "config.json").read_text()), "vision_encoder": "hf-hub:a/b"}
    )
    with pytest.raises(UserError, match="vision_encoder 'hf-hub:a/b': expected the name of one of timm's own models"):
        train(flags(model, data_file, tmp_path / "out"))


def test_our_models_code_is_ours(with_code, data_file, tmp_path):
    auto_map = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    model = with_code(
        config={"auto_map": auto_map}, tokenizer_config={"auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}}
    )
    train(flags(model, data_file, tmp_path / "out", *LORA, "--max_steps", 1, "--save_strategy", "no"))
    load_finetuned(model)
    load_finetuned(tmp_path / "out")


def test_a_tokenizers_code_is_not_executed(with_code, data_file, tmp_path, monkeypatch, capsys):
    model = with_code(
        tokenizer_config={"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    )
    expected = "expected tokenizer_class MiniCPMVTokenizer or MiniCPMVTokenizerFast in tokenizer_config.json"
    with pytest.raises(UserError, match=expected):
        train(flags(model, data_file, tmp_path / "out", *LORA))
    assert inspected(model, data_file, monkeypatch) == 2 and expected in capsys.readouterr().err
    with pytest.raises(ValueError, match=expected):
        load_finetuned(model)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_execute_nothing(suffix, tmp_path, marker):
    """Old versions of Arrow unpickled what a column's metadata held."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    schema = pa.schema([pa.field("id", pa.string(), metadata=extension)])
    table = pa.table([["a"]], schema=schema)
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(table)
    try:
        assert load_samples(path)[0] == {"id": "a"}
    except ValueError as error:
        assert str(path) in str(error)


@pytest.fixture
def leading_out(tmp_path) -> tuple[Path, Path]:
    """(data file, picture folder): samples `in`, `link in`, and others whose pictures lie outside the folder. Pictures
    outside are pipes, which nobody could open without waiting."""
    folder, outside = tmp_path / "pictures", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    Image.new("RGB", (112, 112), "red").save(folder / "a.png")
    os.mkfifo(outside / "b.png")
    os.mkfifo(tmp_path / "pictures_b.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "link.png").symlink_to(outside / "b.png")
    (folder / "out").symlink_to(outside)
    pictures = {
        "in": "a.png",
        "dots in": "sub/../a.png",
        "absolute in": str(folder / "a.png"),
        "link in": "inner.png",
        "dots": "../outside/b.png",
        "dots from a folder": "sub/../../outside/b.png",
        "absolute": str(outside / "b.png"),
        "link": "link.png",
        "folder link": "out/b.png",
        "same beginning": str(tmp_path / "pictures_b.png"),
        "list": ["a.png", "link.png"],
        "named": {"<image_00>": "../outside/b.png"},
        "missing": "../outside/none.png",
    }
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A picture."}]
    samples = [{"id": name, "image": image, "conversations": turns} for name, image in pictures.items()]
    samples[-2]["conversations"] = [{**turns[0], "content": "<image_00>"}, turns[1]]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    return tmp_path / "train.json", folder


INSIDE = ["in", "dots in", "absolute in", "link in"]


def test_pictures_stay_in_their_folder(leading_out, tiny, tmp_path, monkeypatch, capsys):
    data, folder = leading_out
    only = ("--image_folder", folder, "--image_folder_only", "true")
    with pytest.raises(UserError) as caught:
        train(flags(tiny["llama3"], data, tmp_path / "out", *only))
    lines = str(caught.value).splitlines()[1:]
    identities = [sample["id"] for sample in json.loads(data.read_text())]
    assert len(lines) == len(identities) - len(INSIDE) and all("lies outside --image_folder" in line for line in lines)
    assert not any(f"(id {name!r})" in line for name in INSIDE for line in lines)
    more = ("--bad_samples", "skip", "--max_bad_fraction", 1, "--max_steps", 1, "--save_strategy", "no")
    train(flags(tiny["llama3"], data, tmp_path / "out", *only, *LORA, *more))
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in bad] == [name for name in identities if name not in INSIDE]
    assert inspected(tiny["llama3"], data, monkeypatch, *only) == 1
    assert capsys.readouterr().out.count("lies outside --image_folder") == len(bad)


def test_no_item_is_made_of_a_picture_outside(leading_out, tiny):
    data, folder = leading_out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["llama3"])
    config = transformers.AutoConfig.from_pretrained(tiny["llama3"])
    confined = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(data), None, folder, True)
    for index, sample in enumerate(json.loads(data.read_text())):
        if sample["id"] in INSIDE:
            assert len(confined[index]["pixel_values"]) == 1
        else:
            with pytest.raises(SampleError, match=r"lies outside --image_folder .* --image_folder_only is set"):
                confined[index]
    free = SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(data), None, folder)
    assert not any("lies outside" in problem.cause for problem in find_problems(free))


def test_image_folder_only_needs_the_folder(tiny, data_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="--image_folder_only true needs --image_folder"):
        train(flags(tiny["llama3"], data_file, tmp_path, "--image_folder_only", "true"))
    assert inspected(tiny["llama3"], data_file, monkeypatch, "--image_folder_only") == 2
    assert "--image_folder_only true needs --image_folder" in capsys.readouterr().err


# Read by Python when it starts, from PYTHONPATH: connections to other machines and questions for their addresses fail,
# and are written down. The machine's own name is none of them.
NO_NETWORK = """
import os, socket
here = {"localhost", "", None, socket.gethostname(), socket.getfqdn()}
def refuse(name, plain):
    def call(*arguments, **further):
        target = arguments[1] if name.startswith("connect") else arguments[0]
        host = target[0] if isinstance(target, tuple) else None if name.startswith("connect") else target
        host = host.decode() if isinstance(host, bytes) else host
        if host in here or host.startswith("127.") or host == "::1":
            return plain(*arguments, **further)
        with open(os.environ["NETWORK_RECORD"], "a") as record:
            record.write(f"{name} {target}\\n")
        raise OSError(f"no network: {name} {target}")
    return call
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, refuse(name, getattr(socket.socket, name)))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, refuse(name, getattr(socket, name)))
"""
EVERYTHING = """
import os, sys
sys.path.insert(0, {root!r})
import transformers
from finetune import inspect_data
from finetune.finetune import train
from finetune.loading import load_finetuned
lora, full = sys.argv[1].split(), sys.argv[2].split()
train(lora)
train(full)
for call in (lora, full):
    load_finetuned(call[call.index("--output_dir") + 1])
sys.argv[1:] = lora[:4]
try:
    inspect_data.main()
except SystemExit as end:
    assert end.code == 0
"""


@pytest.fixture
def no_network(tmp_path) -> dict[str, str]:
    """Environment in which Python reaches no other machine; `NETWORK_RECORD` is the file of attempts."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_NETWORK)
    (tmp_path / "record").touch()
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**online, "PYTHONPATH": str(tmp_path / "hook"), "NETWORK_RECORD": str(tmp_path / "record")}


def test_the_hook_sees_the_network(no_network):
    program = """
import huggingface_hub, socket
for call in (lambda: huggingface_hub.model_info("a/b"), lambda: socket.socket().connect(("203.0.113.1", 80))):
    try:
        call()
    except Exception:
        continue
    raise SystemExit("connected")
"""
    subprocess.run([sys.executable, "-c", program], env=no_network, check=True)
    attempts = Path(no_network["NETWORK_RECORD"]).read_text()
    assert "getaddrinfo huggingface.co" in attempts and "connect ('203.0.113.1', 80)" in attempts


def test_nothing_asks_the_network(tiny, data_file, tmp_path, no_network):
    """A LoRA run, a full run, loading both results, and inspect_data.py, on local files, with HF_HUB_OFFLINE unset."""
    short = ("--max_steps", 2)
    lora = flags(tiny["llama3"], data_file, tmp_path / "lora", *LORA, *short)
    full = flags(tiny["minicpm"], data_file, tmp_path / "full", *short)
    program = EVERYTHING.format(root=str(ROOT))
    command = [sys.executable, "-c", program, " ".join(lora), " ".join(full)]
    result = subprocess.run(command, env=no_network, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert Path(no_network["NETWORK_RECORD"]).read_text() == ""


def launched(folder: Path, tiny, data_file: Path, deepspeed: Path | str, *more: object, **further):
    """4 steps through the LoRA launcher on two processes, with a checkpoint at 2."""
    return launch(
        "finetune_lora.sh",
        *("--batch_size", 2, "--max_steps", 4, "--logging_steps", 1, "--lora_r", 4, "--dataloader_num_workers", 0),
        *("--lora_dropout", 0, "--report_to", "none", "--lr_scheduler_type", "constant", "--warmup_ratio", 0, *more),
        MODEL=tiny["llama3"],
        DATA=data_file,
        OUTPUT_DIR=folder,
        GPUS_PER_NODE=2,
        SAVE_STEPS=2,
        DS_CONFIG=deepspeed,
        **further,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_resumes_from_good_checkpoints_only(stage, tiny, data_file, tmp_path, marker, no_network):
    """Without the network, in the same steps as the unbroken run; one line names a file that code lies in."""
    config = json.loads((ROOT / "finetune" / f"ds_config_zero{max(stage, 2)}.json").read_text())
    config["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(config))
    offline = {name: no_network[name] for name in ("PYTHONPATH", "NETWORK_RECORD")}
    folder = tmp_path / "out"
    launched(folder, tiny, data_file, tmp_path / "ds.json", **offline)
    unbroken = losses(folder)
    shutil.rmtree(folder / "checkpoint-4")
    launched(folder, tiny, data_file, tmp_path / "ds.json", "--resume_from_checkpoint", "true", **offline)
    assert losses(folder) == pytest.approx(unbroken, rel=1e-5)
    assert Path(no_network["NETWORK_RECORD"]).read_text() == ""
    shutil.rmtree(folder / "checkpoint-4")
    state = next((folder / "checkpoint-2").glob("global_step2/*rank_1*optim_states.pt"))
    torch.save({"optimizer_state_dict": Payload(marker)}, state)
    (folder / "checkpoint-2" / MANIFEST).unlink()
    resume = ("--resume_from_checkpoint", folder / "checkpoint-2")
    result = launched(folder, tiny, data_file, tmp_path / "ds.json", *resume, check=False)
    assert result.returncode != 0 and result.stderr.count(f"{state}: would run code") == 1


def test_other_kinds_of_adapters_fetch_nothing(tiny, data_file, lora_run, tmp_path):
    """Some of PEFT's have their configuration name a tokenizer or an adapter on the hub."""
    adapter = shutil.copytree(lora_run, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT"}
    file.write_text(json.dumps({**config, "tokenizer_name_or_path": "somebody/else", "prompt_tuning_init_text": "a"}))
    with pytest.raises(UserError, match="peft_type is 'PROMPT_TUNING', expected LORA"):
        train(flags(tiny["llama3"], data_file, tmp_path / "out", *LORA, "--lora_weight_path", adapter))
    with pytest.raises(ValueError, match="peft_type is 'PROMPT_TUNING', expected LORA"):
        load_finetuned(adapter, tiny["llama3"])


def test_kernels_that_a_checkpoint_names_are_not_fetched(tiny, tmp_path):
    model = shutil.copytree(tiny["llama3"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for fields in (config, config["vision_config"]):
        fields["attn_implementation"] = fields["_attn_implementation"] = "somebody/kernels"
    (model / "config.json").write_text(json.dumps(config))
    loaded, _ = load_finetuned(model)
    assert loaded.config._attn_implementation == loaded.vpm.config._attn_implementation == "sdpa"
    eager, _ = load_finetuned(model, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
