"""Whether the folder of a model or of an adapter holds what its files' names say, for all programs and for Python.

Judged from the first bytes of files and from their tables of contents: no tensor is read, no code is run. Files of
PyTorch before 1.6 have no table of contents, and are read from end to end where their names and shapes are asked for.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from finetune.checkpoints import checkpoint_steps, newest_complete
from finetune.minicpmv import MiniCPMV, MiniCPMVConfig
from finetune.result_folder import ADAPTER_CONFIG_NAME, ADAPTER_FILES, EXTRA_WEIGHTS_NAME, two_results_problem
from finetune.safe_files import code_in

CONFIG_NAME = "config.json"
HEAD = "llm.lm_head.weight"
POINTER = b"version https://git-lfs.github.com/spec/"
TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_OTHER = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")
MODEL_JSON = (CONFIG_NAME, "generation_config.json", "preprocessor_config.json")
RIGHTS = "give yourself the right to read it (chmod), or make a copy that is yours"
ANEW = "copy or download it anew"
NAMED = 5  # names in a message; of more, it says how many


def access_problem(folder: str | os.PathLike) -> str | None:
    """Why what is in a folder cannot be looked at, without its name; None also where there is no such folder."""
    try:
        if stat.S_ISDIR(Path(folder).stat().st_mode):
            os.scandir(folder).close()
            Path(folder, CONFIG_NAME).exists()  # a folder may be listed and its files out of reach all the same
    except OSError as error:
        return None if isinstance(error, FileNotFoundError | NotADirectoryError) else _refusal(error)
    return None


def file_problem(path: str | os.PathLike, as_json: bool = False) -> str | None:
    """Why a file is not what its name says, as far as its first bytes tell.

    Args:
        as_json: also whether it is a JSON object.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(len(POINTER))
    except FileNotFoundError:
        if Path(path).is_symlink():
            return f"{path}: is a link to {Path(path).readlink()}, where there is no file (any more); {ANEW}"
        return f"{path}: is missing; {ANEW}"
    except OSError as error:
        return f"{path}: {_refusal(error)}"
    if not head:
        return f"{path}: is empty (0 bytes); {ANEW}"
    if head == POINTER:
        return (
            f"{path}: is a git-lfs pointer, not the file itself; fetch it with git lfs pull in its folder, or download "
            "the folder anew"
        )
    if as_json:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{path}: cannot be read, it is no JSON ({_one_line(error)}); {ANEW}"
        if not isinstance(content, dict):
            return f"{path}: expected a JSON object, found {type(content).__name__}; {ANEW}"
    return None


def _refusal(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"may not be read: {error.strerror}; {RIGHTS}"
    return f"cannot be read: {error.strerror or error}"


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}"


