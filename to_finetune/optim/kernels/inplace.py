"""The plain path: apply a rule to one member, and store the results in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from to_finetune.optim.blocks import New
from to_finetune.optim.sharding import Member
from to_finetune.optim.state import exponents_name, random_bits, read, write_

Rule = Callable[..., tuple[Tensor, ...]]


def moved(
    rule: Rule, member: Member, g: Tensor, names: Sequence[str], decay: float | Tensor, **hyperparameters: Any
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return a rule's new weights, new state and G, in g's dtype.

    Args:
        rule: `rules.diagonal` or `rules.rank_one`.
        member: the weights and their state, computed in g's dtype.
        g: the gradient, float32 or float64.
        names: the names of the rule's state, in its order.
        decay: the fraction of the old weights that decoupled decay subtracts, 0 for none.
        hyperparameters: the rule's keyword arguments.
    """
    w = member.p.to(g.dtype)
    new_w, *state, G = rule(w, g, *(read(member.state, name, g.dtype) for name in names), **hyperparameters)
    return new_w - decay * w, state, G


def store_(new: New, peaks: Sequence[Tensor] | None = None) -> None:
    """Store new weights and state, each in its format.

    Args:
        new: the new values and their member.
        peaks: for a piece of an int8 block: the whole block's largest absolute value, one for each state.
    """
    p, state = new.member.p, new.member.state
    few = any(x.element_size() <= 2 for x in (p, *(state[name] for name in new.names)))
    bits = member_bits(new.member, new.key) if few else None
    write_(p, new.w, bits, 0, skip=new.skip)
    for stream, (name, value) in enumerate(zip(new.names, new.values, strict=True), start=1):
        peak = None if peaks is None else peaks[stream - 1]
        write_(state[name], value, bits, stream, state.get(exponents_name(name)), new.skip, peak)


def member_bits(member: Member, key: int | Tensor) -> Tensor:
    """Return the random bits of a member's weights."""
    return random_bits(member.owner, key) if member.first is None else random_bits(member.p, key + member.first)
