"""The optimizers equal the textbook over many steps, with every option, alone and in parameter groups."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from .helpers import OPTIMIZERS, assert_equals_textbook, copies, flat, flat_state, make_weights, random_gradients, step
from .textbook import Textbook

STEPS = 10
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rates": {"lr": 0.03, "alpha": 0.5, "beta": 0.4},
    "no guard": {"alpha": 0.02, "gamma_max": None},
    "another guard": {"alpha": 2.0, "gamma_max": 1.5},
    "a guard below beta": {"beta": 0.5, "gamma_max": 0.3},
    "relative alpha": {"relative_alpha": True, "alpha": 0.3},
    "relative alpha, no guard": {"relative_alpha": True, "alpha": 0.05, "gamma_max": None},
    "rms": {"grad_scale": "rms"},
    "rms and relative alpha": {"grad_scale": "rms", "relative_alpha": True, "alpha": 0.3, "lr": 0.01},
    "factored": {"grad_scale": "factored", "relative_alpha": True, "alpha": 0.3, "lr": 0.01},
    "factored, all else": {
        **{"grad_scale": "factored", "scope": "group", "maximize": True},
        **{"weight_decay": 0.3, "decoupled_weight_decay": True},
    },
    "coupled decay": {"weight_decay": 0.3},
    "coupled decay, rms": {"weight_decay": 0.3, "grad_scale": "rms"},
    "decoupled decay": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "maximize, coupled decay": {"maximize": True, "weight_decay": 0.3},
    "maximize, decoupled decay": {"maximize": True, "weight_decay": 0.3, "decoupled_weight_decay": True},
    "projection": {"max_norm": 2.0},
    "wide projection": {"max_norm": 1e3},
    "exponential": {"schedule": "exponential", "alpha_decay": 0.8, "lr_decay": 0.9},
    "theorem": {"schedule": "theorem", "t0": 3.0, "beta": 2.0},
    "theorem, decoupled decay": {"schedule": "theorem", "weight_decay": 0.3, "decoupled_weight_decay": True},
    "one block": {"scope": "group"},
    "one block, relative alpha": {"scope": "group", "relative_alpha": True, "alpha": 0.3},
    "one block, rms and all decays": {"scope": "group", "grad_scale": "rms", "weight_decay": 0.1, "max_norm": 3.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_textbook(variant: str, name: str) -> None:
    """Weights and state, in float64 to rounding after every step."""
    params = make_weights()
    optimizer = OPTIMIZERS[variant](params, **OPTIONS[name])
    book = Textbook(variant, params, **OPTIONS[name])
    for _ in range(STEPS):
        grads = random_gradients(params)
        step(optimizer, params, grads)
        book.step(grads)
        assert_equals_textbook(optimizer, params, book)
        assert optimizer.estimate_error().item() == pytest.approx(book.error, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "relative_alpha": True}, {"max_norm": 1.0}])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_low_precision_weights_round_once(
    variant: str, dtype: torch.dtype, rounding: float, options: dict[str, Any]
) -> None:
    """A step from float32 or bfloat16 weights: computed in float32, each rounded, up or down, as it is stored."""
    params = make_weights([(30, 40), (50,)], dtype)
    optimizer = OPTIMIZERS[variant](params, lr=0.5, beta=0.3, **options)
    book = Textbook(variant, params, lr=0.5, beta=0.3, **options)
    grads = random_gradients(params)
    step(optimizer, params, grads)
    book.step(grads)
    assert {optimizer.state[p]["b"].dtype for p in params} == {torch.float32}
    torch.testing.assert_close(flat_state(optimizer, params, "b"), book.state["b"], rtol=1e-5, atol=1e-6)
    twice = 2 if "max_norm" in options else 1  # the projection reads stored weights and stores them again
    torch.testing.assert_close(flat(params), book.w, rtol=twice * rounding, atol=1e-5)


def test_the_projection_of_bfloat16_weights_is_computed_in_float32(variant: str) -> None:
    """The norm is right to much less than bfloat16's rounding of the factor."""
    params = make_weights([(100, 100)], torch.bfloat16)
    radius = 0.99 * flat(params).norm().item()
    optimizer = OPTIMIZERS[variant](params, lr=1e-9, alpha=0.0, max_norm=radius)
    step(optimizer, params, [torch.zeros_like(p) for p in params])
    assert flat(params).norm().item() == pytest.approx(radius, rel=3e-4)


