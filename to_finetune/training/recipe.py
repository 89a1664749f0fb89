"""A run's settings as a recipe that repeats it, and its command line without secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from to_finetune.model.select import listed
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.optimizers import OPTIMIZERS

SECRETS = ("hub_token",)  # flags whose values are written nowhere


class _Defaults(FinetuneArguments):
    """The defaults alone: setting up devices again, for another device, would reset the run's distributed state."""

    _setup_devices = torch.device("cpu")


def resolved_config(model: ModelArguments, data: DataArguments, training: FinetuneArguments) -> dict[str, Any]:
    """Return the settings that differ from the defaults or were derived: a recipe that repeats the run."""
    pairs: list[tuple[Any, Any]] = [
        (model, ModelArguments(model_name_or_path="")),
        (data, DataArguments(dataset_name=[""])),
        (training, _Defaults(output_dir="")),
    ]
    always = ("optim", "learning_rate", "max_grad_norm", "bf16", "seed", "max_length")
    config = {
        f.name: getattr(given, f.name)
        for given, default in pairs
        for f in fields(given)
        if f.name in always or getattr(given, f.name) != getattr(default, f.name)
    }
    for key in (*SECRETS, "resume_from_checkpoint"):  # not part of the recipe
        config.pop(key, None)
    if model.unfrozen_parameters is not None:
        config["unfrozen_parameters"] = listed(model.unfrozen_parameters)  # the file may change later
    if training.optim in OPTIMIZERS:
        config["optim_args"] = {
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in training.to_options.items()
        }
    return {key: _plain(value) for key, value in config.items()}


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line to show or to save, with stars in place of a token."""

    def is_secret(flag: str) -> bool:
        return flag.removeprefix("--").replace("-", "_") in SECRETS

    shown = list[str]()
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        if is_secret(before):
            word = "***"
        elif equals and is_secret(flag):
            word = f"{flag}=***"
        shown.append(word)
    return shown


def _plain(value: Any) -> Any:
    """Convert enums, other string-like values and Hugging Face's own settings to what YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return str(getattr(value, "value", value))
