"""The trained tensors on disk: one safetensors file that names the base model which they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from to_finetune.errors import RunError, UsageError
from to_finetune.files import whole

TRAINED_WEIGHTS_NAME = "trained.safetensors"


class Base(NamedTuple):
    """The model that the trained tensors are loaded onto."""

    model_name_or_path: str
    revision: str | None


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of `model` that require a gradient, as they are."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(
    model: PreTrainedModel, folder: str | os.PathLike[str], tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the trained tensors of `model` to `folder`/trained.safetensors, in one rename.

    Args:
        model: says which base they belong to.
        folder: made if it is not there.
        tensors: by name, where the model holds pieces of them only; None for those that `trained_tensors` finds.

    Raises:
        RunError: when a weight is not finite: the last good file is left in place.
    """
    tensors = trained_tensors(model) if tensors is None else dict(tensors)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RunError(f"{len(broken)} trained tensors are not finite, {broken[0]} first; not saved. Lower the rates.")
    base = {"base_model_name_or_path": model.config._name_or_path}
    revision = getattr(model.config, "_commit_hash", None)
    if revision:
        base["base_model_revision"] = revision
    path = Path(folder) / TRAINED_WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as beside:
        save_file(tensors, beside, metadata={"format": "pt", **base})
    return path


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Copy the tensors that `save_trained` wrote onto `model`, in its own dtype; returns their names.

    Raises:
        UsageError: for a missing or damaged file, and for a tensor that does not fit the model.
    """
    parameters = dict(model.named_parameters())
    tensors = read_trained(folder)[0]
    for name, tensor in tensors.items():
        if name not in parameters:
            raise UsageError(f"{folder}: {name!r} is no parameter of this {type(model).__name__}: another base model?")
        if parameters[name].shape != tensor.shape:
            raise UsageError(
                f"{folder}: {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(parameters[name].shape)}."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return list(tensors)


def read_trained(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Base]:
    """The saved tensors, on the CPU, and the base model that they belong to.

    Raises:
        UsageError: for a missing or damaged file.
    """
    path = Path(folder) / TRAINED_WEIGHTS_NAME
    if not path.is_file():
        raise UsageError(f"{folder} holds no {TRAINED_WEIGHTS_NAME}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}.") from None
    return tensors, Base(metadata["base_model_name_or_path"], metadata.get("base_model_revision"))
