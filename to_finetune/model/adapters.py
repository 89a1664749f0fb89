"""LoRA adapters (peft) on a frozen base."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from to_finetune.errors import UsageError, at_least_one, did_you_mean
from to_finetune.model.subset import Match, Subset

ALL_LINEAR = "all-linear"


def lora_config(r: int, alpha: int, dropout: float, target_modules: Sequence[str] | None) -> LoraConfig:
    """Return the configuration of new adapters.

    Args:
        target_modules: name endings of the modules that get an adapter, or ["all-linear"]; None for peft's choice.

    Raises:
        UsageError: for values out of range.
    """
    at_least_one(lora_r=r)
    if alpha <= 0:
        raise UsageError(f"lora_alpha={alpha} is not valid: above 0.")
    if not 0 <= dropout < 1:
        raise UsageError(f"lora_dropout={dropout} is not valid: at least 0 and below 1.")
    if target_modules is not None and ALL_LINEAR in target_modules and len(target_modules) > 1:
        raise UsageError(f"lora_target_modules: {ALL_LINEAR} stands for all of them, so leave the others out.")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if target_modules == [ALL_LINEAR] else target_modules,
    )


def with_adapters(model: Any, config: PeftConfig) -> PeftModel:
    """Freeze `model` and add adapters to it, in float32 whatever the dtype of the base.

    Raises:
        UsageError: if a target is not a module of the model, or not one that can have an adapter.
    """
    targets = config.target_modules
    if targets is not None and not isinstance(targets, str):
        _check_targets(model, sorted(targets))
    if getattr(config, "revision", None) is None:
        config.revision = getattr(model.config, "_commit_hash", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft uses an older name in transformers
            return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_target_modules: {shorten(str(error), 400)}") from error


def adapter_subset(model: PeftModel) -> Subset:
    """Return the trained subset, with one match per type of module that has an adapter."""
    config = model.active_peft_config
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    by_module: dict[str, list[int]] = {}
    for name, size in trained.items():
        by_module.setdefault(name.partition(".lora_")[0].rpartition(".")[2], []).append(size)
    return Subset(
        names=list(trained),
        weights=sum(trained.values()),
        total_weights=sum(p.numel() for p in model.parameters()),
        matches=[
            Match(f"{module}: LoRA of rank {config.r}", len(sizes), sum(sizes)) for module, sizes in by_module.items()
        ],
    )


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise if a target matches no module: of several targets, peft silently leaves out such ones."""
    able = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))]
    kinds = {name.rpartition(".")[2] for name in able}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in able):
            near = did_you_mean(target, kinds) or f" There are {shorten(', '.join(sorted(kinds)), 300)}."
            raise UsageError(f"lora_target_modules: no linear layer or embedding is called {target!r}.{near}")
