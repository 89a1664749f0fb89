"""The trained tensors on disk, with the name of the base model that they belong to.

Weights of the base are in one file, trained.safetensors; adapters are in the two files that peft writes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from to_finetune.errors import RunError, UsageError
from to_finetune.files import whole
from to_finetune.optim.checkpoint import bare, named
from to_finetune.runs import located

TRAINED_WEIGHTS_NAME = "trained.safetensors"


class Base(NamedTuple):
    """The model that the trained tensors are loaded onto."""

    model_name_or_path: str
    revision: str | None


def holds_trained(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds what `save_trained` writes."""
    return Path(folder, TRAINED_WEIGHTS_NAME).is_file() or holds_adapters(folder)


def holds_adapters(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds peft's adapters."""
    return Path(folder, SAFETENSORS_WEIGHTS_NAME).is_file()


def is_restorable(model: nn.Module) -> bool:
    """Whether the trained tensors can be put back onto their base: those of a named model, or of one LoRA adapter."""
    if isinstance(model, PeftModel):
        return len(model.active_adapters) == 1 and model.active_peft_config.peft_type == PeftType.LORA
    return isinstance(model, PreTrainedModel) and bool(model.config._name_or_path)


def trained_tensors(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the trained tensors by the names they are saved under: parameter names, for adapters without "default".

    Args:
        weights: by the parameters' names, if the model holds only shards of them; None for the parameters of `model`
            that require a gradient.
    """
    if weights is None:
        weights = {name: p for name, p in named(model).items() if p.requires_grad}
    return {name: p.detach().contiguous() for name, p in _as_saved(model, weights).items()}


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Return the names that parameters are saved under, mapped to their names in `model`."""
    parameters = named(model)
    names = {id(p): name for name, p in parameters.items()}
    return {saved: names[id(p)] for saved, p in _as_saved(model, parameters).items()}


def save_trained(
    model: PreTrainedModel | PeftModel, folder: str | os.PathLike[str], tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the trained tensors of `model` to one file in `folder`, atomically; with adapters, also peft's config file.

    Args:
        model: also names the base that they belong to.
        folder: created if it does not exist.
        tensors: from `trained_tensors`, if the model holds only shards of them.

    Returns:
        The file: trained.safetensors, or peft's adapter_model.safetensors.

    Raises:
        RunError: when a weight is not finite; the last good file stays in place.
    """
    tensors = trained_tensors(model) if tensors is None else dict(tensors)
    check_finite(tensors)
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else TRAINED_WEIGHTS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if isinstance(model, PeftModel):
        config = copy.copy(model.active_peft_config)
        config.inference_mode = True  # as peft saves it
        with TemporaryDirectory(dir=path.parent) as beside:
            config.save_pretrained(beside)
            os.replace(Path(beside, CONFIG_NAME), path.with_name(CONFIG_NAME))
    else:
        metadata["base_model_name_or_path"] = model.config._name_or_path
        if revision := getattr(model.config, "_commit_hash", None):
            metadata["base_model_revision"] = revision
    with whole(path) as partial:
        save_file(tensors, partial, metadata=metadata)
    return path


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a tensor that is about to be saved is not finite.

    Raises:
        RunError: naming the first of the tensors that are not finite.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RunError(f"{len(broken)} trained tensors are not finite, {broken[0]} first; not saved. Lower the rates.")


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy the tensors that `save_trained` wrote into `model`, which keeps its dtype.

    Raises:
        UsageError: for a missing or damaged file, and for a tensor that does not fit the model.
    """
    parameters = named(model)
    names = parameter_names(model)
    tensors = read_trained(folder)[0]
    for name, tensor in tensors.items():
        if name not in names:
            raise UsageError(f"{folder}: {name!r} is no parameter of this {type(model).__name__}: another base model?")
        shape = parameters[names[name]].shape
        if shape != tensor.shape:
            raise UsageError(f"{folder}: {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(shape)}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[names[name]].copy_(tensor)


def read_trained(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Base]:
    """Return the saved tensors, on the CPU, and the base model that they belong to.

    Raises:
        UsageError: for a missing or damaged file.
    """
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME if holds_adapters(folder) else TRAINED_WEIGHTS_NAME)
    if not path.is_file():
        raise UsageError(f"{folder} holds no {TRAINED_WEIGHTS_NAME}, nor peft's {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}.") from None
    if path.name == TRAINED_WEIGHTS_NAME:
        base = (metadata or {}).get("base_model_name_or_path")
        if base is None:
            raise UsageError(f"{path} does not say which base model it belongs to: it is not of a run.")
        return tensors, Base(located(base, folder), metadata.get("base_model_revision"))
    config = adapter_config(folder)
    return tensors, Base(located(str(config.base_model_name_or_path), folder), config.revision)


def adapter_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """Return peft's configuration of the adapters in `folder`.

    Raises:
        UsageError: for a missing or damaged file.
    """
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        raise UsageError(f"{folder} holds no {CONFIG_NAME}, which says what the adapters are of.")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged: {shorten(str(error), 200)}.") from None


def _as_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename `tensors` from their names in `model` to those they are saved under; a PeftModel keeps only adapters."""
    if not isinstance(model, PeftModel):
        return dict(tensors)
    own = {bare(name): name for name, _ in model.named_parameters()}  # by which peft looks them up
    known = {own[name]: tensor for name, tensor in tensors.items()}
    saved = get_peft_model_state_dict(model, known, model.active_adapter, save_embedding_layers=False)
    return {bare(name): tensor for name, tensor in saved.items()}
