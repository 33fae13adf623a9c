"""Several adapters of one base model: loaded once, switched, combined.

from finetune.adapters import load_adapters
adapters = load_adapters({"food": "output/food", "signs": "output/signs"})
adapters.switch("food")
adapters.combine({"food": 0.5, "signs": 0.5}, name="both")
adapters.switch("both")
adapters.save("both", "output/both")
print(adapters.model.chat(picture, [{"role": "user", "content": "What is this?"}], adapters.tokenizer))
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from finetune.checkpoints import written_aside
from finetune.loading import (
    EXTRA_WEIGHTS_NAME,
    SETTINGS_NAME,
    base_of_adapter,
    check_folders,
    load_base,
    load_lora,
    load_tokenizer,
    read_extra_tensors,
    read_record,
    trained_slices,
)
from finetune.model_card import write_card
from finetune.model_folder import ADAPTER_FILES, empty_adapter, empty_model
from finetune.places import at_home
from finetune.reporting import settings_record, write_settings
from finetune.result_folder import lacking_in_result

logger = logging.getLogger("finetune")

# Modules that peft puts around those of the base, whose parameters then have longer names.
WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")
# What peft keeps for each adapter by itself.
BY_PEFT = (".lora_", ".modules_to_save.")


class Adapters:
    """A PEFT model with several adapters, of which one or none answers.

    An adapter is its LoRA matrices and the tensors that were trained in full (`vpm_resampler_embedtokens.pt`), which
    take the places of the base's when it is switched on. Made by `load_adapters`.

    Attributes:
        model: the PEFT model, in evaluation mode; at first with the first adapter.
        tokenizer: of the base model.
        active: name of the adapter that answers, or None for the base model.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer,
        extra: Mapping[str, Mapping[str, torch.Tensor]],
        slices: Mapping,
        settings: Mapping[str, Mapping],
    ):
        """
        Args:
            extra: per adapter, tensors by their names in a PeftModel that has this adapter alone.
            slices: per adapter, most slices of a picture; under None, the base model's.
            settings: per adapter, what its `training_settings.json` says.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._settings = dict(settings)
        self.active: str | None = None
        self._slices = dict(slices)
        self._places = {
            WRAPPERS.sub("", name): parameter
            for name, parameter in model.named_parameters()
            if not any(part in name for part in BY_PEFT)
        }
        self._extra = {name: _by_place(tensors) for name, tensors in extra.items()}
        changed = dict.fromkeys(place for tensors in self._extra.values() for place in tensors)
        for name, tensors in self._extra.items():
            self._check_shapes(name, tensors)
        self._base = {place: self._places[place].detach().to("cpu", copy=True) for place in changed}
        self.switch(next(iter(self._extra)))

    @property
    def names(self) -> list[str]:
        """Of the adapters, combined ones included."""
        return list(self._extra)

    def switch(self, name: str | None) -> None:
        """Let this adapter answer; None: the base model.

        Tensors that the adapter does not have are the base's again. Logits are then exactly those of `load_finetuned`
        for this adapter alone, or of the base.

        Raises:
            ValueError: when there is no such adapter.
        """
        if name is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self._check_known([name])
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name, inference_mode=True)
        wanted = self._extra.get(name, {})
        with torch.no_grad():
            for place in dict.fromkeys([*self._extra.get(self.active, {}), *wanted]):
                self._places[place].copy_(wanted.get(place, self._base[place]))
        self.model.get_base_model().config.set_max_slice_nums(self._slices[name])
        self.active = name

    def combine(self, weights: Mapping[str, float], name: str) -> None:
        """Make a further adapter, the weighted sum of what others change in the base model; `switch` to use it.

        LoRA: the sum of the adapters' updates by weight, exactly, since ranks are put beside one another (peft's
        "cat"): the new rank is the sum of theirs. Tensors trained in full: base + sum of weight * (adapter's - base),
        an adapter without the tensor counting as the base; for weights that add up to 1, the weighted mean.

        Args:
            weights: by name of the adapter; any numbers, which need not add up to 1.

        Raises:
            ValueError: unknown adapters, a name that is taken, adapters that cannot be added.
        """
        _check_name(name)
        if name in self._extra:
            raise ValueError(f"there is an adapter {name!r} already; name the combination otherwise")
        if not weights or not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"weights are {dict(weights)}, expected a number for each of one or more adapters")
        self._check_known(weights)
        for part in weights:
            config = self.model.peft_config[part]
            if config.modules_to_save or config.use_dora or config.use_rslora:
                raise ValueError(
                    f"adapter {part!r} cannot be combined: it has modules_to_save, DoRA or rank-stabilised LoRA, which "
                    "cannot be added by weight"
                )
        self.model.base_model.add_weighted_adapter(
            list(weights), list(weights.values()), adapter_name=name, combination_type="cat"
        )
        self.model.eval()  # the new dropout modules too
        self._extra[name] = {
            place: self._weighted_sum(place, weights)
            for place in dict.fromkeys(place for part in weights for place in self._extra[part])
        }
        slices = {part: self._slices[part] for part in weights}
        self._slices[name] = max(slices.values())
        self._settings[name] = self._combined_settings(weights, self._slices[name])
        if len(set(slices.values())) > 1:
            logger.warning(
                "the adapters were trained with different --max_slice_nums (%s): %s takes the largest",
                *(", ".join(f"{part}: {most}" for part, most in slices.items()), name),
            )

    def save(self, name: str, folder: str | os.PathLike) -> None:
        """Write an adapter, a combined one too, to a folder of its own, as training writes adapters: `load_finetuned`,
        `load_adapters` and all programs take it.

        Args:
            folder: new or empty; nothing is overwritten.

        Raises:
            ValueError: when there is no such adapter, or something lies in the folder.
            UserError: when it cannot be written.
        """
        self._check_known([name])
        folder = Path(at_home(os.fspath(folder)))
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; nothing is overwritten, name another folder")
        base = Path(self.model.get_base_model().name_or_path)
        self.model.peft_config[name].base_model_name_or_path = str(base.resolve() if base.is_dir() else base)
        config = replace(self.model.peft_config[name], inference_mode=True)
        with written_aside(folder, writes=True, into=True, lacks=lacking_in_result) as aside:
            config.save_pretrained(str(aside))
            alone = empty_adapter(empty_model(self.model.get_base_model().config), aside)
            save_file(self._matrices(name, alone), aside / ADAPTER_FILES[0], metadata={"format": "pt"})
            names = {WRAPPERS.sub("", place): place for place, _ in alone.named_parameters()}
            extra = {names[place]: tensor.to("cpu", copy=True) for place, tensor in self._extra[name].items()}
            torch.save(extra, aside / EXTRA_WEIGHTS_NAME)
            self.tokenizer.save_pretrained(aside)
            write_settings(self._settings[name], aside)
            write_card(aside, folder.name, history=())

    def _matrices(self, name: str, alone: PeftModel) -> dict[str, torch.Tensor]:
        """What peft saves of an adapter, by its names there.

        Args:
            alone: a model without values that has this adapter alone: of several, peft (0.21) leaves out tensors in
                whose names that of another adapter is, such as "llm".
        """
        own = re.compile(rf"\.(lora_\w+|modules_to_save)\.{name}(?=\.|$)")
        state = {
            own.sub(rf".\1.{alone.active_adapter}", key): tensor.detach().cpu().contiguous()
            for key, tensor in self.model.state_dict().items()
            if own.search(key)
        }
        return get_peft_model_state_dict(
            alone, state_dict=state, adapter_name=alone.active_adapter, save_embedding_layers=False
        )

    def _combined_settings(self, weights: Mapping[str, float], slices: int) -> dict:
        """What `training_settings.json` says of a combination: what its parts agree on, and which they are."""
        parts = [self._settings[part] for part in weights]
        resolved = [part.get("resolved") or {} for part in parts]
        same = {key: value for key, value in resolved[0].items() if all(other.get(key) == value for other in resolved)}
        slicing = {**self.model.get_base_model().config.slicing, "max_slice_nums": slices}
        record = settings_record({}, {**same, "slicing": slicing, "combined_from": dict(weights)})
        recorded = next((part["base_weights"] for part in parts if part.get("base_weights")), None)
        return {**record, "base_weights": recorded} if recorded else record

    def _weighted_sum(self, place: str, weights: Mapping[str, float]) -> torch.Tensor:
        """In float32, then in the dtype of the model. The base counts what the weights leave to 1, so that a single
        adapter of weight 1 is that adapter, without rounding."""
        parts = {part: self._extra[part][place] for part in weights if place in self._extra[part]}
        base = self._base[place]
        total = base.float() * (1 - math.fsum(weights[part] for part in parts))
        for part, tensor in parts.items():
            total += weights[part] * tensor.float()
        return total.to(base.dtype)

    def _check_known(self, names: Mapping | list[str]) -> None:
        if unknown := [name for name in names if name not in self._extra]:
            raise ValueError(f"there is no adapter {', '.join(map(repr, unknown))}; there are {', '.join(self._extra)}")

    def _check_shapes(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for place, tensor in tensors.items():
            if place not in self._places or self._places[place].shape != tensor.shape:
                found = tuple(self._places[place].shape) if place in self._places else "no such tensor"
                raise ValueError(
                    f"adapter {name!r} does not fit the base model: {place} has shape {tuple(tensor.shape)}, the model "
                    f"has {found}"
                )


def load_adapters(
    folders: Mapping[str, str | os.PathLike], base: str | os.PathLike | None = None, **kwargs
) -> Adapters:
    """Load several adapters of one base model; the first one is switched on.

    The base model and all LoRA matrices are in memory once; the tensors trained in full stay in their files, mapped,
    and those of the base that any adapter changes are kept on the CPU.

    Args:
        folders: adapter folders by the names to give them.
        base: folder of the base model, in place of what the adapters say of it.
        kwargs: for `from_pretrained`, such as `dtype` or `device_map` (default: "auto").

    Raises:
        ValueError: adapters of different base models, or that do not fit it; see also `load_finetuned`.
    """
    if not folders:
        raise ValueError("no adapters: expected their folders by name")
    for name in folders:
        _check_name(name)
    check_folders([*folders.values()])
    if base is None:
        bases = {name: base_of_adapter(folder) for name, folder in folders.items()}
        if len({os.path.realpath(path) if Path(path).is_dir() else path for path in bases.values()}) > 1:
            raise ValueError(
                "the adapters are of different base models: "
                + "; ".join(f"{name} ({folders[name]}) of {path}" for name, path in bases.items())
                + ". Name one with base= if they are the same in different places"
            )
        base = next(iter(bases.values()))
    check_folders([], base)
    for name, folder in folders.items():
        config = PeftConfig.from_pretrained(folder)
        if config.bias != "none" or config.layer_replication:
            raise ValueError(
                f"adapter {name!r} ({folder}) was trained with --lora_bias or --lora_layer_replication, which change "
                "the base model for all adapters; load it alone, with load_finetuned"
            )
    extra = {name: read_extra_tensors(folder) for name, folder in folders.items()}
    trained = {name: trained_slices(folder) for name, folder in folders.items()}
    tokenizer = load_tokenizer(next(iter(folders.values())), kwargs.get("cache_dir"), base)
    model: nn.Module = load_base([*folders.values()], base, **kwargs)
    most = model.config.slicing["max_slice_nums"]
    slices = {None: most, **{name: most if found is None else found for name, found in trained.items()}}
    for name, folder in folders.items():
        model = load_lora(model, folder, name)
    settings = {name: read_record(Path(folder, SETTINGS_NAME)) for name, folder in folders.items()}
    return Adapters(model.eval(), tokenizer, extra, slices, settings)


def _by_place(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By their names in the base model under PEFT; what peft loads with the LoRA matrices is left out."""
    return {
        WRAPPERS.sub("", name): tensor for name, tensor in tensors.items() if not any(part in name for part in BY_PEFT)
    }


def _check_name(name: str) -> None:
    """peft makes the names parts of parameter names, and keys of modules that are attributes too."""
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"{name!r} cannot name an adapter: expected letters, digits and underscores")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter: PyTorch's modules have an attribute of this name; choose another"
        )
