"""A complete checkpoint out of an adapter and its base, or out of an original checkpoint; no GPU needed.

    python finetune/merge_lora.py --adapter output/lora --output output/merged
    python finetune/merge_lora.py --modernize openbmb/MiniCPM-Llama3-V-2_5 --output output/modern

The first merges the LoRA matrices of an adapter (a result or a checkpoint-N) in float32, puts in the other trained
tensors, and stores every tensor in the dtype of the base: one tensor after another, so that one shard of the new
checkpoint is in memory at a time. The second puts our model code beside a checkpoint's own weights, which are linked.
Either folder loads anywhere with trust_remote_code=True on transformers 5.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

if __name__ == "__main__":  # the folder above in the place of this one, where `import evaluate` would find ours
    here = Path(__file__).resolve().parent  # which is not on the path with python -P
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from finetune.arguments import DTYPES, load_config, model_folder_problems
from finetune.checkpoints import MANIFEST, copy_processor, write_manifest
from finetune.errors import UserError
from finetune.loading import (
    SETTINGS_NAME,
    checkpoint_folder,
    load_tokenizer,
    named_base,
    other_base_problems,
    read_record,
    recorded_weights,
    resolved_settings,
    tensor_reader,
)
from finetune.minicpmv import LLM_TYPES, MiniCPMV, MiniCPMVConfig
from finetune.minicpmv.modeling_minicpmv import AUTO_MAP
from finetune.model_card import write_card
from finetune.model_folder import (
    ADAPTER_CONFIG_NAME,
    HEAD,
    access_problem,
    adapter_fit,
    adapter_problems,
    checkpoint_problems,
    describe,
    empty_adapter,
    empty_model,
    weight_files,
    weight_problems,
)
from finetune.places import at_home, contains, model_conflicts, writing_problem
from finetune.reporting import write_settings
from finetune.run_lock import only_one_writes

logger = logging.getLogger("finetune")

ADAPTER = "default"  # peft's name for the one adapter of a model
EMBEDDINGS = "llm.model.embed_tokens.weight"
MARK = ".merge_lora"  # lies in an unfinished output folder, which the next call may delete
ROOM_FOR_THE_REST = 64 * 2**20  # bytes: tokenizer, code, configuration
AT_ONCE = 2**20  # elements; rounding is measured in parts of this size
LARGE_LOSS = 0.5
# peft can do more than this. What it does to a weight need not be a sum that is the same for every input, or starts
# from weights other than the base's; a setting that is not listed here is refused, not ignored.
MERGEABLE = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    r lora_alpha rank_pattern alpha_pattern lora_dropout use_rslora use_dora fan_in_fan_out init_lora_weights
    target_modules exclude_modules layers_to_transform layers_pattern layer_replication
    bias lora_bias modules_to_save ensure_weight_tying
"""
UNCHANGED_BASE = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights


