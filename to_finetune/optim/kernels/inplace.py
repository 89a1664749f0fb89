"""A rule applied to one tensor in place: eagerly, or compiled into one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Tensor, ...]]
Squares = tuple[Tensor, Tensor]


def apply_(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    state: list[Tensor],
    *,
    decay: float | Tensor,
    **hyperparameters: Any,
) -> Squares:
    """Write a rule's new weights and state over the old ones; returns ``||G - g||^2`` and ``||g||^2``.

    Args:
        rule: `rules.diagonal` or `rules.rank_one`.
        p: the weights; with `state`, computed in g's dtype and stored in their own.
        g: the gradient, float32 or float64.
        state: the rule's state tensors, in its order.
        decay: the decoupled decay's share of the old weights that is taken away, 0 for none.
        hyperparameters: the rule's keyword arguments.
    """
    w = p.to(g.dtype)
    new_w, *new_state, G = rule(w, g, *(s.to(g.dtype) for s in state), **hyperparameters)
    p.copy_(new_w - decay * w)
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    return (G - g).square().sum(), g.square().sum()


@cache
def compiled_apply_() -> Callable[..., Squares]:
    """`apply_` as one kernel a tensor, for vectors of any length; lr, alpha, beta and decay must be 0-dim tensors.

    One kernel serves one set of dtypes and options. A process with more of them than torch's recompile limit
    runs those past it eagerly, with torch's warning.
    """
    return torch.compile(apply_, dynamic=True)
