"""The Trainable Optimizers under their Hugging Face names, with the options that we recommend for an LLM."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.optim import DiagonalTO, FullTO, RankOneTO, TrainableOptimizer

OPTIMIZERS: dict[str, type[TrainableOptimizer]] = {
    "diagonal_to": DiagonalTO,
    "rank_one_to": RankOneTO,
    "full_to": FullTO,
}

# Ours, not the paper's: on gradients that are scaled to unit size, with alpha relative to the weights' own scale, the
# rates mean the same for every tensor. Measured in scripts/study (results/tables.md).
RECOMMENDED_OPTIONS: dict[str, Any] = {
    "alpha": 0.3,
    "beta": 0.1,
    "relative_alpha": True,
    "grad_scale": "factored",
    "decoupled_weight_decay": True,
}
RATE, ADAPTER_RATE = 2e-3, 1.2e-2  # for all weights and for adapters, in models up to the measured width
MEASURED_WIDTH = 256


def recommended_learning_rate(model: nn.Module) -> float:
    """(ours) Return the learning rate of a TO with the recommended options, for what trains in a Hugging Face model.

    The fewer weights train, the further each has to move: a third of them or less gets three times the rate of all.
    Up to a width of 256 the rate is measured (scripts/study). Beyond that it falls as ``width^-1.5``, to about AdamW's
    published rates at 7 billion weights, of width 4,096; this part is not measured.

    Args:
        model: its trained parameters have `requires_grad`; it may be on the meta device.

    Raises:
        UsageError: for a model whose configuration has no width.
    """
    config = getattr(model, "config", None)
    width = getattr(config and config.get_text_config(), "hidden_size", None)
    if width is None:
        raise UsageError(f"learning_rate is not given, and {type(model).__name__} has no config.hidden_size to go by.")
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    trained = {name: sizes[name] for name, p in model.named_parameters() if p.requires_grad}
    is_adapter = any("lora_" in name for name in trained)
    rate = ADAPTER_RATE if is_adapter else RATE / max(sum(trained.values()) / sum(sizes.values()), 1 / 3)
    return float(f"{rate * min(1.0, (MEASURED_WIDTH / width) ** 1.5):.2g}")


def with_embeddings_apart(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups with "rms" in place of "factored" for embeddings, output heads and their adapters.

    A batch has few of a vocabulary's tokens: if all rows counted alike, those of absent tokens would move as far as the
    others.
    """
    modules = [m for m in model.modules() if isinstance(getattr(m, "base_layer", m), nn.Embedding)]  # adapted or not
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, PreTrainedModel) and (head := base.get_output_embeddings()) is not None:
        modules.append(head)
    embeddings = {p for module in modules for p in module.parameters()}
    new = []
    for group in groups:
        apart = embeddings.intersection(group["params"]) if group["grad_scale"] == "factored" else set()
        new.append({**group, "params": [p for p in group["params"] if p not in apart]})
        if apart:
            new.append({**group, "params": [p for p in group["params"] if p in apart], "grad_scale": "rms"})
    return new


def optimizer_options(name: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keyword arguments of the TO called `name`: the recommended ones, overridden by `optim_args`.

    Args:
        name: a key of `OPTIMIZERS`.
        optim_args: ``"alpha=0.1,beta=0.1"`` as Hugging Face writes it, or a mapping.

    Raises:
        UsageError: for an argument that the optimizer does not have, or one that is not ``key=value``.
    """
    flags = {"lr": "--learning_rate", "learning_rate": "--learning_rate", "weight_decay": "--weight_decay"}
    allowed = [key for key in inspect.signature(OPTIMIZERS[name]).parameters if key not in ("params", *flags)]
    options = dict(RECOMMENDED_OPTIONS)
    for key, value in parse_optim_args(optim_args).items():
        if key in flags:
            raise UsageError(f"optim_args: {key}={value} is not taken here; use {flags[key]}.")
        if key not in allowed:
            raise UsageError(
                f"optim_args: {name} has no option {key!r}.{did_you_mean(key, allowed)} Options: {', '.join(allowed)}."
            )
        if isinstance(value, str) and key not in ("schedule", "grad_scale", "scope", "state_dtype"):
            raise UsageError(f"optim_args: {key}={value!r} is not valid: a number, true, false or none.")
        options[key] = _state_dtype(value) if key == "state_dtype" else value
    return options


def check_options(name: str, options: Mapping[str, Any], learning_rate: float) -> None:
    """Build the optimizer once on a dummy weight, so that a bad value raises before anything is loaded."""
    try:
        OPTIMIZERS[name]([torch.zeros(1)], lr=learning_rate, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from None


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse ``"alpha=0.1,grad_scale=None"`` or a mapping to a dict with Python values."""
    if not optim_args:
        return {}
    if isinstance(optim_args, Mapping):
        return {key: _literal(value) for key, value in optim_args.items()}
    options = {}
    for item in optim_args.split(","):
        key, equals, value = item.strip().partition("=")
        if not equals:
            raise UsageError(f"optim_args: {item.strip()!r} is not of the form key=value.")
        if key.strip() in options:
            raise UsageError(f"optim_args: {key.strip()} is given twice.")
        options[key.strip()] = _literal(value.strip())
    return options


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None", "null": "None"}.get(value, value))
    except (ValueError, SyntaxError):
        return value


def _state_dtype(value: Any) -> Any:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    return dtypes.get(str(value).removeprefix("torch."), value)


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