def merge(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = None,
    cache_dir: str | None = None,
) -> dict[str, Rounding]:
    """Write the complete checkpoint that an adapter makes of its base.

    Args:
        adapter: result of a LoRA run or a checkpoint of it.
        output: folder to write, new or empty.
        base: folder or hub name; None: what `adapter_config.json` names.
        dtype: of all tensors; None: as the base stores each of them.
        cache_dir: where a base from the hub is, or goes.

    Returns:
        What rounding to the stored dtype did to "LoRA matrices" and to "other trained tensors".

    Raises:
        UserError: with all problems, before any tensor is read; when the output cannot be written, or a merged value
            does not fit the dtype.
    """
    adapter, output = at_home(os.fspath(adapter)), at_home(os.fspath(output))
    read = [("--adapter", adapter), ("--base", named_base(adapter) if base is None else base)]
    problems = [*_output_problems(Path(output), read), *_shard_problems(max_shard_size)]
    own = _adapter_problems(Path(adapter))
    problems += own
    peft_config = None if own else _adapter_config(Path(adapter), problems)
    plan = None
    if peft_config is not None:
        plan = _Merge.planned(Path(adapter), peft_config, base, dtype, cache_dir, problems)
    elif base is not None and isinstance(config := load_config(str(base), cache_dir, "--base"), str):
        problems.append(config)
    _stop_on(problems)
    shards = split_torch_state_dict_into_shards(plan.described(), max_shard_size=max_shard_size)
    with only_one_writes(output), _written_aside(Path(output), shards.metadata["total_size"]) as aside:
        with tqdm(total=shards.metadata["total_size"], unit="B", unit_scale=True, desc="merging") as bar:
            for file, names in shards.filename_to_tensors.items():
                tensors = {}
                for name in names:
                    tensors[name] = plan.tensor(name)
                    bar.update(tensors[name].nbytes)
                save_file(tensors, aside / file, metadata={"format": "pt"})
                _compare(aside / file, tensors)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True)
            (aside / SAFE_WEIGHTS_INDEX_NAME).write_text(text + "\n", encoding="utf-8")
        _write_all_but_weights(plan.config, plan.base, plan.tokenizer, aside)
        write_settings(_merged_settings(Path(adapter), dtype), aside)
        write_card(aside, Path(output).resolve().name, merged_from=adapter)
    return plan.rounding


def modernize(
    source: str | os.PathLike, output: str | os.PathLike, cache_dir: str | None = None
) -> tuple[int, dict[str, int]]:
    """Write a folder that loads anywhere on transformers 5 out of a checkpoint as it came from the hub: its weights,
    linked, with our model code, its tokenizer and its configuration. The source stays as it is.

    Returns:
        bytes of weights, and how many files are a "hard link" and a "symbolic link".

    Raises:
        UserError: with all problems.
    """
    source, output = at_home(os.fspath(source)), at_home(os.fspath(output))
    problems = _output_problems(Path(output), [("--modernize", source)])
    if not access_problem(source) and Path(source, ADAPTER_CONFIG_NAME).is_file():
        problems.append(f"--modernize {source}: is an adapter; merge it with --adapter {source}")
        _stop_on(problems)
    config = load_config(str(source), cache_dir, "--modernize")
    if isinstance(config, str):
        _stop_on([*problems, config])
    files, tokenizer, folder = [], None, Path(source)
    try:
        folder = checkpoint_folder(source, cache_dir)
        wrong = model_folder_problems("--modernize", str(folder))
        if not wrong:
            tokenizer = load_tokenizer(folder)
            files = weight_files(folder)
            found = {name: tensor for file in files for name, tensor in describe(file).items()}
            wrong = _weight_problems(f"--modernize {source}", config, found)
        problems += wrong
    except (OSError, ValueError) as error:
        problems.append(f"--modernize {source}: {error}")
    _stop_on(problems)
    links = {"hard link": 0, "symbolic link": 0}
    with only_one_writes(output), _written_aside(Path(output), 0) as aside:
        for file in files:
            links[_link(file.resolve(), aside / file.name)] += 1
        for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            if len(files) > 1 and (folder / index).is_file():
                shutil.copyfile(folder / index, aside / index)
        _write_all_but_weights(config, folder, tokenizer, aside)
    return sum(file.stat().st_size for file in files), links


@dataclass
class Rounding:
    """What storing changed tensors in a dtype of few bits leaves of the changes."""

    changed: int = 0  # values that training changed
    vanished: int = 0  # of them, values that are stored as they were before
    square: float = 0.0  # sum of squares of the changes
    square_lost: float = 0.0  # and of what rounding did to them

    def see(self, before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor) -> None:
        """Count a tensor: as in the base, as it should be, as it is stored; all of one shape."""
        parts = (tensor.flatten().split(AT_ONCE) for tensor in (before, wanted, stored))
        for old, exact, new in zip(*parts, strict=True):
            old, exact, new = old.float(), exact.float(), new.float()
            change = exact - old
            self.changed += int(change.count_nonzero())
            self.vanished += int(((change != 0) & (new == old)).sum())
            self.square += float(change.square().sum(dtype=torch.float64))
            self.square_lost += float((new - exact).square().sum(dtype=torch.float64))

    @property
    def loss(self) -> float:
        """Norm of the rounding against the norm of the changes."""
        return (self.square_lost / self.square) ** 0.5 if self.square else 0.0

    @property
    def vanished_part(self) -> float:
        return self.vanished / self.changed if self.changed else 0.0


