"""Loading what finetuning wrote.

from finetune.loading import load_finetuned
model, tokenizer = load_finetuned("output/minicpmv_lora")
print(model.chat(image=picture, msgs=[{"role": "user", "content": "What is this?"}], tokenizer=tokenizer))
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.loading_report import LoadStateDictInfo

from finetune.minicpmv import MiniCPMV, MiniCPMVTokenizer, MiniCPMVTokenizerFast  # which also registers the models
from finetune.model_folder import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FILES,
    EXTRA_WEIGHTS_NAME,
    access_problem,
    adapter_misfit,
    adapter_problems,
    checkpoint_problems,
    content_problems,
    describe,
    missing_in_adapter,
    tokenizer_problems,
    unreadable,
    weight_files,
)
from finetune.places import at_home

SETTINGS_NAME = "training_settings.json"
# `tokenizer_class` of early copies, and the class that it stands for, where the name tells.
EARLY_TOKENIZERS = {
    "PreTrainedTokenizerFast": MiniCPMVTokenizerFast,
    "PreTrainedTokenizerFastWrapper": MiniCPMVTokenizerFast,
    "TokenizersBackend": MiniCPMVTokenizerFast,  # as transformers 5 calls the first
    "LlamaTokenizer": MiniCPMVTokenizer,
    "LlamaTokenizerFast": MiniCPMVTokenizer,
    "LlamaTokenizerWrapper": MiniCPMVTokenizer,
}
CHAT_TOKENS = {MiniCPMVTokenizerFast: ("<|eot_id|>",), MiniCPMVTokenizer: ("<用户>", "<AI>")}
MIB = 2**20
SAMPLED_TENSORS, SAMPLED_VALUES = 16, 8


def load_finetuned(
    folder: str | os.PathLike, base: str | os.PathLike | None = None, **kwargs
) -> tuple[nn.Module, object]:
    """Model in evaluation mode and tokenizer, from an adapter folder or a complete checkpoint.

    No code that lies in the folder, or in the base of an adapter, is executed.

    Args:
        base: base model of an adapter, where it is not (any more) in the place that `adapter_config.json` names.
        kwargs: for `from_pretrained`, such as `dtype` or `device_map` (default: "auto").

    Raises:
        ValueError: when an adapter folder lacks `vpm_resampler_embedtokens.pt`, does not fit the base model, or was
            trained on another one; when the base model is missing, or tensors of it are; when the model does not fit
            into the memory of the GPUs; when a file is damaged, or could not be loaded without executing what lies in
            it.
    """
    if why := access_problem(folder):
        raise ValueError(f"{folder}: {why}")
    is_adapter = os.path.lexists(Path(folder, ADAPTER_CONFIG_NAME))
    check_folders([folder] if is_adapter else [], None if is_adapter else folder)
    checkpoint = (base or base_of_adapter(folder)) if is_adapter else folder
    check_folders([], checkpoint)
    slices = trained_slices(folder) if is_adapter else None
    tokenizer = load_tokenizer(folder, kwargs.get("cache_dir"), checkpoint)
    model = load_base([folder] if is_adapter else [], checkpoint, **kwargs)
    if is_adapter:
        model = load_lora(model, folder)
        load_extra_tensors(model, folder)
        if slices is not None:  # the base's config knows nothing of how many the adapter was trained with
            model.get_base_model().config.set_max_slice_nums(slices)
    return model.eval(), tokenizer


def check_folders(adapters: Sequence[str | os.PathLike], checkpoint: str | os.PathLike | None = None) -> None:
    """Whether adapters and a checkpoint have all their files, each of them whole; of a name on the hub nothing is said.

    Raises:
        ValueError: with all that is wrong, one line each.
    """
    problems = [problem for folder in adapters for problem in adapter_problems(folder)]
    if checkpoint is not None and (access_problem(checkpoint) or Path(checkpoint).is_dir()):
        problems += checkpoint_problems(checkpoint)
    if problems:
        raise ValueError("\n".join(problems))


def load_checkpoint(path: str | os.PathLike, **kwargs) -> MiniCPMV:
    """The model of a checkpoint (a folder, or its name on the hub), all of it; arguments as in `load_finetuned`.

    Raises:
        ValueError: when tensors are missing, or have other shapes, which transformers would make up; when a file of
            weights is damaged, or the GPUs' memory is too small.
    """
    # Shapes are ours to refuse: transformers' own error advises to make up what does not fit.
    kwargs = {"device_map": "auto", **kwargs, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    try:
        model, found = AutoModel.from_pretrained(path, output_loading_info=True, **kwargs)
    except SafetensorError as error:  # does not say in which file
        folder = checkpoint_folder(path, kwargs.get("cache_dir"), kwargs.get("revision"), download=False)
        for file in weight_files(folder):
            describe(file)
        raise ValueError(f"{path}: its weights cannot be read ({error}); copy or download them anew") from error
    if other := sorted(found["mismatched_keys"]):
        shapes = [f"{name} has shape {tuple(shape)}, expected {tuple(wanted)}" for name, shape, wanted in other[:5]]
        raise ValueError(
            f"{path}: {len(other)} tensors in its weight files have other shapes than its config.json describes: "
            f"{'; '.join(shapes)}. Take both from the same checkpoint"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path}: {len(missing)} tensors of the model are missing in its weight files: {', '.join(missing[:5])}"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{path}: does not fit into the memory of the GPU(s), and a model that is partly outside cannot be used; "
            "load it in half precision (dtype), or on the CPU (device)"
        )
    return model


def load_base(adapters: Sequence[str | os.PathLike], base: str | os.PathLike, **kwargs) -> MiniCPMV:
    """`load_checkpoint` for the base of adapters (or for a checkpoint, with none).

    Raises:
        ValueError: also when an adapter was trained on another base or does not fit it, before anything is loaded where
            the base's files are here.
    """

    def check() -> None:
        hub = (kwargs.get("cache_dir"), kwargs.get("revision"))
        if problems := [p for adapter in adapters for p in other_base_problems(str(base), adapter, base, *hub)]:
            raise ValueError("\n".join(problems))

    if Path(base).is_dir():
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        problems = content_problems(str(base), base, config)
        if not problems:  # what an adapter fits can only be seen on a base that is whole
            problems = [why for adapter in adapters if (why := adapter_misfit(adapter, str(base), config))]
        if problems:
            raise ValueError("\n".join(problems))
    check()
    model = load_checkpoint(base, **kwargs)
    if not Path(base).is_dir():  # what was not here has been downloaded
        check()
    return model


def other_base_problems(
    where: str,
    adapter: str | os.PathLike,
    base: str | os.PathLike,
    cache_dir: str | None = None,
    revision: str | None = None,
) -> list[str]:
    """Whether a base is another than the one that an adapter was trained on, as far as `training_settings.json` tells,
    and where the base's files are here; values are compared, a sample of them.

    Args:
        where: the base, for the message.

    Raises:
        ValueError: when a file of the base, a folder, cannot be read, or the adapter's settings cannot.
    """
    recorded = recorded_weights(adapter)
    if not recorded:
        return []
    try:
        found = sample_weights(checkpoint_folder(base, cache_dir, revision, download=False))
    except (OSError, ValueError):
        if Path(base).is_dir():
            raise
        return []
    other = [name for name, values in recorded.items() if found and not _same(values, found.get(name))]
    if not other:
        return []
    return [
        f"{where}: is not the base that the adapter was trained on: {len(other)} of {len(recorded)} matrices that were "
        f"looked at have other values than {Path(adapter, SETTINGS_NAME)} records ({other[0]}); name the right one "
        "(--base DIR, or base= in Python)"
    ]


def _same(recorded: str, found: str | None) -> bool:
    """Whether values, with spaces, are the same but for the rounding of one of them to 16 bits."""
    if found is None or len(recorded.split()) != len(found.split()):
        return False
    left, right = (torch.tensor(list(map(float, values.split()))) for values in (recorded, found))
    return any(
        torch.equal(left.to(dtype).float(), right) or torch.equal(right.to(dtype).float(), left)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def base_of_adapter(folder: str | os.PathLike) -> str:
    """Folder of the base model of an adapter, or its name on the hub, as `adapter_config.json` has it.

    Raises:
        ValueError: when the file is damaged or of another kind, or there is no such folder.
    """
    path = Path(folder, ADAPTER_CONFIG_NAME)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no adapter configuration: {error}") from error
    if why := access_problem(base) if isinstance(base, str) else None:
        raise ValueError(f"{folder}: is an adapter for the base model {base}, which {why}")
    if kind != "LORA" or not isinstance(base, str):
        raise ValueError(f"{path}: expected peft_type LORA and base_model_name_or_path, found {kind} and {base!r}")
    if not Path(base).is_dir() and not is_hub_name(base):
        raise ValueError(
            f"{folder}: is an adapter for the base model {base}, where there is no folder (any more); say where the "
            "base model is now (--base DIR, or base= in Python)"
        )
    return base


def named_base(path: str | os.PathLike) -> str | None:
    """What an adapter names as its base, where this is one and says it; what is wrong with it is said elsewhere."""
    with suppress(OSError, ValueError):
        folder = Path(at_home(os.fspath(path)))
        return base_of_adapter(folder) if os.path.exists(folder / ADAPTER_CONFIG_NAME) else None
    return None


def is_hub_name(path: str) -> bool:
    """Whether this can be a name on the hub: owner/name."""
    return re.fullmatch(r"[^./~\\][^/\\]*/[^/\\]+", path) is not None


def load_lora(
    model: MiniCPMV | PeftModel,
    folder: str | os.PathLike,
    name: str = "default",
    trainable: bool = False,
    in_float32: bool = True,
) -> PeftModel:
    """Put the LoRA matrices of an adapter folder into a model, under a name: frozen and in evaluation mode, or to be
    trained on.

    Not by `PeftModel.from_pretrained`, which says nothing of matrices that the model has no place for, and only warns
    of those that are missing.

    Args:
        in_float32: matrices in half precision become float32.

    Raises:
        ValueError: when they are not those that the model needs, in name or shape, or their file is damaged.
    """
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = not trainable
    try:
        with warnings.catch_warnings():
            # PEFT (0.21) warns of names that are a part of "lora_", such as "a"; what it loads is looked at below.
            warnings.filterwarnings("ignore", message="Adapter name .* should not be contained in the prefix")
            if not isinstance(model, PeftModel):
                model = PeftModelForCausalLM(model, config, name, autocast_adapter_dtype=in_float32)
            found = model.load_adapter(  # to the CPU, and from there to where each layer is
                folder, name, torch_device="cpu", is_trainable=trainable, autocast_adapter_dtype=in_float32
            )
    except SafetensorError as error:
        raise unreadable(Path(folder, ADAPTER_FILES[0]), error) from error
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"{folder}: the adapter does not fit its base model: {' '.join(reason[:3])}") from error
    # PEFT (0.21) counts those of other adapters as missing where a name is a part of theirs, such as "a".
    own = re.compile(rf"\.(lora_\w+|modules_to_save)\.{re.escape(name)}(\.|$)")
    if strange := [*filter(own.search, found.missing_keys), *found.unexpected_keys]:
        raise ValueError(
            f"{folder}: the adapter does not fit its base model: {len(strange)} LoRA tensors are missing, or the model "
            f"has no place for them: {', '.join(strange[:5])}"
        )
    return model


def load_tokenizer(path: str | os.PathLike, cache_dir: str | None = None, base: str | os.PathLike | None = None):
    """The tokenizer of the checkpoint or adapter `path` (a folder, or its name on the hub); of an adapter folder that
    has none, its base's.

    Args:
        base: of an adapter, in place of what its `adapter_config.json` says.

    Raises:
        ValueError: when it is missing, damaged or of another kind, which may be code that lies in the checkpoint.
    """
    if Path(path, ADAPTER_CONFIG_NAME).is_file() and not Path(path, "tokenizer_config.json").is_file():
        path = base or base_of_adapter(path)
    if problems := tokenizer_problems(path):
        raise ValueError("\n".join(problems))
    expected = "expected tokenizer_class MiniCPMVTokenizer or MiniCPMVTokenizerFast in tokenizer_config.json"
    try:
        kind = tokenizer_kind(path, cache_dir)
        tokenizer = (kind or AutoTokenizer).from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
    except Exception as error:  # the libraries in Rust and C++ that read its files raise errors of many kinds
        raise ValueError(
            f"{path}: the tokenizer cannot be loaded: {' '.join(str(error).split())}; {expected}"
        ) from error
    if not isinstance(tokenizer, MiniCPMVTokenizer | MiniCPMVTokenizerFast):
        raise ValueError(f"{path}: has a tokenizer of another kind, read as {type(tokenizer).__name__}; {expected}")
    needed = [tokenizer.im_start, tokenizer.im_end, tokenizer.unk, *CHAT_TOKENS[kind]] if kind else []
    if lacking := [token for token in needed if token not in tokenizer.get_vocab()]:
        raise ValueError(f"{path}: has a tokenizer of another kind, which lacks {', '.join(lacking)}; {expected}")
    return tokenizer


def tokenizer_kind(
    path: str | os.PathLike, cache_dir: str | None = None
) -> type[MiniCPMVTokenizer] | type[MiniCPMVTokenizerFast] | None:
    """The class for the tokenizer of early copies of both checkpoints, whose `tokenizer_class` is one of transformers'
    own, or a wrapper of it that lay in their code, or not said; None where it is ours, or is none of these."""
    named = get_tokenizer_config(path, cache_dir=cache_dir).get("tokenizer_class")
    if named is not None and named not in EARLY_TOKENIZERS:
        return None
    with suppress(OSError, ValueError, AttributeError):  # an adapter's folder has no config.json
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
        return MiniCPMVTokenizerFast if config.llm_type == "llama3" else MiniCPMVTokenizer
    if named is not None:
        return EARLY_TOKENIZERS[named]
    if Path(path, "tokenizer.json").is_file():
        return MiniCPMVTokenizerFast
    return MiniCPMVTokenizer if Path(path, "tokenizer.model").is_file() else None


def resolved_settings(folder: str | os.PathLike) -> dict:
    """What `training_settings.json` of a result or checkpoint says the run found out or chose; empty where it does not.

    Raises:
        ValueError: when it is no such file.
    """
    resolved = read_record(Path(folder, SETTINGS_NAME)).get("resolved") or {}
    slicing = resolved.get("slicing", {"max_slice_nums": 1}) if isinstance(resolved, dict) else None
    if not isinstance(slicing, dict) or not isinstance(slicing.get("max_slice_nums"), int):
        raise ValueError(
            f"{Path(folder, SETTINGS_NAME)}: expected under resolved an object, with slicing as config.json"
        )
    return resolved


def trained_slices(folder: str | os.PathLike) -> int | None:
    """Most slices of a picture in training, where `training_settings.json` says it."""
    return resolved_settings(folder).get("slicing", {}).get("max_slice_nums")


def read_record(path: str | os.PathLike) -> dict:
    """A JSON file that a run left; empty where there is none.

    Raises:
        ValueError: when it is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); copy it anew, or delete it") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(record).__name__}; copy it anew, or delete it")
    return record


