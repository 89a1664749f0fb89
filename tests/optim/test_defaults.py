"""torch's default dtype and device, which belong to the user's own tensors, change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from to_finetune.optim import FullTO, RankOneTO, TrainableOptimizer, release_gradients
from to_finetune.optim.slopes import slopes

from ..helpers import assert_same_bits
from .helpers import OPTIMIZERS

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"fused": False, "relative_alpha": True, "grad_scale": "rms"},
    "plain, theorem": {"fused": False, "schedule": "theorem", "max_norm": 3.0},
    "fused": {"fused": True, "relative_alpha": True, "grad_scale": "rms"},
    "fused, guarded": {"fused": True, "skip_nonfinite": True, "schedule": "exponential", "lr_decay": 0.9},
    "fused, for graphs": {"fused": True, "capturable": True, "grad_scale": "factored"},
    "fused, int8": {"fused": True, "state_dtype": "int8"},
    "plain, int8": {"fused": False, "state_dtype": "int8", "scope": "group"},
    "foreach": {"foreach": True},
}


@contextmanager
def default(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def run(kind: type[TrainableOptimizer], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Five steps, a save and a load; everything that can be read of them."""
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    params = [Parameter(noise(shape)) for shape in ((6, 40), (33,), ())]
    optimizer = kind(params, lr=0.05, **options)
    for _ in range(5):
        for p in params:
            p.grad = noise(tuple(p.shape))
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    read = {"error": optimizer.estimate_error(), "peak": optimizer.gradient_peak(), "skips": optimizer.skipped_steps()}
    state = {f"{i} {name}": x for i, p in enumerate(params) for name, x in optimizer.state[p].items()}
    found = {} if isinstance(optimizer, FullTO) else slopes(optimizer)
    read |= {f"slope {k}": torch.tensor(s[:2], dtype=torch.float64, device="cpu") for k, s in found.items()}
    weights = {str(i): p.detach() for i, p in enumerate(params)}
    return {name: x.nan_to_num(-1) for name, x in {**read, **state, **weights}.items()}


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.bfloat16, None), (None, "meta")], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", OPTIMIZERS)
def test_the_same_bits_whatever_the_defaults(
    variant: str, options: str, dtype: torch.dtype | None, device: str | None
) -> None:
    kind, asked = OPTIMIZERS[variant], OPTIONS[options]
    if not {path for path in ("foreach", "fused") if asked.get(path)} <= set(kind.fast_paths):
        pytest.skip(f"{variant} has no such path")
    if variant == "full" and (asked.get("capturable") or asked.get("state_dtype") == "int8"):
        pytest.skip("FullTO's memory grows, and it has no int8 state")
    for weights in (torch.float32, torch.bfloat16):
        expected = run(kind, asked, weights)
        with default(dtype, device):
            found = run(kind, asked, weights)
        assert_same_bits(found, expected)


def test_counts_beyond_what_bfloat16_holds() -> None:
    with default(torch.bfloat16, None):
        p = Parameter(torch.ones(3, dtype=torch.float32))
        optimizer = RankOneTO([p], lr=0.0)
        optimizer.state[p] = {}
        p.grad = torch.ones_like(p)
        for _ in range(300):
            optimizer.step()
    assert optimizer.state[p]["step"] == 300


def test_released_gradients() -> None:
    with default(torch.float64, None):
        p = Parameter(torch.ones(3, dtype=torch.float32))
        optimizer = RankOneTO([p], lr=0.1, fused=True)
        with release_gradients(torch.nn.ParameterList([p]), optimizer):
            (p * p).sum().backward()
    assert p.grad is None
    assert bool(p.isfinite().all())
    assert bool((p < 1).all())
