"""Loading what finetuning wrote.

from finetune.loading import load_finetuned
model, tokenizer = load_finetuned("output/minicpmv_lora")
print(model.chat(image=picture, msgs=[{"role": "user", "content": "What is this?"}], tokenizer=tokenizer))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModel, AutoTokenizer

import finetune.minicpmv  # noqa: F401 (registers the models)

EXTRA_WEIGHTS_NAME = "vpm_resampler_embedtokens.pt"


def load_finetuned(folder: str | os.PathLike, **kwargs) -> tuple[nn.Module, object]:
    """Model in evaluation mode and tokenizer, from an adapter folder or a complete checkpoint.

    Args:
        kwargs: for `from_pretrained`, such as `dtype` or `device_map` (default: "auto").

    Raises:
        ValueError: when an adapter folder lacks `vpm_resampler_embedtokens.pt`, or it does not fit the base model.
    """
    kwargs.setdefault("device_map", "auto")
    if Path(folder, "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(folder, **kwargs)
        load_extra_tensors(model, folder)
    else:
        model = AutoModel.from_pretrained(folder, **kwargs)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_extra_tensors(model: nn.Module, folder: str | os.PathLike) -> None:
    """Read `vpm_resampler_embedtokens.pt` of an adapter folder into a PEFT model; nothing to do for other models.

    Raises:
        ValueError: when the file is missing or holds tensors that the model does not have.
    """
    if not isinstance(model, PeftModel):
        return
    path = Path(folder) / EXTRA_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder holds an adapter without the other trained weights")
    parameters = dict(model.named_parameters())
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    unexpected = [name for name in tensors if name not in parameters]
    if unexpected:
        raise ValueError(f"{path} holds tensors that this model does not have: {', '.join(unexpected[:5])}")
    for name, tensor in tensors.items():
        with _whole(parameters[name]) as writes, torch.no_grad():
            if writes:
                parameters[name].copy_(tensor)


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[bool]:
    """Gathers a parameter that ZeRO-3 has partitioned; yields whether this rank writes it."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed  # only where DeepSpeed runs anyway: its import is slow and may probe for compilers

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        yield torch.distributed.get_rank() == 0
