"""The update rules, one pure function per variant: the reference for every faster path.

A Trainable Optimizer (TO) learns, beside the weights ``w``, a pseudo-linear model ``G = A w + b`` of the
full gradient from the mini-batch gradients ``g``. One step takes a gradient step on the approximation loss
``1/2 ||A w + b - g||^2`` in A and b, then moves the weights along the new G:

    r = A w + b - g          the residual, with the old variables
    A <- A - alpha r w^T     (in the variant's own factors)
    b <- b - beta r
    w <- w - lr G            with G = A w + b from the new A and b

The functions return new tensors, never write to their arguments and never branch on a tensor's value, so they run in
any floating dtype and under ``torch.vmap``: one leading dimension of members, each with its own lr, alpha and beta.
Every path performs the elementwise operations in the order written here. Sums over a block are accumulated in float64
and rounded once, so they do not depend on the order of summation, and a faster path can be bit-identical.

``b - beta r`` is computed as ``(1 - beta) b + beta (g - A w)``: mathematically the same, but a TO without slope
(alpha = 0) then equals momentum bit for bit.

The guard is ours, not the paper's. One step multiplies the residual by ``1 - gamma``, ``gamma = alpha q + beta``
with the variant's own ``q >= 0``, so the estimate contracts only while ``0 < gamma < 2``. The guard lowers alpha
so that ``gamma <= gamma_max``; ``gamma_max=None`` is the paper's exact update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_DIVISOR = 1e-30  # keeps every quotient finite in float32; squares below it count as zero
Scalar = float | Tensor  # a Python number, or a 0-dim tensor (one value per member under vmap)


class DiagonalStep(NamedTuple):
    w: Tensor
    a: Tensor
    b: Tensor
    G: Tensor


class RankOneStep(NamedTuple):
    w: Tensor
    u: Tensor
    v: Tensor
    b: Tensor
    G: Tensor


class RankOneScalars(NamedTuple):
    """The per-block scalars that the elementwise part of a RankOne step uses."""

    s: Tensor  # v.w
    s_new: Tensor  # v.w with the new v
    u_gain: Tensor  # alpha s
    v_gain: Tensor  # alpha c, c = u.r


class FullStep(NamedTuple):
    w: Tensor
    b: Tensor
    G: Tensor
    correction: Tensor  # alpha_eff r: the slope's update is A <- A - correction w^T


class RankOneSums(NamedTuple):
    """The sums over a block that a RankOne step needs; the sums over pieces of a block add up to them."""

    vw: Tensor
    ww: Tensor
    uu: Tensor
    ub: Tensor
    ug: Tensor
    n: Tensor  # the number of weights


def diagonal(
    w: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    lr: Scalar,
    alpha: Scalar,
    beta: Scalar,
    gamma_max: float | None = 1.0,
    relative_alpha: bool = False,
    mean_square: Tensor | None = None,
) -> DiagonalStep:
    """Compute one step of Diagonal TO, ``A = diag(a)``; ``q_i = w_i^2``.

    Args:
        w, g, a, b: weights, gradient, slope and offset, of one shape and dtype.
        lr, alpha, beta: the rates of w, a and b.
        gamma_max: the guard's bound on ``alpha w_i^2 + beta``; None switches it off.
        relative_alpha: (ours) alpha is in units of ``1 / mean(w^2)``.
        mean_square: 0-dim mean of w^2 over the whole block, if w is only a piece of it; None computes it from w.
    """
    if relative_alpha:
        alpha = relative(alpha, mean_of_squares(w) if mean_square is None else mean_square)
    alpha = guarded(alpha, guard_room(gamma_max, beta), w * w)
    target = g - a * w
    r = b - target
    a = a - alpha * w * r
    b = (1 - beta) * b + beta * target
    G = a * w + b
    return DiagonalStep(w - lr * G, a, b, G)


def rank_one(
    w: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    lr: Scalar,
    alpha: Scalar,
    beta: Scalar,
    gamma_max: float | None = 1.0,
    relative_alpha: bool = False,
    sums: RankOneSums | None = None,
) -> RankOneStep:
    """Compute one step of RankOne TO, ``A = u v^T``; ``q = (v.w)^2 + ||u||^2 ||w||^2``.

    Args:
        w, g, u, v, b: weights, gradient, the slope's factors and the offset, of one shape and dtype.
        lr, alpha, beta: the rates of w, of u and v, and of b.
        gamma_max: the guard's bound on ``alpha q + beta``; None switches it off.
        relative_alpha: (ours) alpha is in units of ``1 / max(q, mean(w^2))``. q alone can be tiny while
            u is zero and v happens to be nearly orthogonal to w, and u would then grow without bound.
        sums: the sums over the whole block, if the tensors are only a piece of it; None computes them from the tensors.
    """
    if sums is None:
        sums = rank_one_sums(w, g, u, v, b)
    s, s_new, u_gain, v_gain = rank_one_scalars(sums, alpha, guard_room(gamma_max, beta), relative_alpha)
    target = g - s * u
    r = b - target
    u, v = u - u_gain * r, v - v_gain * w
    b = (1 - beta) * b + beta * target
    G = s_new * u + b
    return RankOneStep(w - lr * G, u, v, b, G)


def rank_one_scalars(sums: RankOneSums, alpha: Scalar, room: Scalar | None, relative_alpha: bool) -> RankOneScalars:
    """Compute the per-block scalars of a RankOne step; the arguments may be vectors with one element per block."""
    s, ww, uu, ub, ug, n = sums
    c = s * uu + ub - ug  # u.r
    q = s * s + uu * ww
    if relative_alpha:
        alpha = relative(alpha, torch.maximum(q, ww / n))
    alpha = guarded(alpha, room, q)
    return RankOneScalars(s, s - alpha * c * ww, alpha * s, alpha * c)


def rank_one_sums(w: Tensor, g: Tensor, u: Tensor, v: Tensor, b: Tensor) -> RankOneSums:
    """Compute the sums of a RankOne step over the given tensors, each 0-dim."""
    n = torch.full((), w.numel(), dtype=w.dtype, device=w.device)
    sums = (dot(v, w), sum_of_squares(w), sum_of_squares(u), dot(u, b), dot(u, g), n)
    return RankOneSums(*(x.to(w.dtype) for x in sums))


def full(
    w: Tensor,
    g: Tensor,
    b: Tensor,
    slope_times_w: Tensor,
    *,
    lr: Scalar,
    alpha: Scalar,
    beta: Scalar,
    gamma_max: float | None = 1.0,
    relative_alpha: bool = False,
) -> FullStep:
    """Compute one step of Full TO on a flat block of n weights; ``q = ||w||^2``.

    The slope A enters only through the vector ``A w``, and its update is a rank-one correction, so the caller
    may hold it as a matrix (`full_dense_product`) or as its exact history (`full_history_product`).

    Args:
        w, g, b: weights, gradient and offset, each of n elements.
        slope_times_w: ``A w`` with the old A, n elements.
        lr, alpha, beta: the rates of w, A and b.
        gamma_max: the guard's bound on ``alpha ||w||^2 + beta``; None switches it off.
        relative_alpha: (ours) alpha is in units of ``1 / ||w||^2``.
    """
    q = sum_of_squares(w).to(w.dtype)
    if relative_alpha:
        alpha = relative(alpha, q)
    alpha = guarded(alpha, guard_room(gamma_max, beta), q)
    target = g - slope_times_w
    r = b - target
    correction = alpha * r
    b = (1 - beta) * b + beta * target
    G = slope_times_w - correction * q + b  # (A - alpha r w^T) w + b
    return FullStep(w - lr * G, b, G, correction)


def full_dense_product(A: Tensor, w: Tensor) -> Tensor:
    """Return ``A w`` for the (n, n) matrix A."""
    return A @ w


def full_dense_learn(A: Tensor, correction: Tensor, w: Tensor) -> Tensor:
    """Return the new A, (n, n)."""
    return A - correction.unsqueeze(-1) * w.unsqueeze(-2)


def full_history_product(corrections: Tensor, weights: Tensor, w: Tensor) -> Tensor:
    """Return ``A w`` from the t past (correction, weights) pairs, (t, n) each: ``A = - sum_i correction_i w_i^T``.

    Exact because A starts at zero. Costs ``2 t n`` multiplications and stored numbers, the matrix ``n^2`` of each.
    """
    return -(corrections.mT @ (weights @ w))


def rms_factor(norm: Tensor, n: float | Tensor) -> Tensor:
    """(ours) Return one over the root mean square of n elements with this norm, in the norm's dtype; 0 if n is 0."""
    return _divide(n**0.5, norm)