def recorded_weights(folder: str | os.PathLike) -> dict[str, str]:
    """`sample_weights` of the base that an adapter was trained on, where its `training_settings.json` has them."""
    return read_record(Path(folder, SETTINGS_NAME)).get("base_weights") or {}


def load_extra_tensors(model: nn.Module, folder: str | os.PathLike) -> None:
    """Read `vpm_resampler_embedtokens.pt` of an adapter folder into a PEFT model; nothing to do for other models.

    Raises:
        ValueError: when the file is missing or holds tensors that the model does not have, or that accelerate keeps
            outside the memory of the device.
    """
    if not isinstance(model, PeftModel):
        return
    parameters = dict(model.named_parameters())
    tensors = read_extra_tensors(folder)
    unexpected = [name for name in tensors if name not in parameters]
    if unexpected:
        raise ValueError(
            f"{EXTRA_WEIGHTS_NAME} in {folder} holds tensors that this model does not have: {', '.join(unexpected[:5])}"
        )
    if outside := [name for name in tensors if parameters[name].is_meta]:
        raise ValueError(
            f"{EXTRA_WEIGHTS_NAME} in {folder} cannot be loaded: {len(outside)} parameters of the model ({outside[0]} "
            "...) are outside the memory of the device, where nothing can be written; load on the CPU"
        )
    for name, tensor in tensors.items():
        with _whole(parameters[name]) as writes, torch.no_grad():
            if writes:
                parameters[name].copy_(tensor)


