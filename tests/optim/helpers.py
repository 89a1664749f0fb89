"""What the tests of the optimizers share: weights, gradients, and the comparison with the textbook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from to_finetune.optim import DiagonalTO, FullTO, RankOneTO, TrainableOptimizer, rules

from .textbook import Textbook

OPTIMIZERS: dict[str, type[TrainableOptimizer]] = {"diagonal": DiagonalTO, "rank_one": RankOneTO, "full": FullTO}
STATE_NAMES = {"diagonal": ("a", "b"), "rank_one": ("u", "v", "b"), "full": ("A", "b")}
SHAPES = [(3, 4), (5,), (), (0,), (2, 1, 3)]


def make_weights(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """Standard normal weights."""
    return [Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def copies(params: Sequence[Tensor]) -> list[Parameter]:
    """Equal weights, in memory of their own."""
    return [Parameter(p.detach().clone()) for p in params]


def random_gradients(params: Sequence[Tensor]) -> list[Any]:
    """Standard normal gradients; a test may put None in the place of some."""
    return [torch.randn_like(p) for p in params]


def step(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """One step with copies of these gradients."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


def run(optimizer: Optimizer, params: Sequence[Tensor], steps: int, seed: int = 0) -> None:
    """Steps with random gradients, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        step(optimizer, params, [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params])


def rule_step(
    variant: str, w: Tensor, g: Tensor, state: tuple[Tensor, ...], **rates: Any
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """One step of the package's rule, in the textbook's form: (w, state, G)."""
    if variant == "full":
        A, b = state
        full = rules.full(w, g, b, rules.full_dense_product(A, w), **rates)
        return full.w, (rules.full_dense_learn(A, full.correction, w), full.b), full.G
    new_w, *new_state, G = (rules.diagonal if variant == "diagonal" else rules.rank_one)(w, g, *state, **rates)
    return new_w, tuple(new_state), G


def initial_state(variant: str, n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The state before the first step of a block of n weights."""
    zero = torch.zeros(n, dtype=dtype)
    return {
        "diagonal": (zero, zero),
        "rank_one": (zero, torch.full_like(zero, n**-0.5), zero),
        "full": (torch.diag(zero), zero),
    }[variant]


def slope_matrix(state: dict[str, Any]) -> Tensor:
    """The matrix A of a block of `FullTO`, from either of its forms."""
    if "A" in state:
        return state["A"].double()
    pairs = int(state["pairs"])
    return -(state["corrections"][:pairs].double().mT @ state["weights"][:pairs].double())


def flat_state(optimizer: TrainableOptimizer, params: Sequence[Tensor], name: str) -> Tensor:
    """A state of all tensors as one vector; Full's A as one block diagonal matrix."""
    if name == "A":
        blocks = [optimizer.state[p] for p in params if {"A", "pairs"} & optimizer.state[p].keys()]
        return torch.block_diag(*(slope_matrix(block) for block in blocks))
    return torch.cat([optimizer.state[p][name].double().reshape(-1) for p in params])


def assert_equals_textbook(
    optimizer: TrainableOptimizer, params: Sequence[Tensor], book: Textbook, rtol: float = 1e-10, atol: float = 1e-11
) -> None:
    """Weights and state, to rounding."""
    torch.testing.assert_close(flat(params), book.w, rtol=rtol, atol=atol)
    for name in STATE_NAMES[book.variant]:
        torch.testing.assert_close(flat_state(optimizer, params, name), book.state[name], rtol=rtol, atol=atol)


def flat(params: Sequence[Tensor]) -> Tensor:
    """All tensors as one float64 vector."""
    return torch.cat([p.detach().double().reshape(-1) for p in params])