def test_groups_keep_their_own_hyperparameters(variant: str) -> None:
    """Each parameter group is a textbook optimizer of its own."""
    groups = [make_weights(), make_weights([(2, 2), (3,)]), make_weights([(4,)])]
    options: list[dict[str, Any]] = [
        {},
        {"lr": 0.5, "alpha": 0.2, "beta": 0.9, "schedule": "theorem", "scope": "group", "max_norm": 1.5},
        {"maximize": True, "weight_decay": 0.2, "grad_scale": "rms", "relative_alpha": True, "gamma_max": None},
    ]
    settings = [{"params": params, **opts} for params, opts in zip(groups, options, strict=True)]
    optimizer = OPTIMIZERS[variant](settings, alpha=0.03)
    books = [Textbook(variant, params, **{"alpha": 0.03, **o}) for params, o in zip(groups, options, strict=True)]
    for _ in range(STEPS):
        grads = [random_gradients(params) for params in groups]
        step(optimizer, list(chain(*groups)), list(chain(*grads)))
        for book, gs in zip(books, grads, strict=True):
            book.step(gs)
    for params, book in zip(groups, books, strict=True):
        assert_equals_textbook(optimizer, params, book)


@pytest.mark.parametrize("schedule", ["constant", "theorem", "exponential"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_torch_scheduler_multiplies_with_the_schedule(variant: str, tensor_lr: bool, schedule: str) -> None:
    """StepLR halving lr at each step, for lr as a float and as a tensor."""
    params = make_weights()
    lr: float | Tensor = torch.tensor(0.3, dtype=torch.float64) if tensor_lr else 0.3
    optimizer = OPTIMIZERS[variant](params, lr=lr, schedule=schedule)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    book = Textbook(variant, params, lr=0.3, schedule=schedule)
    for _ in range(STEPS):
        grads = random_gradients(params)
        step(optimizer, params, grads)
        book.step(grads)
        scheduler.step()
        book.options.lr *= 0.5
    assert_equals_textbook(optimizer, params, book)


def test_a_group_added_later_starts_with_its_own_schedule(variant: str) -> None:
    """Its first step is step 0, with a fresh state; it takes the optimizer's defaults."""
    first, second = make_weights(), make_weights([(3, 2)])
    options: dict[str, Any] = {"schedule": "theorem", "alpha": 0.3, "beta": 0.7}
    optimizer = OPTIMIZERS[variant](first, **options)
    books = [Textbook(variant, params, **options) for params in (first, second)]
    for t in range(STEPS):
        if t == STEPS // 2:
            optimizer.add_param_group({"params": second})
        grads = [random_gradients(first), random_gradients(second)]
        step(optimizer, first + second, list(chain(*grads)))
        books[0].step(grads[0])
        if t >= STEPS // 2:
            books[1].step(grads[1])
    assert_equals_textbook(optimizer, first, books[0])
    assert_equals_textbook(optimizer, second, books[1])


def test_named_parameters_are_parameters(variant: str) -> None:
    """(name, tensor) pairs, as model.named_parameters() gives them; the names reach the state dict."""
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    params = list(model.parameters())
    optimizer, book = OPTIMIZERS[variant](model.named_parameters()), Textbook(variant, params)
    grads = random_gradients(params)
    step(optimizer, params, grads)
    book.step(grads)
    assert_equals_textbook(optimizer, params, book)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_estimate_error_is_nan_where_there_is_none(variant: str) -> None:
    """Before the first step, and for gradients of zeros."""
    params = make_weights()
    optimizer = OPTIMIZERS[variant](params)
    assert optimizer.estimate_error().isnan()
    step(optimizer, params, [torch.zeros_like(p) for p in params])
    assert optimizer.estimate_error().isnan()


def test_gradient_peak_is_the_largest_share_of_any_tensor(variant: str) -> None:
    """max |g| / ||g||, of the gradients of the last step and only with grad_scale."""
    params = make_weights([(4, 5), (30,)])
    plain, scaled = OPTIMIZERS[variant](params), OPTIMIZERS[variant](params, grad_scale="rms")
    assert scaled.gradient_peak().isnan()
    for _ in range(3):
        grads = random_gradients(params)
        step(scaled, params, grads)
        expected = max((g.abs().max() / g.norm()).item() for g in grads)
        assert scaled.gradient_peak().item() == pytest.approx(expected)
    step(plain, params, grads)
    assert plain.gradient_peak().isnan()


def test_one_huge_element_is_reported_and_harmless(variant: str) -> None:
    """With grad_scale="rms" in float32: finite weights and state, and a gradient_peak of 1."""
    params = make_weights([(20, 5)], torch.float32)
    optimizer = OPTIMIZERS[variant](params, grad_scale="rms")
    grads = random_gradients(params)
    grads[0][3, 2] = 1e30
    step(optimizer, params, grads)
    assert optimizer.gradient_peak().item() == pytest.approx(1.0)
    assert params[0].isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[params[0]].values())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_factored_gradients_have_rows_and_columns_that_weigh_alike(variant: str, scale: float) -> None:
    """Of a gradient whose rows and columns differ by five orders of magnitude nothing but the signs is left."""
    params = make_weights([(30, 4, 5)], torch.float32)
    optimizer = OPTIMIZERS[variant](params, grad_scale="factored", alpha=0.0, beta=1.0, lr=1.0)
    rows, columns = torch.logspace(-2, 2, 30)[:, None, None], torch.logspace(-1, 1, 20).view(1, 4, 5)
    signs = torch.randn(30, 4, 5).sign()
    before = params[0].detach().clone()
    step(optimizer, params, [scale * signs * rows * columns])
    torch.testing.assert_close(before - params[0], signs, rtol=1e-5, atol=1e-5)


def test_factored_gradients_of_empty_matrices_are_no_obstacle(variant: str) -> None:
    """Also beside others, whose sums lie behind theirs."""
    params = make_weights([(0, 3), (3, 0), (4, 5), (0, 2)])
    alone, before = copies(params[2:3]), params[2].detach().clone()
    grads = random_gradients(params)
    step(OPTIMIZERS[variant](params, grad_scale="factored"), params, grads)
    step(OPTIMIZERS[variant](alone, grad_scale="factored"), alone, grads[2:3])
    assert torch.equal(params[2], alone[0])
    assert params[2].isfinite().all()
    assert not torch.equal(params[2], before)


def test_factored_gradients_leave_what_is_next_to_nothing(variant: str) -> None:
    """A row of zeros stays one, and one of rounding errors is not blown up to the size of the others."""
    params = make_weights([(6, 50)], torch.float32)
    optimizer = OPTIMIZERS[variant](params, grad_scale="factored", alpha=0.0, beta=1.0, lr=1.0)
    g, before = torch.randn(6, 50), params[0].detach().clone()
    g[1], g[2] = 0.0, 1e-9 * g[2]
    step(optimizer, params, [g])
    moved = (before - params[0]).square().mean(1).sqrt()
    assert moved[1] == 0
    assert moved[2] < 1e-4
    assert (moved[[0, 3, 4, 5]] > 0.9).all()


def test_a_zero_initialised_lora_pair_trains(variant: str) -> None:
    """B = 0: relative alpha has no scale to take, so B's first step is momentum's; then all follow the textbook."""
    options: dict[str, Any] = {"lr": 0.01, "alpha": 0.3, "relative_alpha": True, "grad_scale": "rms"}
    A, B = make_weights([(2, 6), (4, 2)])
    with torch.no_grad():
        B.zero_()
    x, y = torch.randn(6, 10, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    optimizer = OPTIMIZERS[variant]([A, B], **options)
    book = Textbook(variant, [A, B], **options)
    for t in range(STEPS):
        optimizer.zero_grad()
        (B @ A @ x - y).square().mean().backward()
        grads = [A.grad.clone(), B.grad.clone()]
        optimizer.step()
        book.step(grads)
        if t == 0:
            assert not grads[0].any()
            torch.testing.assert_close(B.detach(), -0.01 * 0.1 * grads[1] / grads[1].square().mean().sqrt())
        assert_equals_textbook(optimizer, [A, B], book, rtol=1e-8)