def relative(alpha: Scalar, unit: Tensor) -> Tensor:
    """(ours) Return ``alpha / unit``, for alpha in units of ``1 / unit`` and ``unit >= 0``."""
    return _divide(alpha, unit)


def guard_room(gamma_max: float | None, beta: Scalar) -> Scalar | None:
    """Return the guard's upper bound on ``alpha q``; None without a guard."""
    if gamma_max is None:
        return None
    room = gamma_max - beta
    return room.clamp(min=0.0) if isinstance(room, Tensor) else max(room, 0.0)


def sum_of_squares(x: Tensor) -> Tensor:
    """``||x||^2``, 0-dim float64."""
    return torch.linalg.vector_norm(x, dtype=accumulator(x.device)).square()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``x.y``, 0-dim float64."""
    wide = accumulator(x.device)
    return (x.to(wide) * y.to(wide)).sum()


def mean_of_squares(x: Tensor) -> Tensor:
    """The mean of x^2, 0-dim, in x's dtype."""
    return (sum_of_squares(x) / x.numel()).to(x.dtype)


def guarded(alpha: Scalar, room: Scalar | None, q: Tensor) -> Scalar:
    """Return alpha, lowered wherever ``alpha q`` would exceed `room`; None is no bound."""
    return alpha if room is None else _divide(room, q).clamp(max=alpha)


def _divide(x: Scalar, y: Tensor) -> Tensor:
    """Return ``x / y`` for ``y >= 0``, finite and rounded once (torch multiplies a Python number by the reciprocal)."""
    over = x if isinstance(x, Tensor) else torch.full((), x, dtype=y.dtype, device=y.device)
    return over / y.clamp(min=SMALLEST_DIVISOR)


def accumulator(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums are accumulated."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
