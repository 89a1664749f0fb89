"""Diagonal TO with torch's multi-tensor operations: a few launches for all tensors, one temporary an operation."""

from __future__ import annotations

import torch
from torch import Tensor

from to_finetune.optim.kernels.inplace import Squares
from to_finetune.optim.rules import SMALLEST_DIVISOR


def diagonal_(
    ps: list[Tensor],
    gs: list[Tensor],
    slopes: list[Tensor],
    offsets: list[Tensor],
    *,
    lr: float | Tensor,
    alpha: float,
    beta: float,
    decay: float | Tensor,
    gamma_max: float | None,
    relative_alpha: bool,
    mean_square: Tensor | None,
) -> list[Squares]:
    """`rules.diagonal` on lists of tensors of one device and dtype, in place; arguments as `inplace.apply_`."""
    dtype = gs[0].dtype
    w, a, b = ([x.to(dtype) for x in xs] for xs in (ps, slopes, offsets))
    q = torch._foreach_mul(w, w)
    target = torch._foreach_sub(gs, torch._foreach_mul(a, w))
    r = torch._foreach_sub(b, target)

    alphas = _alphas(q, alpha, relative_alpha, mean_square)
    if gamma_max is None:
        gain = torch._foreach_mul(w, alphas)
    else:
        torch._foreach_clamp_min_(q, SMALLEST_DIVISOR)
        torch._foreach_reciprocal_(q)
        torch._foreach_mul_(q, max(gamma_max - beta, 0.0))
        torch._foreach_minimum_(q, alphas)
        gain = torch._foreach_mul(q, w)
    new_a = torch._foreach_sub(a, torch._foreach_mul(gain, r))
    new_b = torch._foreach_mul(b, 1 - beta)
    torch._foreach_add_(new_b, torch._foreach_mul(target, beta))
    G = torch._foreach_add(torch._foreach_mul(new_a, w), new_b)
    new_w = torch._foreach_sub(w, torch._foreach_mul(G, lr))
    torch._foreach_sub_(new_w, torch._foreach_mul(w, decay))

    for old, new in ((ps, new_w), (slopes, new_a), (offsets, new_b)):
        torch._foreach_copy_(old, new)
    errors = torch._foreach_norm(torch._foreach_sub(G, gs))
    return [(e.square(), n.square()) for e, n in zip(errors, torch._foreach_norm(gs), strict=True)]


def _alphas(
    squares: tuple[Tensor, ...], alpha: float, relative_alpha: bool, mean_square: Tensor | None
) -> list[float] | list[Tensor]:
    if not relative_alpha:
        return [alpha] * len(squares)
    return [alpha / (q.mean() if mean_square is None else mean_square).clamp(min=SMALLEST_DIVISOR) for q in squares]
