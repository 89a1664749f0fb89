"""The fast paths equal the plain loop, states included, and so does any mix of their tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import Parameter

from .helpers import OPTIMIZERS, copies, make_weights, random_gradients, step

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # raised inside torch

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no guard": {"alpha": 0.02, "gamma_max": None},
    "relative alpha": {"relative_alpha": True, "alpha": 0.5},
    "relative alpha, no guard": {"relative_alpha": True, "alpha": 0.05, "gamma_max": None},
    "one block": {"scope": "group", "relative_alpha": True, "alpha": 0.5},
    "a guard below beta": {"beta": 0.5, "gamma_max": 0.3},
    "no slope": {"alpha": 0.0},
    "theorem": {"schedule": "theorem", "t0": 2.0, "beta": 1.5},
    "coupled decay, rms": {"weight_decay": 0.2, "grad_scale": "rms", "maximize": True},
    "decoupled decay": {"weight_decay": 0.2, "decoupled_weight_decay": True, "max_norm": 3.0},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
}


def odd_weights(dtype: torch.dtype) -> list[Parameter]:
    """Of every shape: a matrix, a vector, one element, 0-dim, empty, strided, all zero."""
    params = make_weights([(3, 4), (5,), (1, 1), (), (0,), (6, 4), (2, 3)], dtype)
    params[5] = Parameter(params[5].detach().t()[:, ::2])
    params[6].data.zero_()
    assert not params[5].is_contiguous()
    return params


EXACT = {"rtol": 1e-10, "atol": 1e-12}
ONE_ROUNDING = {"rtol": 2**-7, "atol": 1e-4}  # of bfloat16: a last bit may go either way as it is stored
ROUNDING = {torch.float64: EXACT, torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: ONE_ROUNDING}


def assert_same_trajectory(
    name: str, path: str, params: list[Parameter], options: dict[str, Any], tolerance: dict[str, float] | None = None
) -> None:
    """Weights and every state after each step with random, missing and zero gradients, to the weight's rounding."""
    twins = copies(params)
    fast = OPTIMIZERS[name](params, **{path: True}, **options)
    loop = OPTIMIZERS[name](twins, foreach=False, fused=False, **options)
    for t in range(6):
        grads = random_gradients(params)
        grads[t % len(grads)] = None
        if t < len(grads) - 1:
            grads[t + 1] = torch.zeros_like(params[t + 1])
        step(fast, params, grads)
        step(loop, twins, grads)
        for p, q in zip(params, twins, strict=True):
            bounds = tolerance or ROUNDING[p.dtype]
            torch.testing.assert_close(p, q, **bounds)
            assert fast.state[p].keys() == loop.state[q].keys()
            torch.testing.assert_close(dict(fast.state[p]), dict(loop.state[q]), **bounds)
        torch.testing.assert_close(fast.estimate_error(), loop.estimate_error(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_foreach_equals_the_loop(name: str) -> None:
    """In float64."""
    tolerance = ONE_ROUNDING if name == "bfloat16 state" else None
    assert_same_trajectory("diagonal", "foreach", odd_weights(torch.float64), OPTIONS[name], tolerance)


def test_foreach_takes_weights_of_several_dtypes_and_counts() -> None:
    """Each is computed in its own dtype and at the rates of its own step, to the rounding of that dtype."""
    params = [*odd_weights(torch.bfloat16), *odd_weights(torch.float32), *odd_weights(torch.float64)]
    assert_same_trajectory("diagonal", "foreach", params, OPTIONS["theorem"])


def test_foreach_is_momentum_bit_for_bit_without_slope() -> None:
    """As the loop is."""
    bits = {"rtol": 0.0, "atol": 0.0}
    assert_same_trajectory("diagonal", "foreach", odd_weights(torch.float32), {"alpha": 0.0}, bits)


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Says how many graphs torch has compiled since the start of the test."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_fused_equals_the_loop_with_one_graph_for_all_shapes_and_rates(variant: str, graphs: Callable[[], int]) -> None:
    """In float64; neither a shape, nor a step of a schedule, nor a new rate compiles anything again."""
    for name in ("defaults", "theorem", "decoupled decay", "tensor lr", "no slope"):
        assert_same_trajectory(variant, "fused", odd_weights(torch.float64), OPTIONS[name])
        assert graphs() == 1


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
@pytest.mark.parametrize("name", ["relative alpha, no guard", "one block"])
def test_fused_equals_the_loop_with_options(variant: str, name: str, graphs: Callable[[], int]) -> None:
    """In float64, those that make a graph of their own."""
    assert_same_trajectory(variant, "fused", odd_weights(torch.float64), OPTIONS[name])
    assert graphs() == 1


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_fused_takes_low_precision_weights_and_state(variant: str, graphs: Callable[[], int]) -> None:
    """bfloat16 weights with float32 state, and float32 weights with bfloat16 state."""
    assert_same_trajectory(variant, "fused", odd_weights(torch.bfloat16), {})
    options = {"state_dtype": torch.bfloat16}
    assert_same_trajectory(variant, "fused", odd_weights(torch.float32), options, ONE_ROUNDING)
    assert graphs() == 2
