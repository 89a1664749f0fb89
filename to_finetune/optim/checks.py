"""Checks of a parameter group's hyper-parameters and of its tensors' layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.blocks import is_group_wide
from to_finetune.optim.schedules import SCHEDULES
from to_finetune.optim.sharding import Layout

FLAGS = ("decoupled_weight_decay", "relative_alpha", "maximize", "skip_nonfinite", "capturable", "foreach", "fused")
NUMBERS = ("lr", "alpha", "beta", "alpha_decay", "lr_decay", "t0", "gamma_max", "max_norm", "weight_decay")


def check_hyperparameters(group: Mapping[str, Any], state_dtypes: Sequence[torch.dtype]) -> None:
    """Raise ValueError for an invalid hyper-parameter, naming the key, the value and what is allowed."""

    def check(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{key}={group[key]!r} is not valid: {allowed}.")

    for key in FLAGS:
        optional = key in ("foreach", "fused")
        allowed = "None, True or False" if optional else "True or False"
        check(key, isinstance(group[key], bool) or (optional and group[key] is None), allowed)
    for key in NUMBERS:
        value = group[key]
        optional = value is None and key in ("gamma_max", "max_norm")
        number = isinstance(value, Real) or (key == "lr" and isinstance(value, Tensor) and value.dim() == 0)
        check(key, optional or (number and math.isfinite(value)), "a finite number")
    check("schedule", group["schedule"] in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    theorem = group["schedule"] == "theorem"
    check("t0", group["t0"] > 0, "a number above 0")
    check("lr", bool(group["lr"] >= 0), "a number of at least 0")
    check("alpha", group["alpha"] >= 0, "a number of at least 0")
    largest_beta = group["t0"] if theorem else 1
    check("beta", 0 <= group["beta"] <= largest_beta, f"between 0 and {'t0' if theorem else '1'}")
    for key in ("alpha_decay", "lr_decay"):
        check(key, 0 < group[key] <= 1, "above 0 and at most 1")
        used = group["schedule"] == "exponential" or group[key] == 1
        check(key, used, 'it takes effect only with schedule="exponential"')
    gamma_max, max_norm = group["gamma_max"], group["max_norm"]
    check("gamma_max", gamma_max is None or 0 < gamma_max < 2, "None, or between 0 and 2")
    check("max_norm", max_norm is None or max_norm > 0, "None, or a number above 0")
    check("weight_decay", group["weight_decay"] >= 0, "a number of at least 0")
    check("grad_scale", group["grad_scale"] in (None, "rms", "factored"), 'None, "rms" or "factored"')
    coupled = group["weight_decay"] > 0 and not group["decoupled_weight_decay"]
    check(
        "weight_decay",
        not coupled or group["grad_scale"] != "factored",
        "grad_scale='factored' needs decoupled_weight_decay=True with it",
    )
    check("state_dtype", group["state_dtype"] in (None, *state_dtypes), f"None, {', '.join(map(str, state_dtypes))}")
    check("seed", type(group["seed"]) is int and 0 <= group["seed"] < 2**63, "a whole number of at least 0")
    check("scope", group["scope"] in ("tensor", "group"), '"tensor" or "group"')
    check("foreach", not (group["foreach"] and group["fused"]), "foreach and fused exclude each other")


def check_layout(layout: Layout, variant: str, group: Mapping[str, Any], groups: int) -> None:
    """Raise RuntimeError if weights in this layout cannot be stepped as by a single process.

    Args:
        layout: of one of the group's tensors.
        variant: the optimizer's variant.
        group: the parameter group.
        groups: the number of the optimizer's groups.
    """
    if not layout.shards:
        return
    if variant == "full":
        raise RuntimeError("FullTO needs whole tensors and does not go with sharded weights; use DDP, or DiagonalTO.")
    if group["state_dtype"] == torch.int8 and any(run.first is None for run in layout.runs):
        raise RuntimeError(
            "state_dtype=torch.int8 needs weights that are sharded by their first dimension alone, as FSDP2 does by "
            "default; use torch.bfloat16."
        )
    if group["grad_scale"] == "factored" and any(run.first is None for run in layout.runs):
        raise RuntimeError(
            "grad_scale='factored' needs weights that are sharded by their first dimension alone, as FSDP2 does by "
            "default; use grad_scale='rms'."
        )
    if layout.is_part and (group["max_norm"] is not None or is_group_wide(variant, group)):
        key = "max_norm" if group["max_norm"] is not None else 'scope="group"'
        raise RuntimeError(
            f"{key} needs the gradients of a whole parameter group, which ZeRO-3 has cut into sub-groups that it steps "
            'one by one; set "sub_group_size" in "zero_optimization" to at least the number of weights that train.'
        )
    if layout.is_flat and group["skip_nonfinite"] and (layout.is_part or groups > 1):
        raise RuntimeError(
            "skip_nonfinite=True needs all gradients before the first weight moves, and DeepSpeed steps one parameter "
            "group or sub-group after the other; leave it out. DeepSpeed skips such a step itself with fp16, and with "
            '"bf16": {"check_grad_overflow": true}.'
        )