def checkpoint_problems(folder: str | os.PathLike, weights: bool = True, partial: bool = False) -> list[str]:
    """What is wrong with the files of a checkpoint's folder, each by itself, one line each.

    Args:
        weights: there must be some; those that are there are looked at in any case.
        partial: what is missing may still be downloaded.
    """
    folder = Path(folder)
    if why := access_problem(folder):
        return [f"{folder}: {why}"]
    if not os.path.lexists(folder / CONFIG_NAME):
        return [f"{folder}: {in_place_of_a_model(folder)}"]
    if why := two_results_problem(folder):
        return [f"{folder}: {why}"]
    problems = _problems_of(folder, MODEL_JSON, as_json=True)
    if not file_problem(folder / CONFIG_NAME, as_json=True):
        why = quantization_problem(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
        problems += [f"{folder}: {why}"] if why else []
    problems += tokenizer_problems(folder)
    return problems + _weight_file_problems(folder, weights and not partial, partial)


def tokenizer_problems(folder: str | os.PathLike) -> list[str]:
    """Likewise of its tokenizer's files, those that are there."""
    return [*_problems_of(folder, TOKENIZER_JSON, as_json=True), *_problems_of(folder, TOKENIZER_OTHER)]


def adapter_problems(folder: str | os.PathLike) -> list[str]:
    """What is wrong with the files of an adapter's folder, each by itself, one line each; what is missing, too."""
    folder = Path(folder)
    if why := access_problem(folder):
        return [f"{folder}: {why}"]
    if why := two_results_problem(folder):
        return [f"{folder}: {why}"]
    problems = _problems_of(folder, (ADAPTER_CONFIG_NAME,), as_json=True)
    problems += _problems_of(folder, (*ADAPTER_FILES, EXTRA_WEIGHTS_NAME))
    problems = problems or missing_in_adapter(folder)
    problems += tokenizer_problems(folder)
    return problems or weights_with_code(folder) or damaged(adapter_weights(folder))


def _problems_of(folder: str | os.PathLike, names: Sequence[str], as_json: bool = False) -> list[str]:
    """Of the files that are there, links that lead nowhere among them."""
    files = [Path(folder, name) for name in names if os.path.lexists(Path(folder, name))]
    return [problem for file in files if (problem := file_problem(file, as_json))]


def _weight_file_problems(folder: Path, needed: bool, partial: bool) -> list[str]:
    kinds = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    named = next((name for name in kinds if os.path.lexists(folder / name)), None)
    if named is not None and (problem := file_problem(folder / named, as_json=named.endswith(".json"))):
        return [problem]
    try:
        files = weight_files(folder)
    except ValueError as error:
        files = [file for pattern in ("pytorch_model*.bin", "model*.safetensors") for file in folder.glob(pattern)]
        loose = [problem for file in sorted(files) if (problem := file_problem(file))]
        if partial:
            return loose or weights_with_code(folder) or damaged(files)
        said = [str(error)] if needed or named is not None else []
        return loose or weights_with_code(folder) or said
    if problems := [problem for file in files if (problem := file_problem(file))]:
        return problems
    return weights_with_code(folder) or damaged(files)


def damaged(files: Sequence[Path]) -> list[str]:
    """Why files of weights cannot be read, one line each; those that hold code have been sorted out before."""
    problems = []
    for file in files:
        if file.suffix != ".safetensors" and not zipfile.is_zipfile(file):
            continue  # of PyTorch before 1.6: `weights_with_code` has read it from end to end
        try:
            describe(file)
        except OSError as error:
            problems.append(f"{file}: {_refusal(error)}")
        except ValueError as error:  # names the file
            problems.append(str(error))
    return problems


def quantization_problem(config: Mapping) -> str | None:
    """Why the model of this `config.json` cannot be loaded or trained: it is quantized. Without its name."""
    found = config.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    return (
        f"is quantized (quantization_config in config.json, quant_method {method!r}), which cannot be used here; name "
        "the model with the original weights, of 16 or 32 bits"
    )


def in_place_of_a_model(folder: str | os.PathLike) -> str:
    """What a folder without config.json is, in words that follow its name."""
    if checkpoint_steps(folder):
        newest = newest_complete(folder)
        if newest is None:
            return "holds no model, but checkpoints, none of which is complete"
        return f"holds no model, but checkpoints; name one of them, the newest is {newest}"
    if snapshot := _snapshot(Path(folder)):
        return f"is a model's folder in the hub's cache; the model itself is in {snapshot}: name that, or its hub name"
    inside = sorted(str(path.parent) for path in Path(folder).glob(f"*/{CONFIG_NAME}"))
    if inside:
        return f"holds no model, but folders of models; name one of them, such as {inside[0]}"
    return f"holds no model: neither config.json (a checkpoint) nor {ADAPTER_CONFIG_NAME} (an adapter)"


def _snapshot(folder: Path) -> Path | None:
    """In `models--owner--name`, or the `snapshots` in it, of the hub's cache: its main branch, else the newest."""
    root = folder.parent if folder.name == "snapshots" else folder
    found = [path.parent for path in root.glob(f"snapshots/*/{CONFIG_NAME}")]
    with suppress(OSError, ValueError):
        main = root / "snapshots" / (root / "refs" / "main").read_text(encoding="utf-8").strip()
        if main in found:
            return main
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def missing_in_adapter(folder: str | os.PathLike) -> list[str]:
    """The files of weights that an adapter folder lacks, one line each; or that it is another kind of adapter, for some
    of which PEFT would fetch from the hub what their configuration names."""
    problems = []
    with suppress(OSError, ValueError, AttributeError):  # named by those who need more of it
        kind = json.loads(Path(folder, ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            return [f"{Path(folder, ADAPTER_CONFIG_NAME)}: peft_type is {kind!r}, expected LORA"]
    if not any(Path(folder, name).is_file() for name in ADAPTER_FILES):
        problems.append(f"{Path(folder, ADAPTER_FILES[0])} is missing: the folder holds no LoRA matrices")
    if not Path(folder, EXTRA_WEIGHTS_NAME).is_file():
        problems.append(
            f"{Path(folder, EXTRA_WEIGHTS_NAME)} is missing: the folder holds an adapter without the other trained "
            "weights"
        )
    return problems


def adapter_weights(folder: str | os.PathLike) -> list[Path]:
    """The file of the LoRA matrices, and that of the other trained tensors, of a folder that lacks neither."""
    matrices = next(Path(folder, name) for name in ADAPTER_FILES if Path(folder, name).is_file())
    return [matrices, Path(folder, EXTRA_WEIGHTS_NAME)]


def weights_with_code(folder: str | os.PathLike) -> list[str]:
    """`code_in` for the files that loading a checkpoint or adapter would read its weights from; nothing for a hub name,
    whose files PyTorch itself refuses when they are read."""
    pickled = [] if any(Path(folder).glob("*.safetensors")) else ["pytorch_model*.bin", "adapter_model.bin"]
    return code_in(folder, *pickled, EXTRA_WEIGHTS_NAME)


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The files that a checkpoint's weights are in; of several kinds, those that transformers would read.

    Raises:
        ValueError: when there are none, or files that an index names are missing.
    """
    folder = Path(folder)
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if not (folder / index).is_file():
            continue
        try:
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / index}: is no index of weights ({error!r})") from error
        if missing or not names:
            found = f"names files that are not beside it: {_some(missing)}" if missing else "names no file"
            raise ValueError(f"{folder / index}: {found}")
        return [folder / name for name in names]
    expected = ", ".join((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    raise ValueError(f"{folder}: holds no weights; expected one of {expected}")


def describe(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, on the device "meta": shapes and dtypes, no values.

    Raises:
        ValueError: when the file is damaged, or holds code.
    """
    try:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:  # mapped, not read
                return {name: tensors.get_tensor(name).to("meta") for name in tensors.keys()}  # noqa: SIM118
        return torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise unreadable(file, error) from error


def unreadable(file: str | os.PathLike, error: Exception) -> ValueError:
    """The error of a file whose content is damaged."""
    return ValueError(f"{file}: cannot be read ({_one_line(error)}); {ANEW}")


def empty_model(config: MiniCPMVConfig) -> MiniCPMV:
    """The model of a configuration without values, on the device "meta".

    Raises:
        ValueError: when there is no such model.
    """
    try:
        with torch.device("meta"):
            return MiniCPMV(config)
    except Exception as error:  # whatever wrong sizes or names lead to, in the parts of several libraries
        raise ValueError(f"its config.json describes a model that cannot be made: {_one_line(error)}") from error


def described_weights(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """`describe` for all files of a checkpoint's weights together.

    Raises:
        ValueError: when there are none, some are missing, or one is damaged.
    """
    return {name: tensor for file in weight_files(folder) for name, tensor in describe(file).items()}


def weight_problems(where: str, model: MiniCPMV, found: Mapping[str, torch.Tensor]) -> list[str]:
    """Whether a checkpoint's weights are those that its configuration describes; values are not looked at.

    Args:
        where: the checkpoint, for the message.
        model: what the configuration describes.
        found: the checkpoint's tensors by name.
    """
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        expected.pop(HEAD)
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{where}: lacks {len(missing)} tensors of its config.json: {_some(missing)}")
    if other := [name for name in expected if name in found and found[name].shape != expected[name].shape]:
        shapes = [
            f"{name} has shape {tuple(found[name].shape)}, by its config.json {tuple(expected[name].shape)}"
            for name in other[:NAMED]
        ]
        problems.append(
            f"{where}: {len(other)} tensors in its weight files have other shapes than its config.json describes: "
            f"{'; '.join(shapes)}. Take both from the same checkpoint"
        )
    return problems


def content_problems(where: str, folder: str | os.PathLike, config: MiniCPMVConfig) -> list[str]:
    """`weight_problems` for a folder."""
    try:
        return weight_problems(where, empty_model(config), described_weights(folder))
    except ValueError as error:
        return [f"{where}: {error}"]


def empty_adapter(model: MiniCPMV, adapter: str | os.PathLike) -> PeftModel:
    """A model without values under PEFT, with places for the matrices that an adapter's configuration describes.

    Raises:
        ValueError: when the model has no layers for them, or the configuration cannot be read.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.init_lora_weights = False  # some ways to begin with compute from the base's values; shapes are the same
        config.base_model_name_or_path = model.name_or_path
        with torch.device("meta"), warnings.catch_warnings():
            # PEFT tells of the change from the base's name to this model's, which has none.
            warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(_one_line(error)) from error


def adapter_fit(
    network: PeftModel, adapter: str | os.PathLike, base_name: str
) -> tuple[dict[int, tuple[Path, str]], list[str]]:
    """Where the values of an adapter's parameters are: file and name within, by id of the parameter; and what fits
    none, or is missing, one line each. Values are not looked at.

    Args:
        network: the adapter's model, with this adapter alone.
        base_name: for the message.
    """
    matrices, extra = adapter_weights(adapter)
    name = network.active_adapter
    state = network.state_dict(keep_vars=True)
    with warnings.catch_warnings():
        # PEFT says what could be wrong where it saves: of shapes, which are compared below, and of embeddings.
        warnings.filterwarnings("ignore", r"Adapter .* LoRA tensor\(s\) have invalid shape")
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        wanted = get_peft_model_state_dict(network, state_dict=state, adapter_name=name, save_embedding_layers=False)
    found = describe(matrices)
    problems = []
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"{matrices}: lacks {len(missing)} of the tensors of its settings: {_some(missing)}")
    places = state | wanted  # PEFT saves embeddings that have LoRA matrices with them, under their whole name
    problems += _misfits(matrices, found, places, f"{base_name} has no place for", f"on {base_name} it would have")
    sources = {id(places[name]): (matrices, name) for name in found if name in places}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    others = describe(extra)
    problems += _misfits(
        extra,
        others,
        parameters,
        f"{base_name} with this adapter does not have",
        f"in {base_name} with this adapter",
    )
    sources |= {id(parameters[name]): (extra, name) for name in others if name in parameters}
    return sources, problems


def _misfits(
    file: Path, found: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor], unknown: str, other: str
) -> list[str]:
    problems = []
    if strange := [name for name in found if name not in places]:
        problems.append(f"{file}: holds {_some(strange)}, which {unknown}")
    if shapes := [name for name in found if name in places and places[name].shape != found[name].shape]:
        first = shapes[0]
        more = f" ({len(shapes)} tensors have other shapes)" if len(shapes) > 1 else ""
        problems.append(
            f"{file}: {first} has shape {tuple(found[first].shape)}, {other} {tuple(places[first].shape)}{more}"
        )
    return problems


def adapter_misfit(adapter: str | os.PathLike, base_name: str, config: MiniCPMVConfig) -> str | None:
    """Why an adapter cannot be put on a base, in one line, from their configurations and the tables of contents of the
    adapter's files."""
    try:
        problems = adapter_fit(empty_adapter(empty_model(config), adapter), adapter, base_name)[1]
    except ValueError as error:
        problems = [str(error)]
    return misfit(adapter, problems)


def misfit(adapter: str | os.PathLike, problems: Sequence[str]) -> str | None:
    """The problems of `adapter_fit` in one line."""
    if not problems:
        return None
    return f"{adapter}: the adapter does not fit its base model: {'; '.join(problems)}"


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
