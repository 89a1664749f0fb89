"""The plain path: a rule applied to one tensor, and its results stored over the old ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from to_finetune.optim.rules import sum_of_squares
from to_finetune.optim.state import exponents_name, random_bits, read, write_

Rule = Callable[..., tuple[Tensor, ...]]
Squares = tuple[Tensor, Tensor]


def apply_(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    names: Sequence[str],
    *,
    decay: float | Tensor,
    key: int | Tensor,
    skip: Tensor | None,
    **hyperparameters: Any,
) -> Squares:
    """Write a rule's new weights and state over the old ones; returns ``||G - g||^2`` and ``||g||^2``.

    Args:
        rule: `rules.diagonal` or `rules.rank_one`.
        p: the weights; with their state, computed in g's dtype and stored in their own.
        g: the gradient, float32 or float64.
        state, names: the state, and the names of the rule's tensors in its order.
        decay: the decoupled decay's share of the old weights that is taken away, 0 for none.
        key: of the random bits for storage in fewer bits (`state.state_key`).
        skip: 0-dim bool; where it is true nothing changes.
        hyperparameters: the rule's keyword arguments.
    """
    w = p.to(g.dtype)
    new_w, *new_state, G = rule(w, g, *(read(state, name, g.dtype) for name in names), **hyperparameters)
    store_(p, new_w - decay * w, state, names, new_state, key, skip)
    return sum_of_squares(G - g), sum_of_squares(g)


def store_(
    p: Tensor,
    w: Tensor,
    state: dict[str, Tensor],
    names: Sequence[str],
    values: Sequence[Tensor],
    key: int | Tensor,
    skip: Tensor | None = None,
) -> None:
    """Store new weights and state, each in its format."""
    few = any(x.element_size() <= 2 for x in (p, *(state[name] for name in names)))
    bits = random_bits(p, key) if few else None
    write_(p, w, bits, 0, skip=skip)
    for stream, (name, value) in enumerate(zip(names, values, strict=True), start=1):
        write_(state[name], value, bits, stream, state.get(exponents_name(name)), skip)
