"""What a run shows and leaves behind for its reader: parameter table, resolved settings, `loss.png`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn
from transformers import TrainingArguments

from finetune.loading import SETTINGS_NAME

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "timm")


def parameter_table(model: nn.Module) -> str:
    """Trained and frozen parameters per module, counted before ZeRO-3 partitioning."""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(_module_of(name), [0, 0])
        row[0 if parameter.requires_grad else 1] += getattr(parameter, "ds_numel", parameter.numel())
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'module':<24}{'trained':>16}{'frozen':>16}"]
    lines += [f"{module:<24}{trained:>16,}{frozen:>16,}" for module, (trained, frozen) in rows.items()]
    return "\n".join(lines)


def _module_of(name: str) -> str:
    """`llm.layers`, `llm.layers (LoRA)`, `llm.embed_tokens`, `llm.lm_head`, `vpm`, `resampler`."""
    parts = name.removeprefix("base_model.model.").split(".")
    module = parts[0]
    if module == "llm":
        module = f"llm.{parts[2] if parts[1] == 'model' else parts[1]}"
    return f"{module} (LoRA)" if ".lora_" in name else module


def settings_record(arguments: Mapping[str, object], resolved: Mapping[str, object]) -> dict:
    """The settings of a run, for `write_settings`.

    Args:
        arguments: dataclasses of arguments by title.
        resolved: what was found out or chosen by the program (model type, slicing, dtype).
    """
    return {
        "resolved": dict(resolved),
        "arguments": {
            title: value.to_dict() if isinstance(value, TrainingArguments) else dict(vars(value))
            for title, value in arguments.items()
        },
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the libraries that results depend on; None: not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_settings(settings: Mapping, folder: str | os.PathLike) -> None:
    """Write `training_settings.json`."""
    text = json.dumps(settings, indent=2, default=str, ensure_ascii=False)
    Path(folder, SETTINGS_NAME).write_text(text + "\n", encoding="utf-8")


def plot_history(history: list[dict], path: Path) -> None:
    """Loss (training and evaluation), learning rate and gradient norm over optimizer steps, as a PNG."""
    # Not at the top: a run needs matplotlib once, at its end.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    curves = [
        (axes[0], "loss", "training loss", "-"),
        (axes[0], "eval_loss", "evaluation loss", "o-"),
        (axes[1], "learning_rate", "learning rate", "-"),
        (axes[2], "grad_norm", "gradient norm", "-"),
    ]
    for axis, key, label, style in curves:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes[0].set_ylabel("loss per supervised token")
    axes[0].set_yscale("log")  # the first steps would flatten all others
    if axes[0].lines:
        axes[0].legend()
    axes[1].set_ylabel("learning rate")
    axes[2].set_ylabel("gradient norm")
    axes[2].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(alpha=0.3)
    aside = path.with_suffix(".tmp.png")
    figure.savefig(aside, dpi=120)
    os.replace(aside, path)