@dataclass
class _Merge:
    """Everything that is known of a merge before tensors are read, and the tensors, one by one.

    `network` is the adapter's model on the device "meta". What a parameter's value is comes from `sources`, by the
    parameter's identity: layers that `layer_replication` stacked anew share their parameters.
    """

    adapter: Path
    base: Path
    base_name: str
    config: MiniCPMVConfig
    tokenizer: object
    network: PeftModel
    sources: dict[int, tuple[Path, str]]  # file and name within, by id of the parameter
    base_sources: dict[int, tuple[Path, str]]
    outputs: dict[str, torch.Tensor]  # the network's tensors by the names that they get
    dtypes: dict[str, torch.dtype]
    layers: dict[str, LoraLayer]  # by the name of the module, as in `outputs`
    rounding: dict[str, Rounding] = field(
        default_factory=lambda: {"LoRA matrices": Rounding(), "other trained tensors": Rounding()}
    )
    _merged: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def planned(
        cls,
        adapter: Path,
        peft_config: LoraConfig,
        base: str | os.PathLike | None,
        dtype: torch.dtype | None,
        cache_dir: str | None,
        problems: list[str],
    ) -> _Merge | None:
        """Look at everything but values; what is wrong is added to `problems`."""
        named = base is not None
        if not named and not peft_config.base_model_name_or_path:
            problems.append(f"{adapter}: adapter_config.json names no base; name it with --base DIR")
            return None
        base_name = str(base if named else peft_config.base_model_name_or_path)
        flag = "--base" if named else "adapter_config.json names its base as"
        config = load_config(base_name, cache_dir, flag)
        if isinstance(config, str):
            help_ = "" if named else "; name the base with --base DIR"
            problems.append(f"{config}{help_}")
            return None
        said = resolved_settings(adapter)
        if said.get("llm_type", config.llm_type) != config.llm_type:
            problems.append(
                f"{flag} {base_name}: is {LLM_TYPES[config.llm_type]}, but the adapter was trained on "
                f"{LLM_TYPES.get(said['llm_type'], said['llm_type'])}; name that one with --base DIR"
            )
            return None
        try:
            folder = checkpoint_folder(base_name, cache_dir, None if named else peft_config.revision)
            if wrong := checkpoint_problems(folder):
                problems += [f"{flag} {problem}" for problem in wrong]
                return None
            files = weight_files(folder)
            found = {name: (file, tensor) for file in files for name, tensor in describe(file).items()}
            wrong = _weight_problems(
                f"{flag} {base_name}", config, {name: tensor for name, (_, tensor) in found.items()}
            )
        except (OSError, ValueError) as error:
            problems.append(f"{flag} {base_name}: {error}")
            return None
        problems += wrong or other_base_problems(f"{flag} {base_name}", adapter, folder)
        if not recorded_weights(adapter):
            why = "records no values of its base" if (adapter / SETTINGS_NAME).is_file() else "is missing"
            logger.warning("%s %s: of the base only names and shapes are checked", adapter / SETTINGS_NAME, why)
        tokenizer = None
        try:
            tokenizer = load_tokenizer(adapter, base=folder)
        except ValueError as error:
            problems.append(str(error))
        model = empty_model(config)
        own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in found}
        try:
            network = empty_adapter(model, adapter)
        except ValueError as error:
            problems.append(f"{adapter}: the adapter does not fit {base_name}: {error}")
            return None
        without = [
            name
            for name, layer in network.named_modules()
            if isinstance(layer, LoraLayer) and any(layer.lora_bias.values()) and layer.get_base_layer().bias is None
        ]
        if without:
            problems.append(f"{adapter}: has LoRA biases (lora_bias) for layers without one: {', '.join(without[:5])}")
        adapter_sources, misfits = adapter_fit(network, adapter, base_name)
        problems += misfits
        if problems:
            return None
        base_sources = {id(tensor): (found[name][0], name) for name, tensor in own.items()}
        merged = cls(
            adapter=adapter,
            base=folder,
            base_name=base_name,
            config=config,
            tokenizer=tokenizer,
            network=network,
            sources=base_sources | adapter_sources,
            base_sources=base_sources,
            outputs={},
            dtypes={},
            layers={},
        )
        merged._lay_out(peft_config, {name: tensor.dtype for name, (_, tensor) in found.items()}, dtype, said)
        return merged

    def _lay_out(
        self, peft_config: LoraConfig, stored: dict[str, torch.dtype], dtype: torch.dtype | None, said: dict
    ) -> None:
        """Names, dtypes and configuration of the new checkpoint."""
        model, config = self.network.get_base_model(), self.config
        for name, tensor in model.state_dict(keep_vars=True).items():
            if ".lora_" not in name and ".original_module." not in name:
                self.outputs[_plain(name)] = tensor
        self.layers = {
            _plain(name): module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and ".original_module." not in f"{name}."
        }
        changed = [_plain(f"{name}.weight") for name in self.layers]
        if config.tie_word_embeddings:
            if self.outputs[HEAD] is self.outputs[EMBEDDINGS] and not {HEAD, EMBEDDINGS} & set(changed):
                del self.outputs[HEAD]
            else:
                config.tie_word_embeddings = False
        if dtype is not None:
            config.dtype = dtype
        for name, tensor in self.outputs.items():
            _, source = self.base_sources.get(id(tensor), (None, name))
            kept = stored.get(source) or stored[EMBEDDINGS]
            self.dtypes[name] = dtype if dtype is not None and kept.is_floating_point else kept
        if peft_config.layer_replication:
            layers = sum(end - start for start, end in peft_config.layer_replication)
            if config.scale_depth is not None:  # 2.0's residual branches count scale_depth / sqrt(layers), as before
                config.scale_depth *= (layers / config.num_hidden_layers) ** 0.5
            config.num_hidden_layers = layers
        if "slicing" in said:
            config.set_max_slice_nums(said["slicing"]["max_slice_nums"])

    def described(self) -> dict[str, torch.Tensor]:
        """The tensors of the new checkpoint by name, on the device "meta"."""
        return {
            name: torch.empty(tensor.shape, dtype=self.dtypes[name], device="meta")
            for name, tensor in self.outputs.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the new checkpoint.

        Raises:
            UserError: when it holds a value that is no number, or one that the dtype cannot hold.
        """
        place, dtype = self.outputs[name], self.dtypes[name]
        layer = self.layers.get(name.rpartition(".")[0])
        if layer is not None:
            wanted, kind = self._merged_layer(name, layer), "LoRA matrices"
        else:
            wanted, kind = self._value(place, self.sources), "other trained tensors"
            if self.sources[id(place)] == self.base_sources.get(id(place)):
                kind = None
        stored = wanted.to(dtype).contiguous()
        if (kind or stored.dtype != wanted.dtype) and not stored.isfinite().all():
            if not wanted.isfinite().all():
                raise UserError(f"{name}: holds values that are no numbers, in {self.adapter} or in {self.base}")
            raise UserError(
                f"{name}: holds values up to {float(wanted.abs().max()):.3g}, more than {str(dtype)[6:]} can hold; "
                "merge with --dtype bfloat16"
            )
        if kind is None:
            return stored
        before = self.base_sources.get(id(place))
        before = self._value(place, self.base_sources) if before else self._base_value(name)
        self.rounding[kind].see(before, wanted, stored)
        return stored

    def _merged_layer(self, name: str, layer: LoraLayer) -> torch.Tensor:
        """Weight or bias of a layer with its LoRA matrices merged into it, in float32; by peft's own code."""
        if name not in self._merged:
            module, places = name.rpartition(".")[0], dict(layer.named_parameters())
            values = {part: self._value(place, self.sources).float() for part, place in places.items()}
            layer.load_state_dict(values, assign=True)
            with torch.no_grad():
                layer.merge(adapter_names=[ADAPTER])
            for part, value in layer.get_base_layer().named_parameters():
                self._merged[f"{module}.{part}"] = value.data
            layer.load_state_dict(places, assign=True)
        return self._merged.pop(name)

    def _value(self, place: torch.Tensor, sources: dict[int, tuple[Path, str]]) -> torch.Tensor:
        """Of a parameter of the network, in the dtype that it is stored in."""
        file, name = sources[id(place)]
        try:
            return tensor_reader(file)(name)
        except (OSError, ValueError, RuntimeError) as error:  # since it was looked at; or its disk fails
            raise UserError(f"{file}: cannot be read: {error}; nothing is written") from error

    def _base_value(self, name: str) -> torch.Tensor:
        """The base's tensor in whose place peft put one of its own (modules_to_save)."""
        original = self.network.get_base_model().get_parameter(_original(self.network, name))
        return self._value(original, self.base_sources)


def _plain(name: str) -> str:
    """The hub's name for a tensor or module of a PeftModel's base model."""
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


def _original(network: PeftModel, name: str) -> str:
    for found in network.get_base_model().state_dict():
        if ".original_module." in found and found.replace(".original_module.", ".") == name:
            return found
    raise KeyError(name)


def _adapter_problems(adapter: Path) -> list[str]:
    """What is missing in an adapter folder, or what else the folder is."""
    if why := access_problem(adapter):
        return [f"--adapter {adapter}: {why}"]
    if not adapter.is_dir():
        return [f"--adapter {adapter}: there is no such folder"]
    if not os.path.lexists(adapter / ADAPTER_CONFIG_NAME):
        inside = sorted(path.parent.name for path in adapter.glob("checkpoint-*/adapter_config.json"))
        if inside:
            found = f"is no adapter, but holds {', '.join(inside)}; name one of them"
        elif (adapter / "config.json").is_file():
            found = "is a complete checkpoint (it has a config.json), with nothing to merge; expected an adapter"
        else:
            names = sorted(path.name for path in adapter.iterdir())
            found = f"is no adapter; expected adapter_config.json, found {', '.join(names[:5]) or 'nothing'}"
        return [f"--adapter {adapter}: {found}"]
    problems = [f"--adapter {problem}" for problem in adapter_problems(adapter)]
    try:
        resolved_settings(adapter)
    except ValueError as error:
        problems.append(f"--adapter {error}")
    return problems


def _adapter_config(adapter: Path, problems: list[str]) -> LoraConfig | None:
    """`adapter_config.json`; what in it cannot be merged is added to `problems`."""
    where = adapter / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, OSError) as error:
        problems.append(f"{where}: cannot be read: {error}")
        return None
    if type(config) is not LoraConfig:
        problems.append(f"{where}: has peft_type {config.peft_type}; expected LORA")
        return None
    usual = LoraConfig()
    other = [
        f"{setting.name} {getattr(config, setting.name)}"
        for setting in fields(config)
        if setting.name not in MERGEABLE.split() and getattr(config, setting.name) != getattr(usual, setting.name, None)
    ]
    if config.init_lora_weights not in UNCHANGED_BASE:
        other.append(f"init_lora_weights {config.init_lora_weights}")
    if other:
        problems.append(f"{where}: has settings that cannot be merged here: {', '.join(other)}")
        return None
    return config


