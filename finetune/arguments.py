"""Command-line arguments of finetune.py: what each does, and which combinations are refused before any weight loads.

Also what chat.py and evaluate.py have in common: which model a flag names, and in which dtype and where it is loaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from finetune.checkpoints import fault, newest_complete, newest_everywhere
from finetune.checks import loader_processes
from finetune.deepspeed_file import content_problem, saving_models
from finetune.errors import ProcessError, UserError
from finetune.flags import combination_problems, environment_problems, refusal, wrong_values
from finetune.loading import (
    ADAPTER_CONFIG_NAME,
    SETTINGS_NAME,
    base_of_adapter,
    checkpoint_folder,
    is_hub_name,
    load_finetuned,
    resolved_settings,
)
from finetune.metrics import METRICS
from finetune.minicpmv import LLM_TYPES, MiniCPMVConfig
from finetune.model_folder import (
    CONFIG_NAME,
    access_problem,
    adapter_problems,
    checkpoint_problems,
    file_problem,
    in_place_of_a_model,
    quantization_problem,
)
from finetune.places import at_home, contains, output_problems
from finetune.result_folder import described
from finetune.run_lock import run_at_work
from finetune.zero import without_communication

logger = logging.getLogger("finetune")

ATTENTION = ("sdpa", "eager", "flash_attention_2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARMUP = ("--warmup_steps", "--warmup_ratio")
TRUE, FALSE = ("true", "True", "1", "yes", "latest"), ("false", "False", "0", "no")
LORA_TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
ALL_LINEAR = "all-linear"
DEFAULT_SLICES = "the checkpoint's setting, 9 for both models"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="openbmb/MiniCPM-V-2", metadata={"help": "Folder of a checkpoint, or its name on the hub."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention kernels: sdpa, flash_attention_2 (if installed) or eager."}
    )

    def __post_init__(self):
        self.model_name_or_path = at_home(self.model_name_or_path)


@dataclass
class DataArguments:
    data_path: list[str] | None = field(
        default=None,
        metadata={"help": "Training samples: files (.json, .jsonl, .parquet, .arrow) or folders of them, with spaces."},
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "Evaluation samples, likewise. None: no evaluation."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative picture paths begin. None: at the folder of the data file."}
    )
    image_folder_only: bool = field(
        default=False,
        metadata={"help": "Samples whose picture lies outside --image_folder, links followed, cannot be used."},
    )
    bad_samples: str = field(
        default="fail",
        metadata={
            "help": "Samples that cannot be used: fail (stop before training and list them), or skip (decode every "
            "picture first, leave the bad samples out and list them in OUTPUT_DIR/bad_samples.jsonl). Of those that "
            "are found later: fail (stop with a checkpoint), or skip (they stay in their places and teach nothing)."
        },
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "With --bad_samples skip: stop when more than this part is bad, 0 to 1."}
    )

    def __post_init__(self):
        if self.data_path is not None:
            self.data_path = list(map(at_home, self.data_path))
        if self.eval_data_path is not None:
            self.eval_data_path = list(map(at_home, self.eval_data_path))
        if self.image_folder is not None:
            self.image_folder = at_home(self.image_folder)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments, the toolkit's flags, and the flags of the original that transformers dropped."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for checkpoints, logs and the result."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for what is downloaded from the hub."})
    model_max_length: int = field(
        default=2048,
        metadata={
            "help": "Longest sample in tokens, picture placeholders included; longer ones are cut at the end. Not "
            "given: 2048, or what the model takes, where that is less."
        },
    )
    max_slice_nums: int | None = field(
        default=None, metadata={"help": f"Most slices of a picture beside its overview. None: {DEFAULT_SLICES}."}
    )
    llm_type: str | None = field(
        default=None,
        metadata={"help": "llama3 (MiniCPM-Llama3-V 2.5) or minicpm (MiniCPM-V 2.0). None: read from the checkpoint."},
    )
    tune_vision: bool = field(default=True, metadata={"help": "Train the vision tower (vpm)."})
    tune_llm: bool | None = field(
        default=None, metadata={"help": "Train the language model in full. None: true, but false with --use_lora."}
    )
    tune_resampler: bool = field(default=True, metadata={"help": "Train the resampler."})
    tune_embed_tokens: bool = field(
        default=True, metadata={"help": "Train the token embeddings (with --tune_llm or --use_lora)."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA matrices in the language model."})
    vision_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision tower, on the same schedule. None: as --learning_rate."},
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Another name for --per_device_train_batch_size: samples per step and GPU."}
    )
    evaluation_strategy: str | None = field(
        default=None, metadata={"help": "Another name for --eval_strategy: no, steps or epoch."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Folder for TensorBoard events. None: runs/ inside the output folder."}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Part of all steps over which the learning rate rises, 0 to below 1."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output folder that holds checkpoints of another run."}
    )
    group_by_length: bool = field(
        default=False,
        metadata={
            "help": "Make batches of samples of about the same length, in tokens; the same as "
            "--train_sampling_strategy group_by_length."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes per GPU that load and slice pictures. 0: the training process itself. None: 4, or as "
            "many as there are cores for each."
        },
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples per step and GPU."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Samples per evaluation step and GPU."})
    vision_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Gradient checkpointing of vision tower and resampler: less memory, a third more of their "
            "arithmetic. None: as --gradient_checkpointing."
        },
    )
    llm_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "The same for the language model. None: as --gradient_checkpointing."},
    )
    predict_with_generate: bool = field(
        default=False,
        metadata={
            "help": "At each evaluation also answer questions of the evaluation data, and log exact_match, anls, "
            "rouge_l, token_f1 and some answers."
        },
    )
    predict_samples: int = field(
        default=64,
        metadata={"help": "With --predict_with_generate: samples to answer, evenly spread over the evaluation data."},
    )
    predict_max_new_tokens: int = field(
        default=128, metadata={"help": "With --predict_with_generate: longest answer in tokens; the rest is cut off."}
    )
    max_bad_steps: int = field(
        default=3, metadata={"help": "Stop after so many steps in a row whose loss is infinite or no number."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Train in bfloat16. None: where the GPU has it, and --fp16 is not given."}
    )
    fp16: bool | None = field(
        default=None, metadata={"help": "Train in float16. None: on GPUs without bfloat16, if --bf16 is not given."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the model takes the whole batch as one argument."}
    )
    report_to: str | None = field(
        default="tensorboard", metadata={"help": "Where metrics go: tensorboard, wandb, ..., none."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log a running average in place of a loss that is no number. Hides divergence."},
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluation keeps the loss alone, not the logits of the whole vocabulary."}
    )

    def __post_init__(self):
        if self.batch_size is not None:
            self.per_device_train_batch_size = self.batch_size
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        if self.warmup_ratio is not None and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # transformers 5: below 1, a part of all steps
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = loader_processes()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = (
                False  # what is trained takes part in every step; looking for it costs time
            )
        if not torch.accelerator.is_available():
            self.use_cpu = True  # unsaid, accelerate would not connect the processes of a CPU run with each other
        if self.accelerator_config is None and self.dataloader_pin_memory and not self.use_cpu:
            # or every batch would wait on its way to the device for all that was asked of the device before
            self.accelerator_config = {"non_blocking": True}
        self._resolve_checkpointing()
        if self.deepspeed:
            self.deepspeed = self._deepspeed_config()
        if self.tune_llm is None:
            self.tune_llm = not self.use_lora
        if self.bf16 is None and self.fp16 is None:
            self.bf16, self.fp16 = found_precision(self.use_cpu)
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        if self.label_names is None:
            self.label_names = ["labels"]
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as transformers itself has it for --load_best_model_at_end
        super().__post_init__()

    def _deepspeed_config(self) -> dict:
        """The content of the DeepSpeed file, fit for the number of processes and for saving."""
        config = self.deepspeed
        if not isinstance(config, dict):
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            config = without_communication(config)
        return saving_models(config)

    def _resolve_checkpointing(self) -> None:
        """One switch of transformers becomes two; what is said by its old name goes by `activation_checkpointing` where
        the installed transformers (5.23) has that, and warns of the old one."""
        prefix = "activation" if hasattr(self, "activation_checkpointing") else "gradient"
        for name in ("checkpointing", "checkpointing_kwargs"):
            old, new = f"gradient_{name}", f"{prefix}_{name}"
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
            if old != new:
                setattr(self, old, None)
        whole = bool(getattr(self, f"{prefix}_checkpointing"))
        self.vision_checkpointing = whole if self.vision_checkpointing is None else self.vision_checkpointing
        self.llm_checkpointing = whole if self.llm_checkpointing is None else self.llm_checkpointing
        setattr(self, f"{prefix}_checkpointing", self.vision_checkpointing or self.llm_checkpointing)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


def found_precision(use_cpu: bool) -> tuple[bool, bool]:
    """(bf16, fp16): bfloat16 where the GPU computes in it, float16 on other GPUs, neither (float32) on CPUs."""
    if use_cpu or not torch.cuda.is_available():
        return False, False
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16, not bf16


@dataclass
class LoraArguments:
    """Passed to peft.LoraConfig; only with --use_lora."""

    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale: the update counts lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA matrices, 0 to below 1."})
    lora_target_modules: str = field(
        default=LORA_TARGETS,
        metadata={
            "help": "Linear layers that get LoRA: names in the language model, with commas (q_proj,v_proj), all-linear "
            "(all in its layers), or a regular expression over full names. In the vision tower, resampler and "
            "embeddings only where their --tune_ flag is false."
        },
    )
    lora_weight_path: str = field(
        default="", metadata={"help": "Adapter folder to continue from; its own LoRA settings then hold."}
    )
    lora_bias: str = field(default="none", metadata={"help": "Biases to train: none, all or lora_only."})
    lora_modules_to_save: str = field(
        default="", metadata={"help": "Names, with commas, of further modules to train in full and save by peft."}
    )
    lora_layers_to_transform: list[str] | None = field(
        default=None, metadata={"help": "Numbers, with spaces or commas, of the layers that get LoRA. None: all."}
    )
    lora_layers_pattern: str | None = field(
        default=None, metadata={"help": "Name of the list of layers that lora_layers_to_transform counts in: layers."}
    )
    lora_layer_replication: str | None = field(
        default=None, metadata={"help": "Ranges of layers to stack anew, as JSON: [[0, 4], [2, 5]]."}
    )
    q_lora: bool = field(default=False, metadata={"help": "Not available yet; see the message."})

    def __post_init__(self):
        self.lora_weight_path = at_home(self.lora_weight_path)

    @property
    def target_modules(self) -> str:
        """Regular expression over full names for peft: plain names (`q_proj,v_proj`) within the language model, and
        the layers of `lora_layers_to_transform`, which peft itself takes only beside a list of names. Likewise
        `all-linear`: peft's own would also take vision tower and resampler, which have flags of their own."""
        targets, layer = self.lora_target_modules, r"\d+"
        if self.layers_to_transform is not None:
            layer = f"({'|'.join(map(str, self.layers_to_transform))})"
        layer_of = rf"{self.lora_layers_pattern or 'layers'}\.{layer}"
        if targets.lower() == ALL_LINEAR:
            return rf"llm\..*{layer_of}\..*_proj"
        if re.fullmatch(r"[\w.]+(,[\w.]+)*", targets):
            names = "|".join(map(re.escape, targets.split(",")))
            return rf"llm\..*{layer_of}\..*\b({names})"
        return targets.replace(r"layers\.\d+", layer_of)

    @property
    def modules_to_save(self) -> list[str] | None:
        return [name for name in self.lora_modules_to_save.split(",") if name] or None

    @property
    def layers_to_transform(self) -> list[int] | None:
        numbers = re.split(r"[,\s]+", " ".join(self.lora_layers_to_transform or []).strip())
        return [int(number) for number in numbers if number] or None

    @property
    def layer_replication(self) -> list[tuple[int, int]] | None:
        return None if not self.lora_layer_replication else [tuple(r) for r in json.loads(self.lora_layer_replication)]


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments, LoraArguments]:
    """Arguments from the command line. A flag with an empty value counts as not given. What is wrong with single flags
    (unknown ones, values of another kind or out of range, the DeepSpeed file, what transformers refuses while it makes
    its arguments) is kept for `check_arguments` in `found_in_parsing`; the names of the flags in `flags_given`.

    Raises:
        SystemExit: after --help.
        UserError: on what transformers refuses without naming a flag.
    """
    given = _given_flags(sys.argv[1:] if argv is None else argv)
    names = sorted({flag for flag, _ in given})
    problems = []
    # A flag with a problem is left out of the parse, which would stop at it, so that the other problems are found and
    # reported together with this one.
    files = [values for flag, values in given if flag == "--deepspeed" and values]
    if files and (problem := content_problem(files[-1][0])):
        problems.append(problem)
        given = _without(given, "--deepspeed")
    flags = [flag for flag, _ in given]
    if "--output_dir" not in flags:
        problems.append("--output_dir is missing: where shall checkpoints and the result go?")
    if warmup := [flag for flag in flags if flag in WARMUP]:  # two names for one thing: the last one wins
        given = _without(given, WARMUP[1 - WARMUP.index(warmup[-1])])
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments, LoraArguments), allow_abbrev=False)
    for flag, values in given:
        try:
            _, unknown = parser.parse_known_args([*filter(None, [flag]), *values])
        except UserError as error:
            problems.append(f"{flag} {' '.join(values)}: {refusal(flag[2:]) or error}")
            given = _without(given, flag)
        else:
            problems += [f"{word}: there is no such flag" for word in unknown if word.startswith("--")]
            problems += [f"{word!r} belongs to no flag" for word in unknown if not word.startswith("--")]
    for flag, problem in wrong_values(parser.parse_known_args(_words(given))[0], names):
        problems.append(problem)
        given = _without(_without(given, f"--{flag}"), f"--no_{flag}")
    *parsed, _ = _made(parser, given, problems)
    parsed[2].found_in_parsing = problems
    parsed[2].flags_given = sorted({flag for flag, _ in given})
    return tuple(parsed)


