"""Whether a checkpoint holds what a run needs to go on from it, seen before any weight is loaded.

Compared are the weights and the optimizer's state with a model without values, which knows what the run will train.
The settings beside the checkpoint say which flags are the cause; those of earlier versions have none, and are compared
likewise.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from finetune.flags import MADE_OF_MODEL
from finetune.loading import ADAPTER_CONFIG_NAME, other_base_problems, read_record
from finetune.model_folder import adapter_fit, described_weights, weight_problems
from finetune.resume import recorded_flags
from finetune.safe_files import no_code_from_files

DETAIL = 200  # most characters of what is other in the tensors
ANEW = "or train anew from what it holds (--lora_weight_path, --model_name_or_path)"
# Flags that say which tensors there are, which of them are trained, and what the optimizer keeps of each.
MODEL_FLAGS = ("model_name_or_path",)
LORA_FLAGS = (
    *("lora_r", "lora_target_modules", "lora_bias", "lora_modules_to_save", "lora_layers_to_transform"),
    *("lora_layers_pattern", "lora_layer_replication"),
)
TUNE_FLAGS = ("tune_vision", "tune_resampler", "tune_embed_tokens", "tune_llm")
GROUP_FLAGS = ("vision_learning_rate",)
KNOWN = ("torch", "transformers")  # packages whose optimizers save what they keep by its name
OTHERS_TRAIN = ("tune_resampler", "tune_llm", "use_lora")  # than the vision tower


class Checkpoint:
    """What lies in a checkpoint folder, of the parts that resuming compares; None: not there, or not to be told.

    Args:
        folder: whose files have been seen to hold no code.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.is_adapter = (self.folder / ADAPTER_CONFIG_NAME).is_file()
        models = _first(self.folder, "global_step*/*model_states.pt")
        optimizers = _first(self.folder, "optimizer.pt", "global_step*/*optim_states.pt") or models
        self.shapes = _trained_shapes(_structure(models)) if models else None
        """of the trained tensors by name, under DeepSpeed"""
        self.optimizer = _optimizer_state(_structure(optimizers)) if optimizers else None
        """`state` and `param_groups` of the optimizer, its tensors on the device meta"""
        self.flags = recorded_flags(self.folder)
        """that it was saved with, by name; empty: not recorded"""

    @property
    def trained_tensors(self) -> int | None:
        """How many tensors the optimizer has; under ZeRO it has flat ones."""
        if self.shapes is not None:
            return len(self.shapes)
        return sum(len(group["params"]) for group in self.optimizer["param_groups"]) if self.optimizer else None

    @property
    def state_names(self) -> set[str]:
        """What the optimizer keeps of tensors."""
        return {name for of_tensor in self.optimizer["state"].values() for name in of_tensor} - {"step"}


def fit_problems(
    folder: str | os.PathLike, model: torch.nn.Module, args: transformers.TrainingArguments, flags: Mapping[str, object]
) -> list[str]:
    """What keeps a run from going on from a checkpoint, one line each.

    Args:
        folder: the checkpoint, whose files have been seen to hold no code.
        model: of the run, without values; what it trains requires gradients.
        flags: the run's by name.
    """
    saved = Checkpoint(folder)
    lora = isinstance(model, PeftModel)
    if saved.is_adapter != lora and (saved.is_adapter or _has_weights(saved.folder)):
        then, now = ("with LoRA", "without it") if saved.is_adapter else ("without LoRA", "with it")
        flag = f"--use_lora {str(saved.is_adapter).lower()}"
        return [f"{folder}: was saved by a run {then}, and this run trains {now}: give {flag}, {ANEW}"]
    if why := _weights_problem(saved, model):
        return [f"{folder}: {why}: {_remedy(saved, flags, (*MODEL_FLAGS, *LORA_FLAGS) if lora else MODEL_FLAGS)}"]
    problems = _base_problems(saved, flags) if lora else []
    if why := _trained_problem(saved, model):
        problems.append(f"{folder}: {why}: {_remedy(saved, flags, (*TUNE_FLAGS, *LORA_FLAGS) if lora else TUNE_FLAGS)}")
    elif why := _groups_problem(saved, flags):
        problems.append(f"{folder}: {why}: {_remedy(saved, flags, GROUP_FLAGS)}")
    if why := _scale_problem(saved, model):
        problems.append(f"{folder}: {why}")
    if why := _optimizer_problem(saved, args, model):
        problems.append(f"{folder}: {why}: {_remedy(saved, flags, ('optim',))}")
    return problems


def _remedy(saved: Checkpoint, flags: Mapping[str, object], names: tuple[str, ...]) -> str:
    """Which of these flags were others when it was saved, or that it does not say."""
    then = {name: saved.flags[name] for name in names if name in saved.flags and name in flags}
    changed = [name for name in then if _plain(then[name]) != _plain(flags[name])]
    if not changed:
        return f"give the flags that it was saved with ({', '.join(f'--{name}' for name in names)}), {ANEW}"
    old, new = ([_said(name, values[name]) for name in changed] for values in (then, flags))
    return f"it was saved with {', '.join(old)}, and this run has {', '.join(new)}; give what it had, {ANEW}"


def _said(name: str, value: object) -> str:
    return f"--{name} {_plain(value)}" if _plain(value) else f"no --{name}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(getattr(value, "value", value))


