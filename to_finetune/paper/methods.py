"""The methods that are compared, as update rules over many members at once, and the trials of each.

A rule takes the weights w and the gradient g of many members, (members, n), their state and their rates, (members, 1).
The Trainable Optimizers are the rules of `to_finetune.optim.rules` themselves, with all weights as one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.full import history_is_smaller
from to_finetune.optim.schedules import rates_at

State = tuple[Tensor, ...]
Options = dict[str, Any]
Rates = dict[str, Any]  # tensors by name, (members, 1)
Trial = Mapping[str, Any]  # lr, schedule, and the method's own: alpha and beta, or beta1 and beta2

SCHEDULES = ("constant", "exponential")
LR_END, ALPHA_END = 0.01, 0.1  # the factors of lr, and of alpha and beta, after the last step of "exponential"
COARSE = tuple(10 ** (i / 2 - 1) for i in range(4))  # 0.1, 0.3, 1, 3
FINE = tuple(10 ** (i / 4 - 1) for i in range(8))  # the same range, twice as dense
BETAS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)  # as many as half of the paper's pairs
FOLDED = 32  # corrections of Full TO that are added to its matrix at once, which is then read and written only once
PAPER = (0.0, 0.01, 0.1, 0.5, 1.0)  # the paper's values of alpha and of beta


@dataclass(frozen=True)
class Method:
    """One column of a table.

    start: the initial state from ``(w, steps)``: members with weights w, (members, n), that will take so many steps.
    update: new weights and state from ``(w, g, state, rates, step)``; the state may be written in place.
    lrs: the values of lr that are tried first.
    grid: the values of the method's other rates.
    """

    label: str
    lrs: tuple[float, ...]
    grid: Mapping[str, tuple[float, ...]]
    start: Callable[[Tensor, int], State]
    update: Callable[[Tensor, Tensor, State, Rates, Tensor], tuple[Tensor, State]]
    ours: bool = False

    @property
    def title(self) -> str:
        return self.label + " (ours)" * self.ours

    def trials(self, lrs: Sequence[float]) -> list[Trial]:
        """Return every combination of these rates with the grid and with both schedules.

        alpha = beta = 0, which never moves, is left out.
        """
        grid = {"lr": lrs, **self.grid, "schedule": SCHEDULES}
        trials = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        return [trial for trial in trials if trial.get("alpha") or trial.get("beta", 1.0)]


def rates(trials: list[Trial], steps: int, like: Tensor) -> Callable[[Tensor], Rates]:
    """Return the rates of members with these trials, as a function of the steps taken."""

    def column(name: str) -> Tensor:
        return like.new_tensor([[float(trial.get(name, 0.0))] for trial in trials])

    decays = like.new_tensor([[float(trial["schedule"] == "exponential")] for trial in trials])
    group = {
        "schedule": "exponential",
        **{name: column(name) for name in ("lr", "alpha", "beta")},
        "lr_decay": LR_END ** (decays / steps),
        "alpha_decay": ALPHA_END ** (decays / steps),
    }
    fixed = {name: column(name) for name in ("beta1", "beta2") if name in trials[0]}
    return lambda step: {**rates_at(step, group)._asdict(), **fixed}


def adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: Tensor, beta1: Tensor, beta2: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step of Adam with bias correction, like `torch.optim.Adam`; t counts from 1, eps is torch's 1e-8."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    root = v.sqrt() / (1 - beta2**t).sqrt() + 1e-8
    return w - lr / (1 - beta1**t) * m / root, m, v


def momentum(w: Tensor, g: Tensor, b: Tensor, *, lr: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step ``b = (1-beta) b + beta g; w -= lr b``: a Trainable Optimizer without slope."""
    b = (1 - beta) * b + beta * g
    return w - lr * b, b


def _zeros(count: int) -> Callable[[Tensor, int], State]:
    return lambda w, steps: tuple(torch.zeros_like(w) for _ in range(count))


def _adam(w: Tensor, g: Tensor, state: State, rates: Rates, step: Tensor) -> tuple[Tensor, State]:
    w, *new = adam(w, g, *state, t=step + 1, lr=rates["lr"], beta1=rates["beta1"], beta2=rates["beta2"])
    return w, tuple(new)


