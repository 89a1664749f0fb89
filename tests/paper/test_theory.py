"""The paper's theorems, as `to-finetune reproduce theory` shows them: what is measured, how, and what must come out."""

from __future__ import annotations

import json
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.textbook import STEPS
from to_finetune.optim import rules
from to_finetune.paper import theory
from to_finetune.paper.theory import METHODS, Form, Problem

PROBLEMS = ("ridge_logistic", "quadratic")
LEARNED = METHODS[:3]  # have a slope A
FALLING = METHODS[:4]  # their beta may fall


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The quick form's."""
    return theory.run(quick=True)


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    """Each of the two."""
    return theory.make_problem(request.param)


def loss(problem: Problem, w: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """What the problem's docstring minimises, written without its link."""
    z = rows @ w
    if problem.link is torch.sigmoid:
        each = torch.nn.functional.binary_cross_entropy_with_logits(z, targets, reduction="none")
    else:
        each = (z - targets).square() / 2
    return theory.RIDGE / 2 * w.square().sum() + each.mean()


def test_the_gradient_is_autograds(problem: Problem) -> None:
    """On a mini-batch, at a random point."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(theory.N, dtype=torch.float64, generator=generator, requires_grad=True)
    rows, targets = problem.rows[3:11], problem.targets[3:11]
    (expected,) = torch.autograd.grad(loss(problem, w, rows, targets), w)
    torch.testing.assert_close(theory.gradient(problem, w.detach(), rows, targets), expected, rtol=1e-12, atol=1e-14)


def test_the_optimum_has_no_gradient_and_lies_in_the_ball(problem: Problem) -> None:
    """Strong convexity makes it the only one."""
    w = problem.optimum.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(problem, w, problem.rows, problem.targets), w)
    assert g.norm() < 1e-13
    assert 0 < w.norm() < problem.radius


def test_g_max_bounds_the_gradients_in_the_ball_and_is_reached(problem: Problem) -> None:
    """By the worst row, at the point of the ball that is worst for it; by half at least where the loss is logistic."""
    w = -problem.radius * problem.rows / problem.rows.norm(dim=1, keepdim=True)
    w = torch.cat([w, -w])
    rows, targets = problem.rows.repeat(2, 1), problem.targets.repeat(2)
    of_one_row = torch.vmap(lambda w, row, target: theory.gradient(problem, w, row[None], target[None]))
    largest = of_one_row(w, rows, targets).norm(dim=1).max().item()
    reached = 1 - 1e-12 if problem.link is torch.clone else 0.5
    assert reached * problem.g_max <= largest <= problem.g_max * (1 + 1e-12)


def test_the_sum_of_alpha_is_the_propositions_limit() -> None:
    """``1/(2 D^2)``; the tail of a sum of inverse squares is the inverse of where it starts, to second order."""
    terms = 100_000
    t = torch.arange(terms, dtype=torch.float64) + theory.T0
    total = theory.largest_alpha(3.0) * ((1 / t**2).sum() + 1 / (terms + theory.T0 - 0.5))
    assert total.item() == pytest.approx(1 / 18, rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_member_takes_the_steps_of_a_plain_loop(method: str) -> None:
    """Its own mini-batches, schedule, projection and rule: the textbook's, or torch's Adam."""
    problem, runs, steps, run = theory.make_problem("quadratic"), 3, 60, 1
    forms = [Form(), Form(projected=True), Form(constant_beta=True, factor=20.0)]
    batched = list(theory.trajectory(problem, method, forms, runs, steps))
    for i, form in enumerate(forms):
        generator = torch.Generator().manual_seed(theory.SEED + 1)
        w = torch.zeros(theory.N, dtype=torch.float64)
        state = theory.initial_state(method)
        parameter = torch.nn.Parameter(w.clone())
        reference = torch.optim.Adam([parameter])
        for t, step in enumerate(batched):
            batch = torch.randint(theory.ROWS, (runs, theory.BATCH), generator=generator)[run]
            g = theory.gradient(problem, w, problem.rows[batch], problem.targets[batch])
            time = t + theory.T0
            lr, alpha = theory.LR / time, form.factor * theory.largest_alpha(problem.radius) / time**2
            beta = theory.CONSTANT_BETA if form.constant_beta else theory.BETA / time
            if method in LEARNED:
                w, state, G = STEPS[method.removesuffix("_to")](w, g, state, lr, alpha, beta, None)
            elif method == "adam":
                parameter.data, parameter.grad = w, g
                reference.param_groups[0]["lr"] = theory.ADAM_LR / time
                reference.step()
                w, G = parameter.detach().clone(), reference.state[parameter]["exp_avg"] / (1 - 0.9 ** (t + 1))
            else:
                G = g if method == "sgd" else (1 - beta) * state[0] + beta * g
                w, state = w - lr * G, (G,)
            if form.projected:
                w = w * min(1.0, problem.radius / w.norm().item())
            torch.testing.assert_close(step.G[i, run], G, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(step.new_w[i, run], w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_the_projection_keeps_the_weights_in_the_ball(problem: Problem, method: str) -> None:
    """Which they leave without it."""
    steps = list(theory.trajectory(problem, method, [Form(), Form(projected=True)], runs=8, steps=100))
    free, projected = (torch.stack([step.new_w[i] for step in steps]).norm(dim=-1).max().item() for i in (0, 1))
    assert projected <= problem.radius * (1 + 1e-12)
    assert free > problem.radius * 1.01
    assert torch.stack([step.left[1] for step in steps]).any()


def test_a_curve_holds_the_means_over_runs_of_both_errors_at_its_steps(problem: Problem) -> None:
    """The weights before the step, and the estimate of the gradient at them."""
    curve = theory.convergence(problem, "momentum", runs=3, steps=20)[Form(projected=True)]
    steps = list(theory.trajectory(problem, "momentum", [Form(projected=True)], runs=3, steps=20))
    assert {1, 2, 20} <= set(curve["steps"])
    for t, error, variance in zip(curve["steps"], curve["error"], curve["variance"], strict=True):
        w = steps[t - 2].new_w[0] if t > 1 else torch.zeros(3, theory.N, dtype=torch.float64)
        G = steps[t - 1].G[0]
        true = torch.stack([theory.gradient(problem, each, problem.rows, problem.targets) for each in w])
        assert error == pytest.approx((w - problem.optimum).square().sum(1).mean().item(), rel=1e-12)
        assert variance == pytest.approx((G - true).square().sum(1).mean().item(), rel=1e-12)
    assert curve["projections_per_run"] == pytest.approx(sum(step.left.sum().item() for step in steps) / 3)


def test_the_fit_finds_the_power_and_how_well_it_is_known() -> None:
    """Only from the window; the standard error is the spread of the slope over repetitions."""
    steps = sorted(set(torch.logspace(0, 3, 40).long().tolist()))
    t = torch.tensor(steps, dtype=torch.float64)[:, None]
    power = torch.where(t >= 1000 / theory.WINDOW, (t + theory.T0) ** -1.5, 7.0)
    assert theory.fitted_slope(steps, power.expand(-1, 5))[0] == pytest.approx(-1.5, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200, len(steps), 30, dtype=torch.float64, generator=generator)
    slopes, errors = torch.tensor([theory.fitted_slope(steps, power * (0.5 + n)) for n in noise]).T
    assert errors.mean().item() == pytest.approx(slopes.std().item(), rel=0.15)


@pytest.mark.parametrize("part", ["methods", "projected"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_weights_converge_like_one_over_t(results: dict[str, Any], name: str, part: str) -> None:
    """Every method, under every schedule."""
    for method, forms in results["problems"][name][part].items():
        for form, curve in forms.items():
            assert curve["error_slope"] == pytest.approx(-1.0, abs=0.2), (method, form)
            assert 0 < curve["error_slope_se"] < 0.1


@pytest.mark.parametrize("part", ["methods", "projected"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_estimates_variance_falls_only_if_beta_does(results: dict[str, Any], name: str, part: str) -> None:
    """Like 1/t for TO and momentum; flat for a constant beta and for SGD. Adam's is still on its way to flat."""
    methods = results["problems"][name][part]
    assert set(methods) == set(METHODS)
    for method in FALLING:
        assert methods[method]["theorem"]["variance_slope"] == pytest.approx(-1.0, abs=0.2), method
        assert methods[method]["constant_beta"]["variance_slope"] == pytest.approx(0.0, abs=0.25), method
    assert methods["sgd"]["theorem"]["variance_slope"] == pytest.approx(0.0, abs=0.15)
    assert methods["adam"]["theorem"]["variance_slope"] > -0.5


def test_the_bound_by_hand() -> None:
    """D = 2, g = 3, a sum of 1/8, which is the limit: 3 (sqrt(e) - 1) for A, and 3 + 2 of it for b."""
    slope, offset = theory.proposition_2_bound(radius=2.0, g_max=3.0, alpha_sum=1 / 8)
    assert slope == pytest.approx(3 * (exp(0.5) - 1), rel=1e-12)
    assert offset == pytest.approx(3 + 6 * (exp(0.5) - 1), rel=1e-12)


@pytest.mark.parametrize(("share", "reached"), [(0.02, 0.97), (1.0, 0.45)])  # of the limit, of the bound of A
@pytest.mark.parametrize("variant", ["diagonal", "full"])
def test_an_adversary_stays_within_the_bound_and_comes_close(variant: str, share: float, reached: float) -> None:
    """One weight at +-D, a gradient of +-g, both turned over at each step, and beta = 1 make the residual large.

    To first order in the sum of alpha nothing smaller is a bound; at the limit this one reaches half of it.
    """
    radius, g_max, steps = 2.0, 3.0, 200
    limit = share / (2 * radius**2)
    slope_bound, offset_bound = theory.proposition_2_bound(radius, g_max, limit)
    a, b, slope, offset = *torch.zeros(2, 1, dtype=torch.float64), 0.0, 0.0
    for t in range(steps):
        w, g = (torch.tensor([x * (-1.0) ** t], dtype=torch.float64) for x in (radius, g_max))
        rates: dict[str, Any] = {"lr": 0.0, "alpha": limit / steps, "beta": 1.0, "gamma_max": None}
        if variant == "diagonal":
            _, a, b, _ = rules.diagonal(w, g, a, b, **rates)
        else:
            full = rules.full(w, g, b, a * w, **rates)
            a, b = rules.full_dense_learn(a[:, None], full.correction, w)[0], full.b
        slope, offset = max(slope, a.abs().item()), max(offset, b.abs().item())
    assert reached * slope_bound < slope <= slope_bound
    assert g_max <= offset <= offset_bound


@pytest.mark.parametrize("method", ["diagonal_to", "full_to"])
def test_random_adversaries_stay_within_the_bound(method: str) -> None:
    """Any weights in the ball, gradients up to g, beta in [0, 1], and alpha spread over the steps in any way."""
    radius, g_max, members, steps = 0.7, 2.0, 500, 30
    slope_bound, offset_bound = theory.proposition_2_bound(radius, g_max, 1 / (2 * radius**2))
    generator = torch.Generator().manual_seed(0)

    def sphere(length: float) -> Tensor:
        x = torch.randn(members, theory.N, dtype=torch.float64, generator=generator) ** 3  # some near an axis
        return length * x / x.norm(dim=1, keepdim=True)

    shares = torch.rand(members, steps, dtype=torch.float64, generator=generator) ** 8
    alphas = shares / shares.sum(1, keepdim=True) / (2 * radius**2)
    state = tuple(x.expand(members, *x.shape) for x in theory.initial_state(method))
    step = torch.vmap(lambda w, g, state, alpha, beta: theory.update(method, w, g, state, beta, alpha, beta, beta)[1])
    for alpha in alphas.T:
        beta = torch.rand(members, dtype=torch.float64, generator=generator).round(decimals=1)
        state = step(sphere(radius), sphere(g_max), state, alpha, beta)
        assert theory.slope_norm(method, tuple(x[None] for x in state)).max() <= slope_bound
        assert state[-1].norm(dim=1).max() <= offset_bound


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_state_stays_within_the_bound_where_the_condition_holds(results: dict[str, Any], name: str) -> None:
    """At factor 1; far beyond it, the unguarded update is far outside, or overflows (None)."""
    part = results["proposition_2"][name]
    assert part["factor"][0] == 1
    for method in LEARNED:
        ratios = part[method]
        assert 0 < ratios["slope_ratio"][0] <= 1
        assert 0 < ratios["offset_ratio"][0] <= 1
        for worst in (ratios["slope_ratio"][-1], ratios["offset_ratio"][-1]):
            assert worst is None or worst > 1e3
    assert [part[method]["proved"] for method in LEARNED] == [True, True, False]


def test_the_results_are_small_json(results: dict[str, Any]) -> None:
    """Without a NaN, and under 60 KB."""
    text = json.dumps(results, allow_nan=False)
    assert json.loads(text) == results
    assert len(text) < 60_000
    curve = results["problems"]["quadratic"]["methods"]["full_to"]["theorem"]
    assert len(curve["steps"]) == len(curve["error"]) == len(curve["variance"]) >= 30
    assert curve["steps"][0] == 1
    assert curve["steps"][-1] == results["settings"]["steps"]


def test_the_same_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn in between."""
    monkeypatch.setattr(theory, "QUICK", (3, 30, 10))
    said: list[str] = []
    first = theory.run(quick=True, progress=said.append)
    torch.rand(5)
    assert theory.run(quick=True) == first
    assert len(said) == 2 * (len(METHODS) + 1)
