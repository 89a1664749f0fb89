"""The theory's exact consequences: momentum and SGD as special cases, one weight, and what the guard guarantees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from to_finetune.optim import RankOneTO

from .helpers import (
    OPTIMIZERS,
    copies,
    flat,
    initial_state,
    make_weights,
    random_gradients,
    rule_step,
    run,
    slope_matrix,
    step,
)

PAPER_ALPHAS = [0.0, 0.01, 0.1, 0.5, 1.0]
BETAS = [0.01, 0.1, 0.5, 0.9, 1.0]
UNSTABLE = {"full": [0.01, 0.1, 0.5, 1.0], "rank_one": [0.01, 0.1, 0.5, 1.0], "diagonal": [0.5, 1.0]}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("options", [{}, {"gamma_max": None}, {"relative_alpha": True}, {"scope": "group"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_slope_it_is_momentum_bit_for_bit(
    variant: str, dtype: torch.dtype, options: dict[str, object], beta: float
) -> None:
    """alpha = 0: b = (1 - beta) b + beta g, w -= lr b; with beta = 1 that is SGD."""
    lr = 0.3
    params = make_weights(dtype=dtype)
    ws, bs = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    optimizer = OPTIMIZERS[variant](params, lr=lr, alpha=0.0, beta=beta, **options)
    for _ in range(20):
        grads = random_gradients(params)
        step(optimizer, params, grads)
        bs = [(1 - beta) * b + beta * g for b, g in zip(bs, grads, strict=True)]
        ws = [w - lr * b for w, b in zip(ws, bs, strict=True)]
        assert all(torch.equal(p, w) for p, w in zip(params, ws, strict=True))
        assert all(torch.equal(optimizer.state[p]["b"], b) for p, b in zip(params, bs, strict=True))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_without_slope_it_is_torchs_sgd(variant: str, beta: float) -> None:
    """alpha = 0: SGD(lr=lr * beta, momentum=1 - beta, dampening=0) to rounding, so plain SGD for beta = 1."""
    ours = make_weights()
    theirs = copies(ours)
    run(OPTIMIZERS[variant](ours, lr=0.3, alpha=0.0, beta=beta), ours, 20)
    run(torch.optim.SGD(theirs, lr=0.3 * beta, momentum=1 - beta, dampening=0), theirs, 20)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("options", [{}, {"grad_scale": "factored"}, {"gamma_max": None}])
def test_rank_one_with_relative_alpha_is_momentum_where_all_weights_start_at_zero(
    options: dict[str, object], state_dtype: torch.dtype | None
) -> None:
    """As LoRA's B does; v of some zeros among other weights is zero there alone."""
    ours, theirs = ([torch.nn.Parameter(torch.zeros(6, 40)), torch.nn.Parameter(torch.eye(4))] for _ in range(2))
    more = {"lr": 0.3, "relative_alpha": True, "state_dtype": state_dtype, **options}
    optimizers = [RankOneTO(ours, alpha=0.3, **more), RankOneTO(theirs, alpha=0.0, **more)]  # type: ignore[arg-type]
    for t in range(10):
        grads = random_gradients(ours)
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            step(optimizer, params, grads)
        assert torch.equal(ours[0], theirs[0])
        assert not torch.equal(ours[1], theirs[1]) or t == 0
    state = optimizers[0].state
    assert not any(state[ours[0]][name].any() for name in ("u", "v"))
    assert torch.equal(optimizers[1].state[theirs[1]]["v"] != 0, torch.eye(4) != 0)


def test_without_rates_it_never_moves(variant: str) -> None:
    """alpha = beta = 0: the model of the gradient stays zero."""
    params = make_weights()
    before = copies(params)
    run(OPTIMIZERS[variant](params, lr=0.3, alpha=0.0, beta=0.0), params, 5)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("gamma_max", [1.0, None])