def _momentum(w: Tensor, g: Tensor, state: State, rates: Rates, step: Tensor) -> tuple[Tensor, State]:
    w, *new = momentum(w, g, *state, lr=rates["lr"], beta=rates["beta"])
    return w, tuple(new)


def _diagonal(options: Options, w: Tensor, g: Tensor, state: State, rates: Rates, step: Tensor) -> tuple[Tensor, State]:
    a, b = state
    w, *new, _ = rules.diagonal(w, g, a, b, **rates, **options, mean_square=_dot(w, w) / w.shape[-1])
    return w, tuple(new)


def _rank_one(options: Options, w: Tensor, g: Tensor, state: State, rates: Rates, step: Tensor) -> tuple[Tensor, State]:
    u, v, b = state
    n = torch.full_like(w[:, :1], w.shape[-1])
    sums = rules.RankOneSums(_dot(v, w), _dot(w, w), _dot(u, u), _dot(u, b), _dot(u, g), n)
    w, *new, _ = rules.rank_one(w, g, u, v, b, **rates, **options, sums=sums)
    return w, tuple(new)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product of each member, (members, 1), summed in float64."""
    return (x * y).sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)


def _start_rank_one(w: Tensor, steps: int) -> State:
    return torch.zeros_like(w), torch.full_like(w, w.shape[-1] ** -0.5), torch.zeros_like(w)


def _start_full(w: Tensor, steps: int) -> State:
    """Return b, pairs of (correction, weights), (pairs, n) each, and the matrix that they are folded into when full.

    If the pairs of all steps are smaller than the matrix, they are kept and there is no matrix.
    """
    members, n = w.shape
    history = history_is_smaller(n, steps)
    pairs = steps if history else FOLDED
    slope = w.new_zeros(members, pairs, n), w.new_zeros(members, pairs, n)
    return torch.zeros_like(w), *slope, *(() if history else (w.new_zeros(members, n, n),))


@torch.compiler.disable  # its loop over members, whose number changes
def _full(options: Options, w: Tensor, g: Tensor, state: State, rates: Rates, step: Tensor) -> tuple[Tensor, State]:
    b, corrections, weights, *matrix = state
    held = int(step) % corrections.shape[1]
    if matrix and not held:
        matrix[0].baddbmm_(corrections.mT, weights, alpha=-1)
    product = torch.zeros_like(w)
    for i in rates["alpha"].nonzero()[:, 0].tolist():  # a batched matrix-vector product is five times slower
        product[i] = rules.full_history_product(corrections[i, :held], weights[i, :held], w[i])
        if matrix:
            product[i] += rules.full_dense_product(matrix[0][i], w[i])
    rule = partial(rules.full, **options)
    of_members = torch.vmap(lambda tensors, rates: rule(*tensors, **rates))
    new_w, b, _, correction = of_members((w, g, b, product), {name: rate[:, 0] for name, rate in rates.items()})
    corrections[:, held], weights[:, held] = correction, w
    return new_w, (b, corrections, weights, *matrix)


_EXACT: Options = {"gamma_max": None}
_OURS: Options = {"gamma_max": 1.0, "relative_alpha": True}
_TO_GRID = {"alpha": PAPER, "beta": PAPER}

METHODS: dict[str, Method] = {
    "adam": Method(
        "Adam",
        tuple(lr / 10 for lr in FINE),
        {"beta1": (0.0, 0.5, 0.9, 0.95), "beta2": (0.9, 0.99, 0.999)},
        _zeros(2),
        _adam,
    ),
    "momentum": Method("Momentum", FINE, {"beta": BETAS}, _zeros(1), _momentum),
    "full_to": Method("Full TO", COARSE, _TO_GRID, _start_full, partial(_full, _EXACT)),
    "diagonal_to": Method("Diagonal TO", COARSE, _TO_GRID, _zeros(2), partial(_diagonal, _EXACT)),
    "rank_one_to": Method("RankOne TO", COARSE, _TO_GRID, _start_rank_one, partial(_rank_one, _EXACT)),
    "full_to_ours": Method("Full TO", COARSE, _TO_GRID, _start_full, partial(_full, _OURS), ours=True),
    "diagonal_to_ours": Method("Diagonal TO", COARSE, _TO_GRID, _zeros(2), partial(_diagonal, _OURS), ours=True),
    "rank_one_to_ours": Method("RankOne TO", COARSE, _TO_GRID, _start_rank_one, partial(_rank_one, _OURS), ours=True),
}
