"""The rules: pure functions that equal the paper's lines in float64, under vmap, in pieces, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from to_finetune.optim import rules

from . import textbook
from .helpers import initial_state, rule_step

N = 7
GUARDS = [1.0, 0.4, None]


def random_state(variant: str, *members: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """w, g and the variant's state, with a leading dimension of members if there is one."""
    w, g, x, y, z = torch.randn(5, *members, N, dtype=torch.float64).to(dtype).unbind()
    A = torch.randn(*members, N, N, dtype=torch.float64).to(dtype)
    return w, g, *{"diagonal": (x, z), "rank_one": (x, y, z), "full": (A, z)}[variant]


@pytest.mark.parametrize("relative_alpha", [False, True])
@pytest.mark.parametrize("gamma_max", GUARDS)
@pytest.mark.parametrize("alpha", [0.01, 0.3, 2.0])
def test_closed_forms_equal_the_papers_lines(
    variant: str, alpha: float, gamma_max: float | None, relative_alpha: bool
) -> None:
    """New weights, new state and G, from random old ones, the guard binding or not."""
    for beta in (0.0, 0.2, 0.7, 1.0):
        w, g, *state = random_state(variant)
        options = {"alpha": alpha, "beta": beta, "gamma_max": gamma_max, "relative_alpha": relative_alpha}
        ours = rule_step(variant, w, g, tuple(state), lr=0.3, **options)
        theirs = textbook.STEPS[variant](w, g, tuple(state), 0.3, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma_max", GUARDS)
def test_the_guard_bounds_the_contraction(gamma_max: float | None) -> None:
    """Full multiplies the residual by 1 - gamma: gamma is gamma_max where the paper's would be more."""
    w, g, A, b = random_state("full")
    _, _, G = rule_step("full", w, g, (A, b), lr=0.0, alpha=0.3, beta=0.2, gamma_max=gamma_max)
    paper = 0.3 * w.square().sum() + 0.2
    gamma = paper if gamma_max is None else paper.clamp(max=gamma_max)
    assert paper > 1.0
    torch.testing.assert_close(G - g, (1 - gamma) * (A @ w + b - g))


def test_full_with_a_history_equals_full_with_a_matrix() -> None:
    """A w from the past pairs is A w from the matrix that they add up to."""
    A, pairs = torch.zeros(N, N, dtype=torch.float64), []
    for _ in range(5):
        w, correction = torch.randn(2, N, dtype=torch.float64)
        A = rules.full_dense_learn(A, correction, w)
        pairs.append((correction, w))
        corrections, weights = (torch.stack(rows) for rows in zip(*pairs, strict=True))
        torch.testing.assert_close(rules.full_history_product(corrections, weights, w), A @ w)


@pytest.mark.parametrize("relative_alpha", [False, True])
@pytest.mark.parametrize("gamma_max", GUARDS)
def test_vmap_over_members_equals_a_loop(variant: str, gamma_max: float | None, relative_alpha: bool) -> None:
    """Members with their own weights, state, lr, alpha and beta step as they would alone."""
    members = 4
    tensors = random_state(variant, members)
    rates = (
        torch.tensor([0.1, 0.0, 1.0, 0.2]).double(),
        torch.tensor([0.0, 0.1, 0.5, 2.0]).double(),
        torch.tensor([0.1, 1.0, 0.0, 0.5]).double(),
    )

    def one(w: Tensor, g: Tensor, state: tuple[Tensor, ...], lr: Any, alpha: Any, beta: Any) -> Any:
        options = {"gamma_max": gamma_max, "relative_alpha": relative_alpha}
        return rule_step(variant, w, g, state, lr=lr, alpha=alpha, beta=beta, **options)

    together = torch.vmap(one)(tensors[0], tensors[1], tensors[2:], *rates)
    for k in range(members):
        w, g, *state = (x[k] for x in tensors)
        alone = one(w, g, tuple(state), *(x[k].item() for x in rates))
        new_w, new_state, G = together
        torch.testing.assert_close((new_w[k], tuple(x[k] for x in new_state), G[k]), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype_and_arguments_are_not_written(variant: str, dtype: torch.dtype) -> None:
    """And float32 is float64 to float32's rounding."""
    w, g, *state = random_state(variant, dtype=dtype)
    before = [x.clone() for x in (w, g, *state)]
    new_w, new_state, G = rule_step(variant, w, g, tuple(state), lr=0.1, alpha=0.1, beta=0.2)
    assert {x.dtype for x in (new_w, *new_state, G)} == {dtype}
    assert all(torch.equal(x, y) for x, y in zip((w, g, *state), before, strict=True))
    exact = rule_step(variant, w.double(), g.double(), tuple(x.double() for x in state), lr=0.1, alpha=0.1, beta=0.2)
    torch.testing.assert_close((new_w, new_state, G), exact, check_dtype=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative_alpha", [False, True])
def test_sums_over_the_pieces_of_a_block_add_up(relative_alpha: bool) -> None:
    """A block cut in three steps as a whole, given the sums (RankOne) or the mean square (Diagonal) over it."""
    rates = {"lr": 0.1, "alpha": 0.3, "beta": 0.2, "relative_alpha": relative_alpha}
    sizes = (1, 2, 4)

    block = random_state("rank_one")
    pieces = list(zip(*(x.split(sizes) for x in block), strict=True))
    parts = [rules.rank_one_sums(*piece) for piece in pieces]
    sums = rules.RankOneSums(*(sum(column) for column in zip(*parts, strict=True)))
    steps = [rules.rank_one(*piece, sums=sums, **rates) for piece in pieces]
    whole = rules.rank_one(*block, **rates)
    torch.testing.assert_close(tuple(torch.cat(x) for x in zip(*steps, strict=True)), tuple(whole))

    block = random_state("diagonal")
    pieces = list(zip(*(x.split(sizes) for x in block), strict=True))
    mean_square = block[0].square().mean()
    steps = [rules.diagonal(*piece, mean_square=mean_square, **rates) for piece in pieces]
    whole = rules.diagonal(*block, **rates)
    torch.testing.assert_close(tuple(torch.cat(x) for x in zip(*steps, strict=True)), tuple(whole))


@pytest.mark.parametrize("gamma_max", [1.0, None])
@pytest.mark.parametrize("alpha", [0.1, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_of_zeros_learns_its_offset_alone(
    variant: str, dtype: torch.dtype, alpha: float, gamma_max: float | None
) -> None:
    """With relative_alpha the scale of the block is zero: no infinity, no nan, and G is momentum's."""
    w, g = torch.zeros(N, dtype=dtype), torch.randn(N, dtype=dtype)
    state = initial_state(variant, N, dtype)
    options = {"lr": 0.5, "alpha": alpha, "beta": 0.25, "gamma_max": gamma_max, "relative_alpha": True}
    new_w, new_state, G = rule_step(variant, w, g, state, **options)
    torch.testing.assert_close(G, 0.25 * g)
    torch.testing.assert_close(new_w, -0.125 * g)
    torch.testing.assert_close(new_state[:-1], state[:-1])


def rms_normalized(g: torch.Tensor) -> torch.Tensor:
    """As a step does it."""
    return g * rules.rms_factor(rules.sum_of_squares(g).sqrt(), g.numel()).to(g.dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e25, 3e38])
def test_rms_normalized_gradients_have_rms_one(scale: float) -> None:
    """Whatever their size, up to float32's largest."""
    direction = torch.rand(1000, dtype=torch.float64) * 2 - 1
    direction = direction / direction.abs().max()
    g = rms_normalized((direction * scale).float())
    torch.testing.assert_close(g.double(), direction / direction.square().mean().sqrt(), rtol=1e-5, atol=1e-6)


def test_rms_normalized_zeros_stay_zeros() -> None:
    """No 0/0."""
    assert torch.equal(rms_normalized(torch.zeros(5)), torch.zeros(5))


def test_beside_a_huge_element_the_others_vanish() -> None:
    """And it stays finite."""
    gradient = torch.randn(1000)
    gradient[17] = -1e30
    g = rms_normalized(gradient)
    assert g.isfinite().all()
    torch.testing.assert_close(g[17], torch.tensor(-(1000**0.5)))


def test_rank_one_relative_alpha_has_a_floor_where_v_is_orthogonal_to_the_weights() -> None:
    w, g, across = torch.randn(3, 50, dtype=torch.float64)
    v = across - (across @ w) / (w @ w) * w + 1e-9 * w  # v.w is next to nothing
    zero = torch.zeros_like(w)
    step = rules.rank_one(w, g, zero, v, zero, lr=0.1, alpha=0.3, beta=0.1, relative_alpha=True)
    torch.testing.assert_close(step.u, 0.3 / (w @ w / 50) * (v @ w) * g)
    assert step.u.norm() < 1e-6 * g.norm()
