"""What the constructors refuse, and how: a ValueError with the key, the value and what is allowed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from .helpers import OPTIMIZERS, copies, flat, make_weights, run

REFUSED: list[dict[str, Any]] = [
    {"lr": -0.1},
    {"lr": math.nan},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.ones(3)},
    {"alpha": math.inf},
    {"alpha": None},
    {"beta": "0.1"},
    {"gamma_max": "1"},
    {"alpha": -0.1},
    {"alpha": math.nan},
    {"beta": -0.1},
    {"beta": 1.5},
    {"beta": math.nan},
    {"beta": 2.5, "schedule": "theorem", "t0": 2.0},
    {"schedule": "cosine"},
    {"schedule": None},
    {"t0": 0.0, "schedule": "theorem"},
    {"t0": -1.0},
    {"alpha_decay": 0.0, "schedule": "exponential"},
    {"alpha_decay": 1.5, "schedule": "exponential"},
    {"alpha_decay": 0.9},
    {"lr_decay": -0.5, "schedule": "exponential"},
    {"lr_decay": 0.9, "schedule": "theorem"},
    {"gamma_max": 0.0},
    {"gamma_max": 2.0},
    {"gamma_max": math.nan},
    {"max_norm": 0.0},
    {"max_norm": -1.0},
    {"weight_decay": -0.1},
    {"grad_scale": "max"},
    {"weight_decay": 0.1, "grad_scale": "factored"},
    {"state_dtype": torch.float16},
    {"scope": "layer"},
    {"foreach": True, "fused": True},
    {"fused": "no"},
    {"maximize": "no"},
    {"relative_alpha": 0.5},
    {"skip_nonfinite": None},
]


def first_key(options: dict[str, Any]) -> str:
    """A test's name: the option that is wrong."""
    key, value = next(iter(options.items()))
    return f"{key}={value}"


@pytest.mark.parametrize("options", REFUSED, ids=first_key)
def test_an_invalid_option_is_refused_with_its_key_and_value(variant: str, options: dict[str, Any]) -> None:
    """As an option of the optimizer, and as one of a parameter group."""
    key, value = next(iter(options.items()))
    params = make_weights()
    message = re.escape(f"{key}={value!r} is not valid: ")
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[variant](params, **options)
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[variant]([{"params": params, **options}])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0, "alpha": 0.0, "beta": 0.0},
        {"beta": 1.0},
        {"beta": 2.0, "schedule": "theorem", "t0": 2.0},
        {"alpha_decay": 1.0, "lr_decay": 1.0},
        {"gamma_max": 1.99},
        {"gamma_max": None, "max_norm": None, "grad_scale": None, "state_dtype": None},
        {"state_dtype": torch.float32},
        {"foreach": False, "fused": False},
    ],
    ids=first_key,
)
def test_the_ends_of_the_ranges_are_valid(variant: str, options: dict[str, Any]) -> None:
    """They construct and step."""
    params = make_weights()
    run(OPTIMIZERS[variant](params, **options), params, 2)
    assert flat(params).isfinite().all()


@pytest.mark.parametrize(("name", "path"), [("rank_one", "foreach"), ("full", "foreach"), ("full", "fused")])
def test_a_fast_path_that_a_variant_lacks_is_refused(name: str, path: str) -> None:
    """Rather than ignored."""
    with pytest.raises(ValueError, match=f"{path}=True is not valid: {OPTIMIZERS[name].__name__} has no such path"):
        OPTIMIZERS[name](make_weights(), **{path: True})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_complex_and_integer_weights_are_refused(variant: str, dtype: torch.dtype) -> None:
    """With the dtype in the message."""
    weight = Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(ValueError, match=f"takes real floating-point weights, not {dtype}"):
        OPTIMIZERS[variant]([weight])


@pytest.mark.parametrize(
    "group",
    [
        {"beta": 2.0},
        {"schedule": "cosine"},
        {"schedule": torch.ones(3)},
        {"foreach": True, "fused": True},
        {"params": [Parameter(torch.ones(2, dtype=torch.complex64))]},
    ],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(variant: str, group: dict[str, Any]) -> None:
    """The next step is that of an optimizer which never saw it."""
    params = make_weights()
    twins, added = copies(params), make_weights([(2,)])
    optimizer, untouched = OPTIMIZERS[variant](params), OPTIMIZERS[variant](twins)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        optimizer.add_param_group({"params": added, **group})
    assert len(optimizer.param_groups) == 1
    run(optimizer, params, 3)
    run(untouched, twins, 3)
    assert torch.equal(flat(params), flat(twins))
    optimizer.add_param_group({"params": added})
