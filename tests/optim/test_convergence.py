"""The paper's theorem: on a strongly convex problem the errors of w and of G fall like 1/t, and G's only if beta does.

Ridge-logistic regression with mini-batches, many runs as members of one vmap, expectations as means over them.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from to_finetune.optim.schedules import rates_at

from .helpers import OPTIMIZERS, initial_state, rule_step

ROWS, N, RIDGE, BATCH = 200, 8, 0.3, 8
RUNS, STEPS = 48, 2000
SCHEDULE = {"schedule": "theorem", "lr": 8.0, "alpha": 50.0, "beta": 6.0, "t0": 20.0}
CONSTANT_BETA = 0.3


class Slopes(NamedTuple):
    """Log-log slopes over the steps, of E||w - w*||^2 and of E||G - grad F(w)||^2."""

    weights: float
    estimate: float


def gradient(w: Tensor, rows: Tensor) -> Tensor:
    """Of RIDGE/2 ||w||^2 + mean log(1 + exp(-rows w)); each row is a label, 1 or -1, times its features."""
    return RIDGE * w - rows.mT @ torch.sigmoid(-(rows @ w)) / len(rows)


def solution(rows: Tensor) -> Tensor:
    """The minimum, by Newton's method."""
    w = torch.zeros(N, dtype=torch.float64)
    for _ in range(20):
        p = torch.sigmoid(rows @ w)
        hessian = (rows.mT * (p * (1 - p))) @ rows / len(rows) + RIDGE * torch.eye(N)
        w = w - torch.linalg.solve(hessian, gradient(w, rows))
    assert gradient(w, rows).norm() < 1e-14
    return w


def slope(times: list[float], values: list[Tensor]) -> float:
    """Of the least-squares line through the logarithms."""
    x, y = torch.tensor(times, dtype=torch.float64).log(), torch.stack(values).log()
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


@pytest.fixture(scope="module", params=list(OPTIMIZERS))
def slopes(request: pytest.FixtureRequest) -> tuple[Slopes, Slopes]:
    """With the theorem's schedule, and with a constant beta instead; both see the same mini-batches."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(ROWS, N, dtype=torch.float64, generator=generator)
    noise = torch.rand(ROWS, dtype=torch.float64, generator=generator)
    rows = torch.where(noise < torch.sigmoid(features.sum(1)), 1.0, -1.0)[:, None] * features
    optimum = solution(rows)

    def one(w: Tensor, state: tuple[Tensor, ...], batch: Tensor, beta: Tensor, lr: float, alpha: float) -> tuple:
        new_w, new_state, G = rule_step(request.param, w, gradient(w, batch), state, lr=lr, alpha=alpha, beta=beta)
        return new_w, new_state, (w - optimum).square().sum(), (G - gradient(w, rows)).square().sum()

    step = torch.vmap(one, in_dims=(0, 0, 0, 0, None, None))
    w = torch.zeros(2 * RUNS, N, dtype=torch.float64)
    state = tuple(x.expand(2 * RUNS, *x.shape) for x in initial_state(request.param, N))
    measured = set(torch.logspace(2, 3.3, 60).long().tolist())
    times, curves = [], [[], [], [], []]
    for t in range(STEPS):
        lr, alpha, beta = rates_at(t, SCHEDULE)
        betas = torch.tensor([beta] * RUNS + [CONSTANT_BETA] * RUNS, dtype=torch.float64)
        batch = rows[torch.randint(ROWS, (RUNS, BATCH), generator=generator)].repeat(2, 1, 1)
        w, state, error_of_w, error_of_G = step(w, state, batch, betas, lr, alpha)
        if t in measured:
            times.append(t + SCHEDULE["t0"])
            means = (*error_of_w.view(2, RUNS).mean(1), *error_of_G.view(2, RUNS).mean(1))
            for curve, mean in zip(curves, means, strict=True):
                curve.append(mean)
    w1, w2, G1, G2 = (slope(times, curve) for curve in curves)
    return Slopes(w1, G1), Slopes(w2, G2)


def test_the_weights_converge_like_one_over_t(slopes: tuple[Slopes, Slopes]) -> None:
    """With the theorem's schedule, as with a constant beta."""
    for each in slopes:
        assert each.weights == pytest.approx(-1.0, abs=0.25)


def test_the_variance_of_the_estimate_falls_like_one_over_t(slopes: tuple[Slopes, Slopes]) -> None:
    """The variance reduction that the theorem promises."""
    assert slopes[0].estimate == pytest.approx(-1.0, abs=0.25)


def test_with_a_constant_beta_the_variance_stays(slopes: tuple[Slopes, Slopes]) -> None:
    """So the reduction is the schedule's work, not the problem's."""
    assert slopes[1].estimate == pytest.approx(0.0, abs=0.25)