def _weight_problems(where: str, config: MiniCPMVConfig, found: dict[str, torch.Tensor]) -> list[str]:
    """`weight_problems`; tensors that are not the model's are left out, with a warning."""
    model = empty_model(config)
    expected = model.state_dict()
    if further := [name for name in found if name not in expected and name != HEAD]:
        logger.warning("%s: leaves out %d tensors that are not the model's: %s", where, len(further), further[:5])
    return weight_problems(where, model, found)


def _merged_settings(adapter: Path, dtype: torch.dtype | None) -> dict:
    """`training_settings.json` of the new checkpoint: the adapter's, and where it comes from. It is loaded in the dtype
    that it was trained in, but for a `dtype` that was asked for: others could lose what that one keeps."""
    settings = read_record(adapter / SETTINGS_NAME)
    if dtype is not None:
        settings["resolved"] = {**resolved_settings(adapter), "dtype": str(dtype).removeprefix("torch.")}
    return {**settings, "merged_from": str(adapter.resolve())}


def _write_all_but_weights(config: MiniCPMVConfig, source: Path, tokenizer: object, folder: Path) -> None:
    """Configuration, model code, tokenizer and, where `source` has them, generation settings and processor."""
    config.architectures = [MiniCPMV.__name__]
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(folder)  # the configuration's code with it
    with torch.device("meta"):
        model = MiniCPMV(config)
    custom_object_save(model, folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_processor(source, folder, config.slicing["max_slice_nums"])


def _link(source: Path, target: Path) -> str:
    try:
        os.link(source, target)
    except OSError:  # on another disk, or one without hard links
        target.symlink_to(source)
        return "symbolic link"
    return "hard link"


def _compare(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read a file back.

    Raises:
        UserError: when it does not hold these tensors.
    """
    read = tensor_reader(file)
    if describe(file).keys() != tensors.keys():
        raise UserError(f"{file}: was not written well; try again")
    for name, tensor in tensors.items():
        found = read(name)
        if found.dtype != tensor.dtype or not torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)):
            raise UserError(f"{file}: {name} was not written well; try again")


def _output_problems(output: Path, read: Sequence[tuple[str, str | os.PathLike | None]]) -> list[str]:
    """What is wrong with the place of the output.

    Args:
        read: flags with the folders that the call reads.
    """
    if conflicts := model_conflicts("--output", output, read):
        return conflicts
    if why := access_problem(output):
        return [f"--output {output}: {why}"]
    if output.is_dir() and os.path.ismount(output.resolve()):
        return [f"--output {output}: is where a disk is mounted, which cannot be replaced; name a folder within it"]
    if output.is_file():
        return [f"--output {output}: is a file; name a folder, new or empty"]
    if output.is_dir() and any(output.iterdir()):
        return [f"--output {output}: is not empty; nothing is overwritten, name another folder"]
    aside = _aside(output)
    if aside.exists() and not (aside / MARK).is_file():
        return [f"--output {output}: is written as {aside} first, which exists and is not ours; move it away"]
    why = writing_problem(output.parent)
    return [f"--output {output}: its folder {why}"] if why else []


def _shard_problems(max_shard_size: str) -> list[str]:
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        return [f"--max_shard_size {max_shard_size}: {error}; expected such as 5GB or 500MB"]
    return []


def _aside(output: Path) -> Path:
    output = output.resolve()
    return output.with_name(f"{output.name}.incomplete")


@contextmanager
def _written_aside(output: Path, size: int) -> Iterator[Path]:
    """Yields a folder beside `output` to write in, which gets its name when all of it is on the disk.

    Args:
        size: bytes of weights that will be written.

    Raises:
        UserError: when there is too little room, or writing fails; then nothing is left.
    """
    output, aside = output.resolve(), _aside(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():
            logger.warning("%s is left of a call that was cut off, and is written anew", aside)
            shutil.rmtree(aside)
        free = shutil.disk_usage(output.parent).free
        if free < size + ROOM_FOR_THE_REST:
            raise UserError(
                f"--output {output}: needs {(size + ROOM_FOR_THE_REST) / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free "
                "there; make room or name a folder on another disk"
            )
        aside.mkdir()
        (aside / MARK).touch()
        yield aside
        linked = [path for path in aside.iterdir() if path.is_symlink() or path.stat().st_nlink > 1]
        try:
            write_manifest(aside, leave_out=linked)
        except ValueError as error:
            raise UserError(f"{error}; try again") from error
        (aside / MANIFEST).unlink()
        (aside / MARK).unlink()
        os.replace(aside, output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        read = getattr(error, "filename", None)
        # A copy that finds the disk full names the file that it reads first, and the one that it writes second.
        written = read is None or getattr(error, "filename2", None) is not None
        if not (written or contains(aside, read) or contains(read, output)):
            raise UserError(f"{read}: cannot be read: {error.strerror}; nothing is written") from error
        raise UserError(f"--output {output}: cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: whatever is wrong ends in its message and exit status 1, without a traceback."""
    parser = argparse.ArgumentParser(
        description="Merge an adapter into its base, or put our model code beside an original checkpoint.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", type=at_home, help="result folder of a LoRA run, or a checkpoint-N of it")
    what.add_argument(
        "--modernize", metavar="MODEL", type=at_home, help="original checkpoint: a folder, or its name on the hub"
    )
    parser.add_argument("--output", required=True, type=at_home, help="folder to write, new or empty")
    parser.add_argument(
        "--base", type=at_home, help="the adapter's base: folder or hub name; default: as adapter_config.json says"
    )
    parser.add_argument("--max_shard_size", help="most bytes in a file of weights, such as 500MB; default: 5GB")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), help="of the merged weights; auto: as the base has them")
    parser.add_argument("--cache_dir", help="folder for what is downloaded from the hub")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="merge_lora.py: %(message)s")
    try:
        if arguments.modernize is not None:
            flags = [
                f"--{name}" for name in ("base", "max_shard_size", "dtype") if getattr(arguments, name) is not None
            ]
            _stop_on([f"{', '.join(flags)}: only with --adapter"] if flags else [])
            size, links = modernize(arguments.modernize, arguments.output, arguments.cache_dir)
            kinds = " and ".join(f"{count} {kind}{'s'[: count - 1]}" for kind, count in links.items() if count)
            lines = [f"wrote {arguments.output}: {size / 1e9:.2f} GB of weights as {kinds}, with our model code"]
            if links["symbolic link"]:
                lines.append("symbolic links hold only as long as the original stays where it is")
        else:
            rounding = merge(
                arguments.adapter,
                arguments.output,
                arguments.base,
                arguments.max_shard_size or "5GB",
                DTYPES.get(arguments.dtype),
                arguments.cache_dir,
            )
            size = sum(file.stat().st_size for file in weight_files(arguments.output))
            lines = [f"wrote {arguments.output}: {size / 1e9:.2f} GB of weights", *_rounding_lines(rounding)]
    except UserError as error:
        sys.exit(f"merge_lora.py: {error}")
    command = f"python finetune/chat.py --model {shlex.quote(arguments.output)} --image my/picture.jpg"
    lines.append(f"to use it: {command} --question 'What is in the picture?'")
    sys.stdout.write("\n".join(lines) + "\n")


def _rounding_lines(rounding: dict[str, Rounding]) -> Iterator[str]:
    for kind, seen in rounding.items():
        if not seen.changed:
            continue
        yield (
            f"{kind}: changed {seen.changed:,} values; rounding to the stored dtype took {seen.loss:.1%} of the "
            f"change, and all of it from {seen.vanished_part:.1%} of the values"
        )
        if seen.loss > LARGE_LOSS:
            yield (
                f"warning: most of what the {kind} changed is lost in rounding; merge with --dtype float32, or use the "
                "adapter without merging"
            )


def _stop_on(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    main()
