"""Diagonal TO with torch's multi-tensor operations: a few launches for all tensors, one temporary per operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.rules import guard_room, guarded, relative

Tensors = list[Tensor] | tuple[Tensor, ...]
Scalar = Any  # a number or a 0-dim tensor, for which torch's stubs have no common type


def diagonal(
    w: Tensors,
    g: Tensors,
    a: Tensors,
    b: Tensors,
    *,
    lr: Scalar,
    alpha: Scalar,
    beta: Scalar,
    decay: Scalar,
    gamma_max: float | None,
    mean_squares: list[Tensor] | None,
) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """Apply `rules.diagonal` and decoupled decay to lists of tensors of one device and dtype; return new w, a, b, G.

    mean_squares: with `relative_alpha`, the mean of w^2 over the block of each tensor.
    """
    target = torch._foreach_sub(g, torch._foreach_mul(a, w))
    r = torch._foreach_sub(b, target)
    gain = torch._foreach_mul(w, _alphas(w, alpha, guard_room(gamma_max, beta), mean_squares))
    new_a = torch._foreach_sub(a, torch._foreach_mul(gain, r))
    new_b = torch._foreach_mul(b, 1 - beta)
    torch._foreach_add_(new_b, torch._foreach_mul(target, beta))
    G = torch._foreach_add(torch._foreach_mul(new_a, w), new_b)
    new_w = torch._foreach_sub(w, torch._foreach_mul(G, lr))
    torch._foreach_sub_(new_w, torch._foreach_mul(w, decay))
    return new_w, new_a, new_b, G


def _alphas(
    w: Tensors,
    alpha: Scalar,
    room: Scalar | None,
    mean_squares: list[Tensor] | None,
) -> list[Any]:
    alphas = [alpha] * len(w) if mean_squares is None else [relative(alpha, x) for x in mean_squares]
    if room is None:
        return alphas
    return [guarded(alpha, room, x * x) for alpha, x in zip(alphas, w, strict=True)]