def _weights_problem(saved: Checkpoint, model: torch.nn.Module) -> str | None:
    """Where the weights have other names or shapes than the model's."""
    try:
        if saved.is_adapter:
            found = adapter_fit(model, saved.folder, "this run's model")[1]
        else:
            found = weight_problems("", model, described_weights(saved.folder))
    except (OSError, ValueError):  # which loading says
        return None
    if not found:
        return None
    kind = "its adapter is another than" if saved.is_adapter else "its weights are others than"
    first = found[0].replace(f"{saved.folder}{os.sep}", "").removeprefix(": ").replace("base_model.model.", "")
    for theirs in ("the tensors of its settings", "tensors of its config.json"):
        first = first.replace(theirs, "this run's tensors")
    return f"{kind} this run's ({first if len(first) <= DETAIL else f'{first[:DETAIL]} ...'})"


def _base_problems(saved: Checkpoint, flags: Mapping[str, object]) -> list[str]:
    """Where the frozen weights would be others than those that the adapter was trained on."""
    base = flags["model_name_or_path"]
    try:
        return other_base_problems(f"--model_name_or_path {base}", saved.folder, base, flags.get("cache_dir"))
    except (OSError, ValueError):  # which loading says
        return []


def _has_weights(folder: Path) -> bool:
    try:
        return bool(described_weights(folder))
    except (OSError, ValueError):
        return False


def _trained_problem(saved: Checkpoint, model: torch.nn.Module) -> str | None:
    """Where other tensors were trained."""
    trained = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    if saved.shapes is not None and saved.shapes != trained:
        other = [name for name in {**saved.shapes, **trained} if saved.shapes.get(name) != trained.get(name)]
        return f"was trained with other tensors than this run's, {len(other)} of them, {other[0]} among them"
    if saved.trained_tensors not in (None, len(trained)):
        return f"has the optimizer's state of {saved.trained_tensors} tensors, and this run trains {len(trained)}"
    return None


def _groups_problem(saved: Checkpoint, flags: Mapping[str, object]) -> str | None:
    """Where the vision tower had a learning rate of its own and has none now, or the other way round."""
    if "vision_learning_rate" in saved.flags:
        own_rate = saved.flags["vision_learning_rate"] is not None
    elif saved.optimizer is None or saved.shapes is not None or not any(flags[name] for name in OTHERS_TRAIN):
        return None
    else:
        own_rate = len(saved.optimizer["param_groups"]) > 2  # those with and without decay, of all but the tower
    if own_rate == (flags["vision_learning_rate"] is not None):
        return None
    return "the vision tower's learning rate makes other groups of parameters"


def _scale_problem(saved: Checkpoint, model: torch.nn.Module) -> str | None:
    """Where what the matrices of an adapter were trained to would count otherwise."""
    if not saved.is_adapter:
        return None
    then = read_record(saved.folder / ADAPTER_CONFIG_NAME).get("lora_alpha")
    now = model.peft_config[model.active_adapter].lora_alpha
    if then in (None, now):
        return None
    return (
        f"was trained with --lora_alpha {then}, and this run has {now}, which would scale what it learned: give {then}"
    )


def _optimizer_problem(saved: Checkpoint, args: transformers.TrainingArguments, model: torch.nn.Module) -> str | None:
    """Where the optimizer keeps other things than those of the checkpoint."""
    if saved.optimizer is None or "optimizer" in (args.deepspeed or {}):
        return None
    then = saved.flags.get("optim")
    if then == args.optim.value and saved.flags.get("optim_args") == args.optim_args:
        return None
    kept, wanted = saved.state_names, _state_names(args, model)
    if wanted is None:
        return f"holds the state of --optim {then}" if then not in (None, args.optim.value) else None
    if kept <= wanted and bool(kept) == bool(wanted):
        return None
    found = ", ".join(sorted(kept)) or "nothing"
    return f"holds the state of another optimizer than --optim {args.optim.value} (it keeps {found} of each tensor)"


def _state_names(args: transformers.TrainingArguments, model: torch.nn.Module) -> set[str] | None:
    """What the run's optimizer keeps of tensors, found by a step of it; None: not to be told, as of other packages',
    which keep other things of small tensors and save them in forms of their own (bitsandbytes)."""
    try:
        kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if any(name in settings for name in MADE_OF_MODEL) or kind.__module__.partition(".")[0] not in KNOWN:
            return None
        tried = [torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)]
        optimizer = kind(tried, **settings)
        for parameter in tried:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception:  # each in its own way; the run says it
        return None
    names = {name for of_tensor in optimizer.state.values() for name in of_tensor}
    return names - {"step"}


def _first(folder: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _structure(path: Path) -> dict:
    """A file of torch.save without reading its tensors; empty where it cannot be read, which loading says."""
    try:
        with no_code_from_files(deepspeed=path.parent.name.startswith("global_step")):
            content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        return {}
    return content if isinstance(content, dict) else {}


def _trained_shapes(content: Mapping) -> dict[str, torch.Size] | None:
    groups = content.get("param_shapes")
    return {name: shape for group in groups for name, shape in group.items()} if groups else None


def _optimizer_state(content: Mapping) -> dict | None:
    """`state` and `param_groups`, wherever DeepSpeed's stages have put them."""
    while isinstance(content, Mapping) and "param_groups" not in content:
        inner = ("optimizer_state_dict", "base_optimizer_state", "optimizer")
        content = next((content[name] for name in inner if name in content), None)
    return content
