"""What the hyper-parameters of a parameter group may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.schedules import SCHEDULES

NUMBERS = ("lr", "alpha", "beta", "alpha_decay", "lr_decay", "t0", "gamma_max", "max_norm", "weight_decay")


def check_hyperparameters(group: Mapping[str, Any], state_dtypes: Sequence[torch.dtype]) -> None:
    """Raise ValueError, naming the key, the value and what is allowed."""

    def check(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{key}={group[key]!r} is not valid: {allowed}.")

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
    check("grad_scale", group["grad_scale"] in (None, "rms"), 'None or "rms"')
    check("state_dtype", group["state_dtype"] in (None, *state_dtypes), f"None, {', '.join(map(str, state_dtypes))}")
    check("seed", type(group["seed"]) is int and 0 <= group["seed"] < 2**63, "a whole number of at least 0")
    check("scope", group["scope"] in ("tensor", "group"), '"tensor" or "group"')
    check("foreach", not (group["foreach"] and group["fused"]), "foreach and fused exclude each other")
