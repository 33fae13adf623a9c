"""README.md beside a checkpoint, which the hub shows as its model card: base, data, settings, metrics, versions.

Written from what lies in the folder (`training_settings.json`, `trainer_state.json`); a README.md that somebody else
wrote, or changed, stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from finetune.checkpoints import MANIFEST, STATE
from finetune.loading import SETTINGS_NAME, read_record
from finetune.minicpmv import LLM_TYPES, MiniCPMVConfig

CARD = "README.md"
MARK = re.compile(r"<!-- written by finetune/model_card\.py, ([0-9a-f]{64}) -->\n\Z")
PEFT_FORM = "# Model Card for Model ID"
HUB_NAMES = {"llama3": "openbmb/MiniCPM-Llama3-V-2_5", "minicpm": "openbmb/MiniCPM-V-2"}
KEPT = ("license", "license_name", "license_link", "language", "datasets")  # what a user adds to an adapter's card
SPEED = ("runtime", "seconds", "per_second", "flos")  # in the names of figures that say nothing about the model

LOAD_ADAPTER = """The folder holds an adapter and, in `vpm_resampler_embedtokens.pt`, every other tensor that was trained. With the
finetuning toolkit that wrote it:

```python
from finetune.loading import load_finetuned

model, tokenizer = load_finetuned("path/to/this/folder")
```

`python finetune/merge_lora.py --adapter path/to/this/folder --output merged` makes a checkpoint of it that loads
without the toolkit."""
LOAD_WHOLE = """```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
question = [{"role": "user", "content": "What is in the picture?"}]
print(model.chat(image=picture, msgs=question, tokenizer=tokenizer))  # a PIL.Image
```

On transformers 5; `trust_remote_code=True` runs the model code in this folder."""


def write_card(
    folder: str | os.PathLike,
    title: str,
    merged_from: str | os.PathLike | None = None,
    history: Sequence[Mapping] | None = None,
    settings: Mapping | None = None,
    loaded_step: int | None = None,
) -> bool:
    """Write the card of a training result, a checkpoint of a run, or a merged checkpoint.

    Args:
        folder: holds the result, all of it but the card.
        title: of the card.
        merged_from: the adapter that `folder` was merged from; its settings and metrics are those of the card, and what
            somebody wrote into its card stays.
        history: figures in the order in which they were logged; None: those of `trainer_state.json`.
        settings: None: those of `training_settings.json`.
        loaded_step: the step whose weights the folder holds, where training went on after it: what was logged later is
            left out.

    Returns:
        False when a README.md that is not ours was left as it is.
    """
    folder = Path(folder)
    if is_edited(folder / CARD):
        return False
    source = folder if merged_from is None else Path(merged_from)
    if settings is None:
        settings = read_record(source / SETTINGS_NAME)
    if history is None:
        state = read_record(source / STATE)
        history = state.get("log_history", [])
        if loaded_step is None and not _is_checkpoint(source) and _loads_best(settings):
            loaded_step = state.get("best_global_step")
    if loaded_step:
        history = [entry for entry in history if entry.get("step", 0) <= loaded_step]
    adapter = (folder / "adapter_config.json").is_file()
    if not settings.get("resolved") and (folder / "config.json").is_file():
        settings = {**settings, "resolved": {"llm_type": MiniCPMVConfig.from_pretrained(folder).llm_type}}
    own = source / CARD if merged_from is not None and is_edited(source / CARD) else None
    text = _card(title, settings, history, adapter, merged_from is not None, own)
    aside = folder / f"{CARD}.tmp"
    aside.write_text(f"{text}<!-- written by finetune/model_card.py, {_digest(text)} -->\n", encoding="utf-8")
    os.replace(aside, folder / CARD)
    return True


def is_edited(path: str | os.PathLike) -> bool:
    """Whether there is a card that is not, or no longer, as `write_card` wrote it; PEFT's form, not filled in, is none."""
    path = Path(path)
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    if PEFT_FORM in text:
        return False
    mark = MARK.search(text)
    return mark is None or mark[1] != _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_checkpoint(folder: Path) -> bool:
    """Whether it is a step of a run, not the run's result."""
    return (folder / MANIFEST).is_file() or re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def _loads_best(settings: Mapping) -> bool:
    """Whether the result of a run is its best step, not its last."""
    return bool(settings.get("arguments", {}).get("training", {}).get("load_best_model_at_end"))