def read_extra_tensors(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of `vpm_resampler_embedtokens.pt`, on the CPU, by their names in the PeftModel.

    Raises:
        ValueError: when it, or the file of the LoRA matrices, is missing.
    """
    if problems := missing_in_adapter(folder):
        raise ValueError("\n".join(problems))
    path = Path(folder) / EXTRA_WEIGHTS_NAME
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # copied by those who write it, if any


@contextmanager
def in_parts() -> Iterator[None]:
    """Within it, `MiniCPMV.from_pretrained` under ZeRO-3 reads one tensor after another.

    By itself transformers (5.17 to 5.23) merges all files of a checkpoint into one state dict first, in rank 0 or in
    every rank, says nothing of names that the model does not have, and finds wrong shapes in rank 0 alone, while the
    others wait for it. Replaces `PreTrainedModel._load_pretrained_model`, which gets the files that `from_pretrained`
    found or downloaded. To go when transformers reads in parts.
    """
    MiniCPMV._load_pretrained_model = staticmethod(_load_in_parts)
    _keep_freed_blocks(below=MIB)
    try:
        yield
    finally:
        _keep_freed_blocks(below=32 * MIB)
        del MiniCPMV._load_pretrained_model  # the one it inherits


def _keep_freed_blocks(below: int) -> None:
    """Let glibc give blocks of this many bytes or more back as soon as they are freed; other C libraries do as they
    like. By itself it keeps blocks of up to 32 MiB once it has seen one freed: of a model whose tensors are smaller
    than that, as much again as the model."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # as in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, below)
        ctypes.CDLL(None).mallopt(trim_threshold, 2 * below)


def _load_in_parts(
    model: MiniCPMV, _state_dict: None, checkpoint_files: list[str], *_: object
) -> tuple[LoadStateDictInfo, None]:
    """Fill a model whose parameters ZeRO-3 has partitioned; rank 0 reads, and no tensor is held beside the next one.

    Names in the files are those of the model, as in all checkpoints of these two: none is translated. Shapes are
    compared by every process, so that all of them end in `from_pretrained`'s report.
    """
    places = model.state_dict(keep_vars=True)
    found, mismatched = set(), set()
    for file in checkpoint_files:
        described = describe(file)
        found |= described.keys()
        read = None
        for name in [name for name in places if name in described]:
            place = places[name]
            shape, wanted = tuple(described[name].shape), tuple(getattr(place, "ds_shape", place.shape))
            if shape != wanted:
                mismatched.add((name, shape, wanted))
                continue
            place._is_hf_initialized = True  # for `from_pretrained`, which makes up what is missing
            with _whole(place) as writes, torch.no_grad():
                if writes:
                    read = read or tensor_reader(file)
                    place.copy_(read(name))
    return LoadStateDictInfo(places.keys() - found, found - places.keys(), mismatched, [], {}, set()), None


def checkpoint_folder(
    path: str | os.PathLike, cache_dir: str | None = None, revision: str | None = None, download: bool = True
) -> Path:
    """Where the files of a checkpoint are: the folder itself, or, of a hub name, its place in the cache.

    Args:
        download: fetch what is not there yet, of a hub name; else the cache alone is looked at.

    Raises:
        OSError, ValueError: when there is nothing under that name, or it cannot be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    if not download:
        return Path(snapshot_download(str(path), cache_dir=cache_dir, revision=revision, local_files_only=True))
    fetch = partial(snapshot_download, str(path), cache_dir=cache_dir, revision=revision)
    files = ["*.json", "*.jinja", "*.model", "processing_*.py", "image_processing_*.py"]
    folder = Path(fetch(allow_patterns=[*files, "*.safetensors"]))
    return folder if any(folder.glob("*.safetensors")) else Path(fetch(allow_patterns=[*files, "pytorch_model*.bin"]))


def sample_weights(folder: str | os.PathLike) -> dict[str, str]:
    """A few values of some matrices of a checkpoint's language model, with spaces, by name: enough to tell later
    whether another checkpoint is the same. Empty where they could not be read without reading all else."""
    files = weight_files(folder)
    if not all(file.suffix == ".safetensors" or zipfile.is_zipfile(file) for file in files):
        return {}
    places = {name: file for file in files for name in describe(file)}
    names = sorted(name for name in places if name.startswith("llm.model.layers.") and name.endswith("_proj.weight"))
    return {
        name: " ".join(map(str, _spread(tensor_reader(places[name])(name), SAMPLED_VALUES).tolist()))
        for name in _spread(names, SAMPLED_TENSORS)
    }


def _spread(values, most: int):
    """At most so many of a list or a tensor, from all over it."""
    flat = values.flatten() if isinstance(values, torch.Tensor) else values
    return flat[:: max(1, len(flat) // most)][:most]


def tensor_reader(file: str | os.PathLike) -> Callable[[str], torch.Tensor]:
    """A function that reads a tensor of a checkpoint file by name.

    The file is mapped for every tensor anew: pages once read stay with a process for as long as the mapping does.

    Raises:
        ValueError: from the function, when the file is a damaged .safetensors.
    """

    def from_safetensors(name: str) -> torch.Tensor:
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise unreadable(file, error) from error

    def from_zip(name: str) -> torch.Tensor:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)[name]

    if str(file).endswith(".safetensors"):
        return from_safetensors
    if zipfile.is_zipfile(file):
        return from_zip
    # of PyTorch before 1.6, which has to be read from end to end
    return torch.load(file, map_location="cpu", weights_only=True).__getitem__


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[bool]:
    """Gathers a parameter that ZeRO-3 has partitioned; yields whether this rank writes it."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed  # only where DeepSpeed runs anyway: its import is slow and may probe for compilers

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        yield torch.distributed.get_rank() == 0