class _Parser(HfArgumentParser):
    """Says what is wrong in an exception, where argparse ends the program with the usage of all flags."""

    def error(self, message: str):
        raise UserError(message.partition(": ")[2] or message)  # without the name of the flag


def _words(given: list[tuple[str, list[str]]]) -> list[str]:
    return [word for flag, values in given for word in (*filter(None, [flag]), *values)]


def _made(parser: _Parser, given: list[tuple[str, list[str]]], problems: list[str]) -> tuple:
    """The dataclasses. What transformers refuses is added to the problems, and made without the flags that it names."""
    while True:
        try:
            return parser.parse_args_into_dataclasses(_words(given), return_remaining_strings=True)
        except (ValueError, ImportError, RuntimeError) as error:
            problems.append(" ".join(str(error).split()))
            named = [flag for flag, _ in given if flag and re.search(rf"\b{flag[2:]}\b", str(error))]
            if not named:
                raise UserError("\n".join(["These settings cannot work:", *problems])) from error
            for flag in named:
                given = _without(given, flag)


def _given_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Flags with their values, in order; `--output-dir` is `--output_dir`. A flag whose values are all empty takes back
    what was said with it before. Words in front of all flags belong to the flag ""."""
    given: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        if re.match(r"--\w", word):
            name, equals, value = word.partition("=")
            given.append((name.replace("-", "_").replace("__", "--", 1), [value] if equals else []))
        else:
            given[-1][1].append(word)
    kept: list[tuple[str, list[str]]] = []
    for flag, values in given:
        if values and not any(values):
            kept = _without(kept, flag)
        else:
            kept.append((flag, list(filter(None, values))))
    return kept


def _without(given: list[tuple[str, list[str]]], flag: str) -> list[tuple[str, list[str]]]:
    return [(name, values) for name, values in given if name != flag]


def add_image_folder(parser: argparse.ArgumentParser) -> None:
    """`--image_folder` and `--image_folder_only`, for the programs that do not train."""
    where = "where relative picture paths begin; default: the data file's folder"
    parser.add_argument("--image_folder", type=at_home, help=where)
    parser.add_argument(
        "--image_folder_only",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="true: samples whose picture lies outside --image_folder cannot be used; default: false",
    )


def load_config(path: str, cache_dir: str | None = None, flag: str = "--model_name_or_path") -> MiniCPMVConfig | str:
    """The configuration of the checkpoint `path` (a folder, or its name on the hub), or, in one sentence that begins
    with the flag, why there is none. A name whose first part is a folder here is a mistyped path, none on the hub."""
    named, path = f"{flag} {path}", at_home(path)
    if why := access_problem(path):
        return f"{named}: {why}"
    if not Path(path).is_dir():
        if not is_hub_name(path):
            return f"{named}: there is no such folder, and it is no hub name (owner/name)"
        if (parent := Path(path).parent).is_dir():
            return f"{named}: there is no such folder (nor is it taken for a hub name, since {parent} is a folder here)"
    elif not os.path.lexists(Path(path, CONFIG_NAME)):
        if Path(path, ADAPTER_CONFIG_NAME).is_file():
            return f"{named}: is an adapter; name its base model here, and the adapter with --lora_weight_path"
        return f"{named}: {in_place_of_a_model(path)}"
    elif problem := file_problem(Path(path, CONFIG_NAME), as_json=True):
        return f"{flag} {problem}"
    try:
        # Looked at before anything is made of it: of another kind, it may ask for code of its own to be run.
        content = PreTrainedConfig.get_config_dict(path, cache_dir=cache_dir)[0]
        kind = content.get("model_type")
        if kind != MiniCPMVConfig.model_type:
            return f"{named}: is a {kind!r} model, expected {MiniCPMVConfig.model_type!r}"
        if why := quantization_problem(content):
            return f"{named}: {why}"
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
        _ = config.llm_type
    except (OSError, ValueError) as error:
        return f"{named}: {error}"
    except (TypeError, AttributeError, KeyError, StrictDataclassError) as error:  # values of a wrong kind
        return f"{named}: its config.json describes no model ({' '.join(str(error).split())})"
    return config


def model_folder_problems(flag: str, path: str, weights: bool = True, cache_dir: str | None = None) -> list[str]:
    """What is wrong with the files of a model's folder, one line each, after the flag; of a name on the hub, with those
    that the cache has."""
    if Path(path).is_dir():
        return [f"{flag} {problem}" for problem in checkpoint_problems(path, weights)]
    try:
        folder = checkpoint_folder(path, cache_dir, download=False)
    except (OSError, ValueError):  # nothing of it is there yet
        return []
    return [f"{flag} {path}: {problem}" for problem in checkpoint_problems(folder, weights, partial=True)]


class FoundModel(NamedTuple):
    """What a user named as a model."""

    kind: str
    """"base checkpoint", "full checkpoint" (written by this toolkit) or "adapter" """
    path: str
    """folder, or name on the hub"""
    base: str
    """of an adapter, the folder or hub name of its base model; else the same as `path`"""
    config: MiniCPMVConfig
    """with the slices that the model was trained with"""
    trained_in: str | None
    """dtype of the training computation, where training settings say it: float32, bfloat16 or float16"""


def find_model(path: str, base: str | None = None, cache_dir: str | None = None, flag: str = "--model") -> FoundModel:
    """Find out what a folder or hub name is, from its small files alone.

    Args:
        base: of an adapter, in place of what its `adapter_config.json` says.
        flag: of the command line, for the message.

    Raises:
        UserError: saying what is there in place of a model.
    """
    named = f"{flag} {path}"
    folder = Path(at_home(path))
    if why := access_problem(folder):
        raise UserError(f"{named}: {why}")
    if folder.is_file():
        raise UserError(f"{named}: is a file; name the folder of the model")
    if folder.is_dir():
        path = str(folder)
        if os.path.lexists(folder / ADAPTER_CONFIG_NAME):
            return _found_adapter(path, base, cache_dir, flag)
        if not os.path.lexists(folder / CONFIG_NAME):
            raise UserError(f"{named}: {in_place_of_a_model(path)}")
    if base is not None:
        raise UserError(f"--base {base}: {named} is no adapter, it has all weights itself; leave --base out")
    config = load_config(path, cache_dir, flag)
    if isinstance(config, str):
        raise UserError(config)
    if problems := model_folder_problems(
        flag, path, weights=False, cache_dir=cache_dir
    ):  # that there are none, loading says
        raise UserError("\n".join(problems))
    trained = (folder / SETTINGS_NAME).is_file()
    try:
        dtype = resolved_settings(folder).get("dtype")
    except ValueError as error:
        raise UserError(f"{flag} {error}") from error
    return FoundModel("full checkpoint" if trained else "base checkpoint", path, path, config, dtype)


def _found_adapter(path: str, base: str | None, cache_dir: str | None, flag: str) -> FoundModel:
    if problems := adapter_problems(path):
        raise UserError("\n".join(f"{flag} {problem}" for problem in problems))
    try:
        place = base or base_of_adapter(path)
        config = load_config(place, cache_dir, "--base" if base else f"{flag} {path}: its base")
        settings = resolved_settings(path)
    except ValueError as error:
        raise UserError(f"{flag} {error}") from error
    if isinstance(config, str):
        raise UserError(config if base else f"{config}; say where the base model is now (--base DIR)")
    where = "--base" if base else f"{flag} {path}: its base"
    if problems := model_folder_problems(where, at_home(place), weights=False, cache_dir=cache_dir):
        raise UserError("\n".join(problems))
    if "slicing" in settings:
        config.set_max_slice_nums(settings["slicing"]["max_slice_nums"])
    return FoundModel("adapter", path, at_home(place), config, settings.get("dtype"))


def fitting_length(default: int, config: MiniCPMVConfig, share: int = 1) -> int:
    """A default length in tokens, or the part of the model's positions that is one of `share`, where that is less."""
    return max(1, min(default, config.max_position_embeddings // share))


def uses_gpu(device: str) -> bool:
    """Whether a model is put on GPUs.

    Args:
        device: auto, cpu or cuda, as `--device` says.
    """
    return device != "cpu" and torch.cuda.is_available()


def choose_dtype(asked: str, found: FoundModel, on_gpu: bool) -> tuple[str, str | None]:
    """Name of the dtype to load a model in, and what the user should know of it.

    auto: as the model was trained, else as its files are; without bfloat16 on the GPU float16 in its place; on a CPU
    bfloat16 in the place of float16, with which products of matrices take several times as long there.
    """
    if asked != "auto":
        slow = asked == "float16" and not on_gpu
        remark = "float16 is slow on CPUs; --dtype bfloat16 takes as much memory, float32 twice as much"
        return asked, remark if slow else None
    wanted = found.trained_in or str(found.config.dtype or torch.float32).removeprefix("torch.")
    if on_gpu and wanted == "bfloat16" and not found_precision(use_cpu=False)[0]:
        return "float16", "this GPU does not compute in bfloat16: loading in float16"
    if not on_gpu and wanted == "float16":
        remark = "loading in bfloat16, since float16 is slow on CPUs; --dtype float32 is exact, in twice the memory"
        return "bfloat16", remark
    return wanted if wanted in DTYPES else "float32", None


def load_found(
    found: FoundModel, dtype: str, device: str, processes: int = 1, cache_dir: str | None = None
) -> tuple[torch.nn.Module, object]:
    """The model in evaluation mode, and its tokenizer: on one GPU, on all of them, or on the CPU.

    Args:
        dtype: its name.
        device: auto (of one process: all GPUs), cpu or cuda.
        processes: of the call; each of several takes the GPU that it has set.

    Raises:
        ProcessError: when it cannot be loaded.
    """
    device_map: object = None  # without a map on CPUs, or peft would spread the model over the GPUs again
    if uses_gpu(device):
        device_map = "auto" if device == "auto" and processes == 1 else {"": torch.cuda.current_device()}
    base = found.base if found.kind == "adapter" else None
    try:
        return load_finetuned(found.path, base, dtype=DTYPES[dtype], device_map=device_map, cache_dir=cache_dir)
    except torch.OutOfMemoryError as error:
        cause = f"out of GPU memory in {dtype} ({str(error).splitlines()[0]}); try --dtype bfloat16 or --device cpu"
        raise ProcessError(f"the model {found.path} cannot be loaded: {cause}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ProcessError(f"the model {found.path} cannot be loaded: {' '.join(str(error).split())}") from error


def check_arguments(
    model: ModelArguments,
    data: DataArguments,
    training: TrainingArguments,
    lora: LoraArguments,
    config: MiniCPMVConfig | str,
) -> list[str]:
    """All that is wrong with the arguments, one line each; nothing is loaded but the configuration."""
    problems = list(training.found_in_parsing)
    if isinstance(config, str):
        problems.append(config)
    else:
        if training.llm_type is not None and training.llm_type != config.llm_type:
            problems.append(
                f"--llm_type {training.llm_type}: the checkpoint {model.model_name_or_path} is "
                f"{LLM_TYPES[config.llm_type]}, whose llm_type is {config.llm_type}; leave the flag out or correct it"
            )
        if "--model_max_length" not in training.flags_given:
            training.model_max_length = min(training.model_max_length, config.max_position_embeddings)
        if training.model_max_length > config.max_position_embeddings:
            problems.append(
                f"--model_max_length {training.model_max_length}: the language model was made for at most "
                f"{config.max_position_embeddings} tokens"
            )
    if not data.data_path:
        problems.append("--data_path is missing: the file with your training samples")
    for flag in ("data_path", "eval_data_path"):
        for path in getattr(data, flag) or ():
            if why := access_problem(path):
                problems.append(f"--{flag} {path}: {why}")
            elif not Path(path).exists():
                problems.append(f"--{flag} {path}: there is no such file or folder")
    if data.bad_samples not in ("fail", "skip"):
        problems.append(f"--bad_samples {data.bad_samples}: expected fail or skip")
    if data.image_folder and not Path(data.image_folder).is_dir():
        problems.append(f"--image_folder {data.image_folder}: there is no such folder")
    if data.image_folder_only and not data.image_folder:
        problems.append("--image_folder_only true needs --image_folder")
    if not isinstance(config, str):  # or the folder's problem is said already
        problems += model_folder_problems(
            "--model_name_or_path", model.model_name_or_path, cache_dir=training.cache_dir
        )
    if training.eval_strategy != "no" and not data.eval_data_path:
        problems.append(f"--eval_strategy {training.eval_strategy.value} needs --eval_data_path")
    problems += _prediction_problems(training, data)
    problems += _hardware_problems(model, training)
    available = get_available_reporting_integrations()
    if unknown := [name for name in training.report_to if name not in available]:
        problems.append(
            f"--report_to {' '.join(unknown)}: is unknown, or its package is missing; here are {', '.join(available)}, "
            "or none"
        )
    if training.n_gpu > 1:
        problems.append("several GPUs but one process: start with torchrun, as finetune_ds.sh and finetune_lora.sh do")
    problems += _liger_problems(training)
    problems += combination_problems(training, training.flags_given)
    problems += environment_problems(training)
    problems += trained_set_problems(training, lora)
    resume = training.resume_from_checkpoint
    conflicts = _output_dir_problems(model, data, training, lora) if training.output_dir else []
    earlier = _earlier_run_problem(training, results=not conflicts)
    problems += [*([earlier] if earlier else []), *conflicts]
    for flag, path in (("model_name_or_path", model.model_name_or_path), ("lora_weight_path", lora.lora_weight_path)):
        if training.overwrite_output_dir and training.output_dir and _is_in_checkpoint(path, training.output_dir):
            problems.append(
                f"--{flag} {path}: is a checkpoint in --output_dir, which --overwrite_output_dir true would move away; "
                "name another --output_dir"
            )
    if resume not in (None, "", *TRUE, *FALSE) and (why := fault(Path(resume))):
        problems.append(
            f"--resume_from_checkpoint {resume}: is no complete checkpoint ({why}); name one (OUTPUT_DIR/checkpoint-N) "
            "or say true for the newest in --output_dir"
        )
    return problems


def _earlier_run_problem(training: TrainingArguments, results: bool) -> str | None:
    """Why this run cannot use an `--output_dir` in which an earlier one, that it does not go on from, has left
    something.

    Args:
        results: also look for results; else for checkpoints alone.
    """
    output, resume = training.output_dir, training.resume_from_checkpoint
    if not output or access_problem(output) or training.overwrite_output_dir:
        return None
    if other := run_at_work(output):
        return f"--output_dir {output}: {other}. Wait for its end or stop it, or name another folder"
    last = newest_complete(output)
    if last and resume in (None, "", *FALSE):
        return (
            f"--output_dir {output} holds {Path(last).name} of an earlier run: go on with --resume_from_checkpoint "
            "true, start anew with --overwrite_output_dir true, or name another folder"
        )
    goes_on = last if resume in TRUE else resume and resume not in FALSE and contains(output, resume)
    found = described(Path(output)) if results and not goes_on else None
    return found and (
        f"--output_dir {output} holds {found} of an earlier run, and a folder holds one result: name another folder, "
        "or start with --overwrite_output_dir true, which moves the old one aside"
    )


def _output_dir_problems(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, lora: LoraArguments
) -> list[str]:
    """What is wrong with the place of `--output_dir`."""
    output, resume = training.output_dir, training.resume_from_checkpoint
    base = model.model_name_or_path
    if training.overwrite_output_dir and _is_in_checkpoint(base, output):
        base = None  # of which more is said
    paths = [("--data_path", path) for path in data.data_path or ()]
    paths += [("--eval_data_path", path) for path in data.eval_data_path or ()]
    problems = output_problems("--output_dir", output, [("--model_name_or_path", base)], paths)
    # Adapters and checkpoints of the same run lie in its folder; what lies in theirs would be written over them.
    started_from = {"--lora_weight_path": lora.lora_weight_path}
    started_from["--resume_from_checkpoint"] = None if resume in (*TRUE, *FALSE) else resume
    for flag, path in started_from.items():
        if path and os.path.exists(path) and contains(output, path) and contains(path, output):
            problems.append(
                f"--output_dir {output}: is the folder of {flag} {path}, which is read and must stay as it is; name "
                "another folder"
            )
    return problems


def _is_in_checkpoint(path: str, output_dir: str) -> bool:
    place, run = Path(path).resolve(), Path(output_dir).resolve()
    return place.is_relative_to(run) and place != run and place.relative_to(run).parts[0].startswith("checkpoint-")


def _hardware_problems(model: ModelArguments, training: TrainingArguments) -> list[str]:
    problems = []
    if training.fp16 and training.use_cpu:
        problems.append("--fp16 true: float16 trains on GPUs only; leave it out on a CPU")
    if model.attn_implementation not in ATTENTION:
        problems.append(f"--attn_implementation {model.attn_implementation}: expected {', '.join(ATTENTION)}")
    elif model.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        problems.append(
            "--attn_implementation flash_attention_2: needs a GPU and the flash-attn package (pip install flash-attn); "
            "sdpa, the default, trains with PyTorch's own flash kernel"
        )
    return problems


def _prediction_problems(training: TrainingArguments, data: DataArguments) -> list[str]:
    problems = []
    evaluates = training.eval_strategy != "no" and data.eval_data_path
    if training.predict_with_generate and not evaluates:
        problems.append("--predict_with_generate true needs --eval_data_path, and --eval_strategy steps or epoch")
    for flag in ("predict_samples", "predict_max_new_tokens"):
        if getattr(training, flag) != getattr(type(training), flag) and not training.predict_with_generate:
            problems.append(f"--{flag} only with --predict_with_generate true")
    best = training.metric_for_best_model
    name = (best or "loss").removeprefix("eval_")
    if name in METRICS and not training.predict_with_generate:
        problems.append(f"--metric_for_best_model {best} needs --predict_with_generate true")
    elif name not in ("loss", *METRICS):
        problems.append(f"--metric_for_best_model {best}: expected loss, {', '.join(METRICS[:-1])} or {METRICS[-1]}")
    return problems


def _liger_problems(training: TrainingArguments) -> list[str]:
    if not training.use_liger_kernel:
        return []
    problems = []
    if training.use_cpu:
        problems.append("--use_liger_kernel true: its kernels run on GPUs only")
    if not is_liger_kernel_available():
        problems.append("--use_liger_kernel true: the package is missing (pip install liger-kernel)")
    return problems


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """Folder that `--resume_from_checkpoint` means: the one named, or for `true` the newest complete one; None: start
    anew. All processes must call it."""
    resume = training.resume_from_checkpoint
    if resume not in TRUE:
        return None if resume in (None, "", *FALSE) else resume
    newest = newest_everywhere(training.output_dir, writes=training.should_save)
    if newest is None:
        logger.warning("no checkpoint in %s yet: training starts from the beginning", training.output_dir)
    return newest


def trained_set_problems(training: TrainingArguments, lora: LoraArguments) -> list[str]:
    """What is wrong with the flags that say what is trained, as far as the flags alone can tell."""
    problems = []
    if not (training.use_lora or training.tune_llm or training.tune_vision or training.tune_resampler):
        problems.append("nothing would be trained: set --tune_vision, --tune_llm, --tune_resampler or --use_lora true")
    if training.vision_learning_rate is not None:
        rate = training.vision_learning_rate
        if not training.tune_vision:
            problems.append(f"--vision_learning_rate {rate} only with --tune_vision true")
        if training.deepspeed and "optimizer" in training.deepspeed:
            problems.append(
                f'--vision_learning_rate {rate}: the "optimizer" block of the DeepSpeed file has one rate for all; '
                "remove the block"
            )
    if lora.q_lora:
        problems.append(
            "--q_lora true: comes with a later change; use --use_lora with ds_config_zero3_offload.json now"
        )
    if not training.use_lora:
        given = [f"--{f.name}" for f in fields(lora) if getattr(lora, f.name) != f.default and f.name != "q_lora"]
        if given:
            problems.append(f"{', '.join(given)} only with --use_lora true")
        return problems
    if training.tune_llm:
        problems.append("--use_lora true with --tune_llm true: LoRA keeps the language model frozen; choose one")
    if lora.lora_bias not in ("none", "all", "lora_only"):
        problems.append(f"--lora_bias {lora.lora_bias}: expected none, all or lora_only")
    if lora.lora_weight_path:
        adapter = lora.lora_weight_path
        if not access_problem(adapter) and not os.path.lexists(Path(adapter, ADAPTER_CONFIG_NAME)):
            problems.append(f"--lora_weight_path {adapter}: holds no {ADAPTER_CONFIG_NAME}")
        problems += [f"--lora_weight_path {problem}" for problem in adapter_problems(adapter)]
    try:
        re.compile(lora.lora_target_modules)
    except re.error as error:
        problems.append(f"--lora_target_modules {lora.lora_target_modules}: no regular expression ({error})")
    try:
        plain = re.fullmatch(r"[\w.,]+|(?i:all-linear)", lora.lora_target_modules)
        if lora.layers_to_transform and not plain and r"layers\.\d+" not in lora.lora_target_modules:
            problems.append(
                r"--lora_layers_to_transform needs plain names in --lora_target_modules, or layers\.\d+ in its "
                f"regular expression; found {lora.lora_target_modules}"
            )
    except ValueError:
        problems.append(f"--lora_layers_to_transform {lora.lora_layers_to_transform}: expected numbers")
    try:
        if any(len(span) != 2 for span in lora.layer_replication or ()):
            raise ValueError
    except (ValueError, TypeError):
        problems.append(f"--lora_layer_replication {lora.lora_layer_replication}: expected JSON like [[0, 4], [2, 5]]")
    return problems
