"""How the three rates change with the number of steps taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

SCHEDULES = ("constant", "exponential", "theorem")


class Rates(NamedTuple):
    lr: float | Tensor
    alpha: float | Tensor
    beta: float | Tensor


def rates_at(step: int | Tensor, group: Mapping[str, Any]) -> Rates:
    """Return the rates of the step after `step` steps, 0 for the first; they may be tensors if `step` is one.

    - ``constant``: the group's own.
    - ``exponential``: lr times ``lr_decay**step``, alpha and beta times ``alpha_decay**step``.
    - ``theorem``: ``lr/(step+t0)``, ``alpha/(step+t0)^2``, ``beta/(step+t0)``, for which the paper proves
      O(1/t) convergence of the error and of the estimate's variance on strongly convex problems.

    A torch LR scheduler changes the group's lr, so its factor multiplies with any of these.
    """
    lr, alpha, beta = group["lr"], group["alpha"], group["beta"]
    if group["schedule"] == "constant":
        return Rates(lr, alpha, beta)
    if group["schedule"] == "exponential":
        decay = group["alpha_decay"] ** step
        return Rates(lr * group["lr_decay"] ** step, alpha * decay, beta * decay)
    t = step + group["t0"]
    return Rates(lr / t, alpha / t**2, beta / t)


def decoupled_decay(group: Mapping[str, Any], rates: Rates) -> float | Tensor:
    """Return the fraction of w that decoupled weight decay subtracts in a step: ``lr * weight_decay``, or 0."""
    return rates.lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
