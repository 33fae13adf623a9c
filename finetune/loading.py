"""Loading what finetuning wrote.

from finetune.loading import load_finetuned
model, tokenizer = load_finetuned("output/minicpmv_lora")
print(model.chat(image=picture, msgs=[{"role": "user", "content": "What is this?"}], tokenizer=tokenizer))
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModel, AutoTokenizer

from finetune.minicpmv import MiniCPMVTokenizer, MiniCPMVTokenizerFast  # which also registers the models
from finetune.safe_files import code_in

EXTRA_WEIGHTS_NAME = "vpm_resampler_embedtokens.pt"
SETTINGS_NAME = "training_settings.json"


def load_finetuned(folder: str | os.PathLike, **kwargs) -> tuple[nn.Module, object]:
    """Model in evaluation mode and tokenizer, from an adapter folder or a complete checkpoint.

    No code that lies in the folder, or in the base of an adapter, is executed.

    Args:
        kwargs: for `from_pretrained`, such as `dtype` or `device_map` (default: "auto").

    Raises:
        ValueError: when an adapter folder lacks `vpm_resampler_embedtokens.pt`, or it does not fit the base model; when
            a file could not be loaded without executing what lies in it.
    """
    if problems := weights_with_code(folder):
        raise ValueError("\n".join(problems))
    kwargs = {"device_map": "auto", **kwargs, "trust_remote_code": False}
    if Path(folder, "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(folder, **kwargs)
        load_extra_tensors(model, folder)
        settings = resolved_settings(folder)
        if settings:  # the base's config knows nothing of how many slices the adapter was trained with
            model.get_base_model().config.set_max_slice_nums(settings["slicing"]["max_slice_nums"])
    else:
        model = AutoModel.from_pretrained(folder, **kwargs)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(path: str | os.PathLike, cache_dir: str | None = None):
    """The tokenizer of the checkpoint or adapter `path` (a folder, or its name on the hub).

    Raises:
        ValueError: when it is missing or of another kind, which may be code that lies in the checkpoint.
    """
    expected = "expected tokenizer_class MiniCPMVTokenizer or MiniCPMVTokenizerFast in tokenizer_config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the tokenizer cannot be loaded: {error}; {expected}") from error
    if not isinstance(tokenizer, MiniCPMVTokenizer | MiniCPMVTokenizerFast):
        raise ValueError(f"{path}: has a tokenizer of another kind, read as {type(tokenizer).__name__}; {expected}")
    return tokenizer


def weights_with_code(folder: str | os.PathLike) -> list[str]:
    """`code_in` for the files that loading a checkpoint or adapter would read its weights from; nothing for a hub name,
    whose files PyTorch itself refuses when they are read."""
    pickled = [] if any(Path(folder).glob("*.safetensors")) else ["pytorch_model*.bin", "adapter_model.bin"]
    return code_in(folder, *pickled, EXTRA_WEIGHTS_NAME)


def resolved_settings(folder: str | os.PathLike) -> dict:
    """What `training_settings.json` of a result or checkpoint says the run found out or chose; empty without one."""
    path = Path(folder, SETTINGS_NAME)
    return json.loads(path.read_text(encoding="utf-8"))["resolved"] if path.is_file() else {}


def load_extra_tensors(model: nn.Module, folder: str | os.PathLike) -> None:
    """Read `vpm_resampler_embedtokens.pt` of an adapter folder into a PEFT model; nothing to do for other models.

    Raises:
        ValueError: when the file is missing or holds tensors that the model does not have.
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
    for name, tensor in tensors.items():
        with _whole(parameters[name]) as writes, torch.no_grad():
            if writes:
                parameters[name].copy_(tensor)


def read_extra_tensors(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of `vpm_resampler_embedtokens.pt`, on the CPU, by their names in the PeftModel.

    Raises:
        ValueError: when the file is missing.
    """
    path = Path(folder) / EXTRA_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder holds an adapter without the other trained weights")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[bool]:
    """Gathers a parameter that ZeRO-3 has partitioned; yields whether this rank writes it."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed  # only where DeepSpeed runs anyway: its import is slow and may probe for compilers

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        yield torch.distributed.get_rank() == 0
