"""The paper's theorems on two small strongly convex problems: `to-finetune reproduce theory`.

Ridge-regularised logistic and least-squares regression with mini-batches, n = 8, float64. The runs are members of one
`torch.vmap` over the rules of `to_finetune.optim.rules` with ``gamma_max=None``, the paper's exact update; an
expectation is a mean over runs, and all methods of a problem see the same mini-batches.

- O(1/t): ``E||w_t - w*||^2`` and ``E||G_t - grad F(w_t)||^2`` fall like 1/t under the theorem's schedule, the second
  only if beta falls too; without and with projection onto a ball that contains w*.
- Proposition 2: A and b stay within `proposition_2_bound` where its condition on the sum of alpha holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import exp, inf, log10
from typing import Any, NamedTuple

import torch
from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.schedules import rates_at
from to_finetune.paper.methods import State, adam, momentum
from to_finetune.paper.tuning import rounded

ROWS, N, RIDGE, BATCH, SEED = 200, 8, 0.3, 8, 7
LR, BETA, T0 = 8.0, 6.0, 20.0  # lr_t = LR / (t + T0) and so on; alpha comes from the proposition's condition
CONSTANT_BETA = BETA / T0
ADAM_LR = 2.0  # less than LR, because Adam divides by the gradient's size
BETA1, BETA2 = torch.tensor([0.9, 0.999], dtype=torch.float64)
POINTS, WINDOW = 44, 20  # a curve's log-spaced points; its slope is fitted to those from steps / WINDOW on
FACTORS = (1.0, 10.0, 100.0, 1000.0)  # times the largest sum of alpha that the proposition allows
QUICK, FULL = (48, 800, 200), (256, 10_000, 2000)  # runs, steps, and steps of Proposition 2
METHODS = ("full_to", "diagonal_to", "rank_one_to", "momentum", "sgd", "adam")


class Problem(NamedTuple):
    """Minimise ``RIDGE/2 ||w||^2 + mean loss(x.w, y)``, where ``d loss / d (x.w) = link(x.w) - y``."""

    rows: Tensor  # (ROWS, N), each an x
    targets: Tensor  # (ROWS,), each a y
    link: Callable[[Tensor], Tensor]
    optimum: Tensor  # w*, (N,)
    radius: float  # D, a little more than ||w*||
    g_max: float  # a bound on the norm of mini-batch gradients in the ball of radius D


class Form(NamedTuple):
    """What is varied within a method."""

    projected: bool = False
    constant_beta: bool = False
    factor: float = 1.0  # one of FACTORS


class Step(NamedTuple):
    """One step of all members, (forms, runs, ...)."""

    w: Tensor  # (..., N), before the step
    G: Tensor  # (..., N), the estimate of the gradient at w
    state: State  # after the step
    new_w: Tensor  # (..., N)
    left: Tensor  # whether the step left the ball


def run(quick: bool, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Compute every number of the reproduction, ready for JSON; the quick form is smaller but has the same parts."""
    runs, steps, proposition_steps = QUICK if quick else FULL
    settings = {
        **{"rows": ROWS, "n": N, "ridge": RIDGE, "batch": BATCH, "seed": SEED, "runs": runs, "steps": steps},
        **{"lr": LR, "beta": BETA, "t0": T0, "constant_beta": CONSTANT_BETA, "gamma_max": None, "adam_lr": ADAM_LR},
        **{"adam_betas": [BETA1.item(), BETA2.item()], "proposition_steps": proposition_steps},
        "slope_window": [steps // WINDOW, steps],
    }
    results: dict[str, Any] = {
        "protocol": {"name": "quick" if quick else "full"},
        "settings": settings,
        "problems": {},
        "proposition_2": {},
    }
    for name in ("ridge_logistic", "quadratic"):
        problem = make_problem(name)
        constants = {"D": problem.radius, "norm_of_optimum": problem.optimum.norm().item(), "g_max": problem.g_max}
        constants |= {"alpha": largest_alpha(problem.radius)}
        parts: dict[str, Any] = {"constants": rounded(constants), "methods": {}, "projected": {}}
        for method in METHODS:
            progress(f"{name}: {method}, {runs} runs of {steps} steps")
            for form, curve in convergence(problem, method, runs, steps).items():
                part = parts["projected" if form.projected else "methods"].setdefault(method, {})
                part["constant_beta" if form.constant_beta else "theorem"] = rounded(curve)
        results["problems"][name] = parts
        progress(f"{name}: Proposition 2")
        results["proposition_2"][name] = rounded(proposition_2(problem, runs, proposition_steps))
    return results


def make_problem(name: str) -> Problem:
    """Build the problem "ridge_logistic" (labels 0 and 1) or "quadratic", with w* by Newton's method."""
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(ROWS, N, dtype=torch.float64, generator=generator)
    noise = torch.rand(ROWS, dtype=torch.float64, generator=generator)
    w = torch.zeros(N, dtype=torch.float64)
    if name == "ridge_logistic":
        problem = Problem(rows, (noise < torch.sigmoid(rows.sum(1))).double(), torch.sigmoid, w, inf, inf)
    else:
        problem = Problem(rows, 0.5 * rows.sum(1) + 4 * (noise - 0.5), torch.clone, w, inf, inf)
    full_gradient = partial(gradient, problem, rows=rows, targets=problem.targets)
    for _ in range(20):
        w = w - torch.linalg.solve(torch.func.jacrev(full_gradient)(w), full_gradient(w))
    radius = 1.1 * w.norm().item()
    lengths = rows.norm(dim=1)
    largest = lengths * radius + problem.targets.abs() if name == "quadratic" else 1.0  # of |link(x.w) - y|
    return problem._replace(optimum=w, radius=radius, g_max=RIDGE * radius + (lengths * largest).max().item())


def gradient(problem: Problem, w: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the loss over these rows at w, (N,)."""
    return RIDGE * w + rows.mT @ (problem.link(rows @ w) - targets) / len(rows)


def largest_alpha(radius: float) -> float:
    """Return the alpha for which the sum of ``alpha/(t+T0)^2`` over all t is the proposition's ``1/(2 D^2)``."""
    inverse_squares = torch.special.polygamma(1, torch.tensor(T0, dtype=torch.float64)).item()
    return 1 / (2 * radius**2 * inverse_squares)


def initial_state(method: str) -> State:
    """Return the initial state of one member: zeros, except RankOne's v."""
    zero = torch.zeros(N, dtype=torch.float64)
    if method == "full_to":
        return torch.diag(zero), zero
    if method == "rank_one_to":
        return zero, torch.full_like(zero, N**-0.5), zero
    return (zero,) if method in ("momentum", "sgd") else (zero, zero)


def update(
    method: str, w: Tensor, g: Tensor, state: State, lr: Tensor, alpha: Tensor, beta: Tensor, t: Tensor
) -> tuple[Tensor, State, Tensor]:
    """Take one member's step after t others; return the new w and state, and the estimate G of the gradient."""
    if method == "adam":
        w, m, v = adam(w, g, *state, lr=lr * (ADAM_LR / LR), beta1=BETA1, beta2=BETA2, t=t + 1)
        return w, (m, v), m / (1 - BETA1 ** (t + 1))
    if method in ("momentum", "sgd"):
        w, b = momentum(w, g, *state, lr=lr, beta=beta if method == "momentum" else torch.ones_like(beta))
        return w, (b,), b
    if method == "full_to":
        A, b = state
        product = rules.full_dense_product(A, w)
        full = rules.full(w, g, b, product, lr=lr, alpha=alpha, beta=beta, gamma_max=None)
        return full.w, (rules.full_dense_learn(A, full.correction, w), full.b), full.G
    rule = rules.diagonal if method == "diagonal_to" else rules.rank_one
    w, *new, G = rule(w, g, *state, lr=lr, alpha=alpha, beta=beta, gamma_max=None)
    return w, tuple(new), G


def trajectory(problem: Problem, method: str, forms: list[Form], runs: int, steps: int) -> Iterator[Step]:
    """Yield the steps of all forms of a method, `runs` times each, from w = 0, on the same mini-batches."""

    def one(
        w: Tensor, state: State, batch: Tensor, alpha: Tensor, beta: Tensor, radius: Tensor, lr: Tensor, t: Tensor
    ) -> Step:
        g = gradient(problem, w, problem.rows[batch], problem.targets[batch])
        new_w, state, G = update(method, w, g, state, lr, alpha, beta, t)
        norm = new_w.norm()
        return Step(w, G, state, new_w * (radius / norm).clamp(max=1.0), norm > radius)

    over_runs = torch.vmap(one, in_dims=(0, 0, 0, None, None, None, None, None))
    step: Callable[..., Step] = torch.vmap(over_runs, in_dims=(0, 0, None, 0, 0, 0, None, None))
    generator = torch.Generator().manual_seed(SEED + 1)
    radius = torch.tensor([problem.radius if form.projected else inf for form in forms], dtype=torch.float64)
    factor = torch.tensor([form.factor for form in forms], dtype=torch.float64)
    constant = torch.tensor([form.constant_beta for form in forms])
    bases = {"lr": LR, "alpha": largest_alpha(problem.radius) * factor, "beta": BETA, "t0": T0}
    w = torch.zeros(len(forms), runs, N, dtype=torch.float64)
    state = tuple(x.expand(len(forms), runs, *x.shape) for x in initial_state(method))
    for t in torch.arange(steps, dtype=torch.float64):
        lr, alpha, beta = rates_at(t, {"schedule": "theorem", **bases})
        batch = torch.randint(ROWS, (runs, BATCH), generator=generator)
        taken = step(w, state, batch, alpha, torch.where(constant, CONSTANT_BETA, beta), radius, lr, t)
        w, state = taken.new_w, taken.state
        yield taken


def convergence(problem: Problem, method: str, runs: int, steps: int) -> dict[Form, dict[str, Any]]:
    """Compute the curves and slopes of each form of a method; SGD and Adam have no beta to keep constant."""
    constant = (False,) if method in ("sgd", "adam") else (False, True)
    forms = [Form(projected, constant_beta) for projected in (False, True) for constant_beta in constant]
    full_gradient = torch.vmap(partial(gradient, problem, rows=problem.rows, targets=problem.targets))
    measured = sorted(set(torch.logspace(0, log10(steps), POINTS).long().tolist()))
    errors, variances, left = [], [], torch.zeros(len(forms), dtype=torch.float64)
    for t, step in enumerate(trajectory(problem, method, forms, runs, steps), start=1):
        left += step.left.mean(1, dtype=torch.float64)
        if t in measured:
            true = full_gradient(step.w.flatten(0, 1)).view_as(step.w)
            errors.append((step.w - problem.optimum).square().sum(-1))
            variances.append((step.G - true).square().sum(-1))
    curves: dict[Form, dict[str, Any]] = {form: {"steps": measured} for form in forms}
    for name, values in (("error", torch.stack(errors)), ("variance", torch.stack(variances))):
        for i, curve in enumerate(curves.values()):
            curve[name] = values[:, i].mean(1).tolist()
            curve[f"{name}_slope"], curve[f"{name}_slope_se"] = fitted_slope(measured, values[:, i])
    for form, count in zip(forms, left.tolist(), strict=True):
        curves[form] |= {"projections_per_run": count} if form.projected else {}
    return curves


def fitted_slope(steps: list[int], values: Tensor) -> tuple[float, float]:
    """Fit the slope of log E against log(t + T0) over the window by least squares, with a jackknife standard error.

    values: (points, runs), whose mean over runs is E. The jackknife leaves out one run at a time, so the error is valid
    although the points of a run depend on each other.
    """
    inside = torch.tensor(steps) >= steps[-1] / WINDOW
    x = (torch.tensor(steps, dtype=torch.float64)[inside] + T0).log()
    weights = (x - x.mean()) / (x - x.mean()).square().sum()
    values = values[inside]
    runs = values.shape[1]
    left_out = weights @ ((values.sum(1, keepdim=True) - values) / (runs - 1)).log()
    error = ((runs - 1) * left_out.var(correction=0)).sqrt()
    return (weights @ values.mean(1).log()).item(), error.item()


def proposition_2_bound(radius: float, g_max: float, alpha_sum: float) -> tuple[float, float]:
    """Return bounds on the Frobenius norm of A and on the norm of b, for Full and Diagonal TO, at any time.

    Our reconstruction (the paper's formulas did not reach us). Let ``A_0 = b_0 = 0``, ``||w_t|| <= D``,
    ``||g_t|| <= g``, ``0 <= beta_t <= 1``, ``sum alpha_t <= 1/(2 D^2)``, and M_t the largest ``||A_s||_F``, s <= t.
    b_{t+1} is a mean of b_t and ``g_t - A_t w_t``, so ``||b_t|| <= g + D M_t`` by induction.
    ``A_{t+1} = A_t (I - alpha_t w w^T) - alpha_t (b_t - g_t) w^T`` and ``alpha_t D^2 <= 1/2``, so the factor
    ``I - alpha_t w w^T`` increases no norm: ``M_{t+1} <= M_t + alpha_t D (2 g + D M_t)``, that is
    ``M_{t+1} + 2 g/D <= (1 + alpha_t D^2) (M_t + 2 g/D)``. With ``1 + x <= e^x``, and S the sum of alpha,
    ``||A_t|| <= (2 g/D) (e^(S D^2) - 1)`` and ``||b_t|| <= g + D ||A||``: at the limit 1.30 g/D and 2.30 g.
    Diagonal TO likewise, elementwise: ``|1 - alpha w_i^2| <= 1``. RankOne has no such bound: u and v feed each other.
    To first order in ``S D^2`` no smaller bound on A holds: an adversary in the tests reaches 98 % of it.
    """
    slope = 2 * g_max / radius * (exp(alpha_sum * radius**2) - 1)
    return slope, g_max + radius * slope


def proposition_2(problem: Problem, runs: int, steps: int) -> dict[str, Any]:
    """Return the largest norms of A and b over runs and steps, divided by the bounds that hold at factor 1.

    At larger factors alpha may exceed the ``2/D^2`` up to which a step with the same w contracts: see first_alpha_D2.
    """
    limit = 1 / (2 * problem.radius**2)
    slope_bound, offset_bound = proposition_2_bound(problem.radius, problem.g_max, limit)
    forms = [Form(projected=True, factor=factor) for factor in FACTORS]
    first = largest_alpha(problem.radius) / T0**2 * problem.radius**2
    results: dict[str, Any] = {"alpha_sum_limit": limit, "slope_bound": slope_bound, "offset_bound": offset_bound}
    results |= {"factor": list(FACTORS), "first_alpha_D2": [first * factor for factor in FACTORS]}
    for method in ("full_to", "diagonal_to", "rank_one_to"):
        slopes, offsets = torch.zeros(2, len(forms), dtype=torch.float64)
        for step in trajectory(problem, method, forms, runs, steps):
            slopes = torch.maximum(slopes, slope_norm(method, step.state).amax(1))
            offsets = torch.maximum(offsets, step.state[-1].norm(dim=-1).amax(1))
        results[method] = {
            "slope_ratio": (slopes / slope_bound).tolist(),
            "offset_ratio": (offsets / offset_bound).tolist(),
            "proved": method != "rank_one_to",
        }
    return results


def slope_norm(method: str, state: State) -> Tensor:
    """Return the Frobenius norm of A, (forms, runs)."""
    if method == "rank_one_to":
        return state[0].norm(dim=-1) * state[1].norm(dim=-1)
    return state[0].flatten(2).norm(dim=-1)