def _card(
    title: str, settings: Mapping, history: Sequence[Mapping], adapter: bool, merged: bool, own: Path | None
) -> str:
    resolved, arguments = settings.get("resolved", {}), settings.get("arguments", {})
    base = str(arguments.get("model", {}).get("model_name_or_path") or "")
    lora = arguments.get("training", {}).get("use_lora", adapter or merged)
    hub_name = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else HUB_NAMES.get(resolved.get("llm_type"))
    data = ModelCardData(
        base_model=hub_name,
        base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["minicpm-v", *(["lora"] if lora else []), *([] if adapter else ["custom_code"])],
    )
    parts = [f"# {title}", _summary(resolved, adapter, merged)]
    if own is not None:
        theirs = ModelCard.load(own, ignore_metadata_errors=True)
        for name in KEPT:
            if getattr(theirs.data, name, None):
                setattr(data, name, getattr(theirs.data, name))
        parts.append(f"## From the adapter's card\n\n{MARK.sub('', theirs.text).strip()}")
    parts += ["## Load it", LOAD_ADAPTER if adapter else LOAD_WHOLE]
    parts += ["## Training", _table(("setting", "value"), _settings_rows(base, resolved, arguments, lora))]
    metrics = _metrics_rows(history)
    parts += ["## Metrics", _table(("metric", "value", "step"), metrics) if metrics else "None were logged."]
    versions = [(name, version) for name, version in settings.get("versions", {}).items() if version]
    parts += ["## Versions", _table(("package", "version"), versions) if versions else "Not known."]
    body = "\n\n".join(parts)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _summary(resolved: Mapping, adapter: bool, merged: bool) -> str:
    model = LLM_TYPES.get(resolved.get("llm_type"), "MiniCPM-V").split(" (")[0]
    how = "a LoRA adapter of" if adapter else "made of" if merged else "finetuned from"
    ending = " by merging a LoRA adapter into it" if merged else ""
    samples = resolved.get("train_samples")
    data = f" It was trained on {samples:,} samples." if samples is not None else ""
    what = "This is" if adapter else "A complete checkpoint,"
    return f"{what} {how} {model}{ending}.{data} The terms of the base model's license hold for it."


def _settings_rows(base: str, resolved: Mapping, arguments: Mapping, lora: bool) -> list[tuple[str, object]]:
    training, matrices = arguments.get("training", {}), arguments.get("lora", {})
    rows = [("base", f"`{base}`" if base else None), ("training samples", resolved.get("train_samples"))]
    rows.append(("evaluation samples", resolved.get("eval_samples") or None))
    if lora:
        rows += [(f"LoRA {name}", matrices.get(f"lora_{name}")) for name in ("r", "alpha", "dropout")]
        if matrices.get("lora_target_modules"):
            rows.append(("LoRA targets", f"`{matrices['lora_target_modules']}`".replace("|", "\\|")))
    trained = [name for name in ("llm", "vision", "resampler", "embed_tokens") if training.get(f"tune_{name}")]
    rows.append(("trained in full", ", ".join(trained) or None))
    batch = [training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps")]
    batch.append(resolved.get("processes"))
    if all(batch):
        rows.append(("samples per step", batch[0] * batch[1] * batch[2]))
    steps = training.get("max_steps", -1)
    rows.append(("steps", steps) if steps > 0 else ("epochs", training.get("num_train_epochs")))
    names = {
        "learning_rate": "learning rate",
        "lr_scheduler_type": "learning rate schedule",
        "weight_decay": "weight decay",
        "model_max_length": "longest sample, tokens",
        "seed": "seed",
    }
    rows += [(label, training.get(name)) for name, label in names.items()]
    rows.append(("slices per picture, at most", resolved.get("slicing", {}).get("max_slice_nums")))
    rows.append(("computed in", resolved.get("dtype")))
    return [(name, value) for name, value in rows if value is not None]


def _metrics_rows(history: Sequence[Mapping]) -> list[tuple[str, str, object]]:
    """The last value of every figure that says something about the model."""
    last: dict[str, tuple[object, object]] = {}
    for entry in history:
        for name, value in entry.items():
            told = name in ("loss", "train_loss") or name.startswith("eval_")
            if told and isinstance(value, int | float) and not any(word in name for word in SPEED):
                last[name] = (value, entry.get("step", ""))
    labels = {"loss": "training loss, last logged", "train_loss": "training loss, mean since the run was last started"}
    return [
        (labels.get(name, name.replace("eval_", "evaluation ", 1).replace("_", " ")), f"{value:.4g}", step)
        for name, (value, step) in last.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