@pytest.mark.parametrize("relative_alpha", [False, True])
def test_diagonal_equals_full_on_single_weights(relative_alpha: bool, gamma_max: float | None) -> None:
    """A 1 x 1 matrix is its diagonal, in every step."""
    options = {"lr": 0.1, "alpha": 0.3, "beta": 0.2, "gamma_max": gamma_max, "relative_alpha": relative_alpha}
    diagonal = make_weights([(1,), ()])
    full = copies(diagonal)
    optimizers = [OPTIMIZERS[name](w, **options) for name, w in (("diagonal", diagonal), ("full", full))]
    for _ in range(10):
        grads = random_gradients(diagonal)
        step(optimizers[0], diagonal, grads)
        step(optimizers[1], full, grads)
        torch.testing.assert_close(flat(diagonal), flat(full), rtol=1e-12, atol=1e-12)
        for p, q in zip(diagonal, full, strict=True):
            a, A = optimizers[0].state[p]["a"], slope_matrix(optimizers[1].state[q])
            torch.testing.assert_close(a.view(1, 1), A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma_max", [1.0, None])
@pytest.mark.parametrize("relative_alpha", [False, True])
def test_the_first_rank_one_step_of_a_single_weight_equals_full(relative_alpha: bool, gamma_max: float | None) -> None:
    """u = 0 and v = 1 make dA = du v, Full's; from the second step on v du + u dv is another step in A."""
    options = {"lr": 0.1, "alpha": 0.3, "beta": 0.2, "gamma_max": gamma_max, "relative_alpha": relative_alpha}
    w, g = torch.tensor([1.7]).double(), torch.tensor([-0.6]).double()
    one_w, (u, v, one_b), one_G = rule_step("rank_one", w, g, initial_state("rank_one", 1), **options)
    full_w, (A, full_b), full_G = rule_step("full", w, g, initial_state("full", 1), **options)
    torch.testing.assert_close((one_w, (u * v).view(1, 1), one_b, one_G), (full_w, A, full_b, full_G))


def test_a_rank_one_step_of_a_single_weight_is_fulls_with_another_alpha() -> None:
    """(u - alpha s r)(v - alpha c w) = u v - alpha' r w with alpha' = alpha (u^2 + v^2 - alpha u v r w)."""
    alpha, beta = 0.3, 0.2
    for w, g, u, v, b in torch.randn(20, 5, 1, dtype=torch.float64):
        r = u * v * w + b - g
        alpha_of_full = alpha * (u**2 + v**2 - alpha * u * v * r * w)
        rates = {"lr": 0.1, "beta": beta, "gamma_max": None}
        one_w, (new_u, new_v, one_b), one_G = rule_step("rank_one", w, g, (u, v, b), alpha=alpha, **rates)
        full_w, (A, full_b), full_G = rule_step("full", w, g, ((u * v).view(1, 1), b), alpha=alpha_of_full, **rates)
        torch.testing.assert_close((one_w, (new_u * new_v).view(1, 1), one_b, one_G), (full_w, A, full_b, full_G))


def largest_estimate(variant: str, alpha: float, beta: float, gamma_max: float | None) -> tuple[Tensor, Tensor]:
    """The largest |G_i| and |g_i| of 25 steps of noise at fixed, normally distributed weights, n = 1000."""
    w = torch.randn(1000, dtype=torch.float64)
    state = initial_state(variant, 1000)
    largest_G = largest_g = torch.zeros_like(w)
    for _ in range(25):
        g = torch.randn_like(w)
        _, state, G = rule_step(variant, w, g, state, lr=0.0, alpha=alpha, beta=beta, gamma_max=gamma_max)
        largest_G, largest_g = largest_G.maximum(G.abs()), largest_g.maximum(g.abs())
        if not G.isfinite().all():
            break
    return largest_G, largest_g


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("alpha", PAPER_ALPHAS)
def test_the_guard_keeps_the_estimate_within_the_gradients(variant: str, alpha: float, beta: float) -> None:
    """On the paper's grid: Full and Diagonal average the gradients, so G_i never exceeds them; RankOne nearly so."""
    G, g = largest_estimate(variant, alpha, beta, gamma_max=1.0)
    if variant == "rank_one":
        assert G.norm() <= 2 * g.norm()
    else:
        assert (G / g).max() <= 1 + 1e-9


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("name", "alpha"), [(name, alpha) for name, alphas in UNSTABLE.items() for alpha in alphas])
def test_without_the_guard_the_same_estimate_blows_up(name: str, alpha: float, beta: float) -> None:
    """The paper's exact update on the same grid: gamma > 2, and the residual grows without bound."""
    G, _ = largest_estimate(name, alpha, beta, gamma_max=None)
    assert not (G < 1e6).all()
