"""The three optimizers once more: float64, flat vectors, word for word from the paper's table.

Nothing here is fast, and nothing is shared with the package under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Step = tuple[Tensor, State, Tensor]  # new weights, new state, G


def limited(alpha: float, beta: float, q: Tensor, unit: Tensor | None, gamma_max: float | None) -> Tensor:
    """alpha in units of 1/unit, lowered so that alpha q + beta stays within gamma_max (or is beta, if that is more)."""
    rate = torch.full_like(q, alpha) if unit is None else torch.where(unit > 0, alpha / unit, 0.0).expand_as(q)
    if gamma_max is None:
        return rate
    room = max(gamma_max - beta, 0.0)
    return torch.where(rate * q > room, room / q, rate)


def diagonal(
    w: Tensor,
    g: Tensor,
    state: State,
    lr: float,
    alpha: float,
    beta: float,
    gamma_max: float | None = 1.0,
    relative_alpha: bool = False,
) -> Step:
    """A = diag(a)."""
    a, b = state
    alpha_eff = limited(alpha, beta, w**2, (w**2).mean() if relative_alpha else None, gamma_max)
    r = a * w + b - g
    a = a - alpha_eff * r * w
    b = b - beta * r
    G = a * w + b
    return w - lr * G, (a, b), G


def rank_one(
    w: Tensor,
    g: Tensor,
    state: State,
    lr: float,
    alpha: float,
    beta: float,
    gamma_max: float | None = 1.0,
    relative_alpha: bool = False,
) -> Step:
    """A = u v^T."""
    u, v, b = state
    s = v @ w
    q = s**2 + (u @ u) * (w @ w)
    alpha_eff = limited(alpha, beta, q, torch.maximum(q, (w @ w) / len(w)) if relative_alpha else None, gamma_max)
    r = s * u + b - g
    c = u @ r
    u, v = u - alpha_eff * s * r, v - alpha_eff * c * w
    b = b - beta * r
    G = u * (v @ w) + b
    return w - lr * G, (u, v, b), G


def full(
    w: Tensor,
    g: Tensor,
    state: State,
    lr: float,
    alpha: float,
    beta: float,
    gamma_max: float | None = 1.0,
    relative_alpha: bool = False,
) -> Step:
    """A is a matrix."""
    A, b = state
    q = w @ w
    alpha_eff = limited(alpha, beta, q, q if relative_alpha else None, gamma_max)
    r = A @ w + b - g
    A = A - alpha_eff * torch.outer(r, w)
    b = b - beta * r
    G = A @ w + b
    return w - lr * G, (A, b), G


STEPS = {"diagonal": diagonal, "rank_one": rank_one, "full": full}


@dataclass
class Options:
    """The optimizers' options, under their names there."""

    lr: float = 0.1
    alpha: float = 0.1
    beta: float = 0.1
    schedule: str = "constant"
    alpha_decay: float = 1.0
    lr_decay: float = 1.0
    t0: float = 1.0
    gamma_max: float | None = 1.0
    relative_alpha: bool = False
    grad_scale: str | None = None
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_norm: float | None = None
    maximize: bool = False
    scope: str = "tensor"

    def rates(self, t: int) -> tuple[float, float, float]:
        """lr, alpha and beta of step t = 0, 1, ..."""
        if self.schedule == "theorem":
            return self.lr / (t + self.t0), self.alpha / (t + self.t0) ** 2, self.beta / (t + self.t0)
        return self.lr * self.lr_decay**t, self.alpha * self.alpha_decay**t, self.beta * self.alpha_decay**t


def equalized(g: Tensor) -> Tensor:
    """A matrix's gradient over what its row and its column say of an element's size, which has a floor."""
    squares, floor = g.square(), 1e-8
    mean = squares.mean()
    return g / torch.outer(
        (squares.mean(1) / mean).clamp(min=floor).sqrt(), (squares.mean(0) / mean).clamp(min=floor).sqrt()
    )


class Textbook:
    """An optimizer of one parameter group: all its weights are one vector `w`, a block is a set of indices into it.

    `state` holds a, u, v, b as vectors as long as w, and Full's A as one (block diagonal) matrix.
    """

    def __init__(self, variant: str, weights: Sequence[Tensor], **options: object) -> None:
        self.variant, self.options = variant, Options(**options)  # type: ignore[arg-type]
        self.w = torch.cat([p.detach().double().reshape(-1) for p in weights])
        self.indices = torch.arange(len(self.w)).split([p.numel() for p in weights])
        self.taken = [0] * len(weights)
        zero = torch.zeros_like(self.w)
        self.blocks = [range(len(weights))] if self.options.scope == "group" else [[k] for k in range(len(weights))]
        self.state = {"a": zero, "u": zero, "v": zero, "b": zero, "A": torch.diag(zero)}
        for block in self.blocks:
            where = torch.cat([self.indices[k] for k in block])
            self.state["v"] = self.state["v"].index_fill(0, where, max(1, len(where)) ** -0.5)
        if self.options.relative_alpha:
            self.state["v"] = torch.where(self.w == 0, 0.0, self.state["v"])
        self.error = float("nan")

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One step; a tensor without gradient stays as it is."""
        error = norm = 0.0
        for block in self.blocks:
            live = [k for k in block if grads[k] is not None]
            if not live or sum(len(self.indices[k]) for k in live) == 0:
                continue
            i = torch.cat([self.indices[k] for k in live])
            g = torch.cat([self._seen(k, grads[k]) for k in live])
            G = self._move(i, g, *self.options.rates(self.taken[live[0]]))
            error, norm = error + (G - g).square().sum().item(), norm + g.square().sum().item()
        self.taken = [t + (g is not None) for t, g in zip(self.taken, grads, strict=True)]
        self.error = (error / norm) ** 0.5 if norm else float("nan")
        if self.options.max_norm is not None:
            self.w = self.w * min(1.0, self.options.max_norm / self.w.norm().item())

    def _seen(self, k: int, grad: Tensor | None) -> Tensor:
        """The gradient that the regression is given."""
        assert grad is not None
        g = grad.double().reshape(-1) * (-1 if self.options.maximize else 1)
        if not self.options.decoupled_weight_decay:
            g = g + self.options.weight_decay * self.w[self.indices[k]]
        if self.options.grad_scale == "rms" and g.norm() > 0:
            g = g / g.square().mean().sqrt()
        if self.options.grad_scale == "factored" and g.norm() > 0:
            if grad.dim() > 1:
                g = equalized(g.view(grad.shape).flatten(1)).flatten()
            g = g / g.square().mean().sqrt()
        return g

    def _move(self, i: Tensor, g: Tensor, lr: float, alpha: float, beta: float) -> Tensor:
        """One step of the block with indices i; returns G."""
        names = {"diagonal": "ab", "rank_one": "uvb", "full": "Ab"}[self.variant]
        at = {name: (i[:, None], i) if name == "A" else (i,) for name in names}
        o, w, old = self.options, self.w[i], tuple(self.state[name][at[name]] for name in names)
        new_w, new, G = STEPS[self.variant](w, g, old, lr, alpha, beta, o.gamma_max, o.relative_alpha)
        if o.decoupled_weight_decay:
            new_w = new_w - lr * o.weight_decay * w
        self.w = self.w.index_put((i,), new_w)
        for name, value in zip(names, new, strict=True):
            self.state[name] = self.state[name].index_put(at[name], value)
        return G
