"""A step that uses again what the last one found out ends where one does that looks at everything anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from to_finetune.optim import TrainableOptimizer
from to_finetune.optim.prepared import Prepared

from .helpers import OPTIMIZERS
from .test_fast_paths import needs_compiler

pytestmark = needs_compiler

SHAPES = [(40, 33), (5,), (64, 96), (), (0, 3)]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "recommended": {"alpha": 0.3, "relative_alpha": True, "grad_scale": "factored"},
    "int8": {"relative_alpha": True, "grad_scale": "rms", "state_dtype": torch.int8},
    "skip": {"skip_nonfinite": True},
}


def set_first(name: str, value: Any) -> Callable[[TrainableOptimizer], None]:
    def change(optimizer: TrainableOptimizer) -> None:
        optimizer.param_groups[0][name] = value

    return change


def move_weights(optimizer: TrainableOptimizer) -> None:
    p = optimizer.param_groups[0]["params"][2]
    p.data = p.data.clone() * 2


def transpose_weights(optimizer: TrainableOptimizer) -> None:
    """In place: at the same address, in another order."""
    p = optimizer.param_groups[0]["params"][2]
    p.data = p.data.view(96, 64).t()


def drop_rows(optimizer: TrainableOptimizer) -> None:
    """In place: at the same address, fewer."""
    p = optimizer.param_groups[0]["params"][2]
    p.grad, p.data = None, p.data[:60]
    p.grad = torch.ones_like(p)
    state = optimizer.state[p]
    for name in ("a", "b", "u", "v"):
        if name in state:
            state[name] = state[name][:60]


def move_state(optimizer: TrainableOptimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["b"] = state["b"].clone().zero_()


def count_anew(optimizer: TrainableOptimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] = torch.tensor(7.0)


def forget_one(optimizer: TrainableOptimizer) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def load(optimizer: TrainableOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def add_group(optimizer: TrainableOptimizer) -> None:
    optimizer.add_param_group({"params": [Parameter(torch.ones(7))], "lr": 0.02})


CHANGES: dict[str, Callable[[TrainableOptimizer], None]] = {
    "weights elsewhere": move_weights,
    "weights transposed": transpose_weights,
    "fewer weights": drop_rows,
    "state elsewhere": move_state,
    "another count": count_anew,
    "state of one lost": forget_one,
    "state loaded": load,
    "another group": add_group,
    "another option": set_first("weight_decay", 0.1),
    "another scale": set_first("grad_scale", "rms"),
    "no kernels": set_first("fused", False),
}


def gradients(optimizer: TrainableOptimizer, t: int) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i)).to(p.dtype)


def new(variant: str, options: dict[str, Any]) -> TrainableOptimizer:
    generator = torch.Generator().manual_seed(1)
    return OPTIMIZERS[variant]([Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES], **options)


def numbers(optimizer: TrainableOptimizer) -> list[Tensor]:
    """Weights and state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def assert_ends_alike(variant: str, options: dict[str, Any], before_fourth_step: Callable[[Any], None]) -> None:
    """Six steps, beside an optimizer that remembers nothing of them."""
    remembering, forgetting = new(variant, options), new(variant, options)
    for t in range(6):
        for optimizer in (remembering, forgetting):
            gradients(optimizer, t)
            if t == 3:
                before_fourth_step(optimizer)
        forgetting.forget_last_step()
        remembering.step()
        forgetting.step()
        for ours, theirs in zip(numbers(remembering), numbers(forgetting), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_whatever_changes_between_steps_is_seen(variant: str, options: str, change: str) -> None:
    if change == "fewer weights" and options in ("recommended", "int8"):
        pytest.skip("its rows, or its blocks, are counted by the shape that the optimizer was given")
    assert_ends_alike(variant, OPTIONS[options], CHANGES[change])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_whatever_changes_of_the_gradients_is_seen(variant: str, options: str) -> None:
    """One is missing, one lies in another order, one is sparse in its strides."""

    def missing(optimizer: TrainableOptimizer) -> None:
        optimizer.param_groups[0]["params"][1].grad = None

    def transposed(optimizer: TrainableOptimizer) -> None:
        p = optimizer.param_groups[0]["params"][2]
        p.grad = p.grad.t().contiguous().t()

    def strided(optimizer: TrainableOptimizer) -> None:
        p = optimizer.param_groups[0]["params"][0]
        p.grad = p.grad.repeat_interleave(2, dim=1)[:, ::2]

    for change in (missing, transposed, strided):
        assert_ends_alike(variant, OPTIONS[options], change)


def test_a_gradient_in_another_order_is_scaled_too() -> None:
    """Where the kernels take a copy of it, they take it afterwards."""
    ours, plain = (new("diagonal", OPTIONS["recommended"] | {"fused": fused}) for fused in (None, False))
    for t in range(3):
        for optimizer in (ours, plain):
            gradients(optimizer, t)
            p = optimizer.param_groups[0]["params"][2]
            p.grad = (p.grad * torch.arange(1.0, 97.0)).t().contiguous().t()
            optimizer.step()
    for one, other in zip(numbers(ours), numbers(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="a torch whose gradients have their weights' dtype")
def test_another_dtype_of_a_gradient_is_seen() -> None:
    def in_bfloat16(optimizer: TrainableOptimizer) -> None:
        p = optimizer.param_groups[0]["params"][2]
        p.grad, p.grad_dtype = None, None  # any
        p.grad = torch.ones(p.shape, dtype=torch.bfloat16)

    assert_ends_alike("diagonal", {}, in_bfloat16)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_like_the_last_one_looks_at_nothing_anew(options: str) -> None:
    """Also when lr has changed, which it does in every step."""
    optimizer = new("diagonal", OPTIONS[options])
    with mock.patch.object(optimizer, "_prepare", wraps=optimizer._prepare) as prepare:
        for t in range(4):
            gradients(optimizer, t)
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            optimizer.step()
    assert prepare.call_count == 1


def test_a_tensor_that_the_kernels_do_not_take_is_looked_at_anew() -> None:
    optimizer = new("diagonal", {})
    p = Parameter(torch.randn(4, 6).t())
    optimizer.add_param_group({"params": [p]})
    for t in range(3):
        gradients(optimizer, t)
        optimizer.step()
    assert optimizer._prepared is None


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_do_not_outlive_their_step(options: str) -> None:
    optimizer = new("diagonal", OPTIONS[options])
    for t in range(3):
        gradients(optimizer, t)
        living = [weakref.ref(p.grad.untyped_storage()) for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        assert isinstance(optimizer._prepared, Prepared)
        optimizer.zero_grad()
        assert not any(storage() for storage in living)
