"""A step's preparation from weights, state and options, reused as long as only the gradients change.

With hundreds of small tensors the host would otherwise take longer for a step than the device.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.blocks import Part
from to_finetune.optim.factored import Matrices
from to_finetune.optim.kernels.batch import Batch, as_vector
from to_finetune.optim.sharding import Member
from to_finetune.optim.stateful import Group, options_of

NONE = torch.empty(0)  # takes the place of released gradients


@dataclass(eq=False)
class Counts:
    """The counters of a group's weights on one device: 0-dim state that `add` turns into views of one vector."""

    group: Group
    states: list[dict[str, Tensor]]
    vectors: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.states[0]["step"].device

    def add(self, name: str, amount: float | Tensor) -> None:
        if name not in self.vectors:
            for state in self.states:  # without it if `skip_nonfinite` was switched on in between
                state.setdefault(name, torch.zeros_like(state["step"]))
            self.vectors[name] = as_vector(self.states, name)
            self.views[name] = [state[name] for state in self.states]
            if self.views[name][0]._base is not self.vectors[name]:  # new, or loaded and perhaps shared
                self.views[name] = list(self.vectors[name].unbind())
                for state, view in zip(self.states, self.views[name], strict=True):
                    state[name] = view
        self.vectors[name] += amount

    def are_in_place(self) -> bool:
        return all(_are([state[name] for state in self.states], views) for name, views in self.views.items())


class Prepared:
    """A step's groups and their members, batched for measuring and updating.

    Attributes:
        work: the groups and all their members.
        parts: the members, grouped by the path that updates them.
        matrices: the matrices whose gradients are first scaled by rows and columns.
        counts: the step counters.
        sharers: the sets of processes that share weights, in order of first appearance.
        repeats: whether a later step may reuse it: only if fused kernels update all weights and none is sharded.
    """

    def __init__(
        self,
        work: Sequence[tuple[Group, list[Member]]],
        parts: Sequence[Part],
        matrices: Sequence[Matrices],
        states: Mapping[Tensor, dict[str, Tensor]],
        options: Collection[str],
    ) -> None:
        self.work, self.parts, self.matrices = work, parts, matrices
        self._members = [member for _, members in work for member in members]
        self._batches = [part for part in parts if isinstance(part, Batch)]
        self._names = options
        self._options = [options_of(group, options) for group, _ in work]
        self._states, self._dtypes = list(states.values()), [member.grad.dtype for member in self._members]
        self.counts = list(_counts(work, states))
        self.sharers = list(dict.fromkeys(member.shards for member in self._members))
        self.repeats = (
            sum(member.p.numel() > 0 for member in self._members) == sum(len(batch.members) for batch in self._batches)
            and all(member.p is member.owner and not member.shards for member in self._members)
            and all(known.fused for known in matrices)
        )

    def take_gradients(self, groups: Sequence[Group], states: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Take over the weights' new gradients, and return True; False if more than gradients and lr has changed."""
        gradients = self._new_gradients(groups, states)
        if gradients is None:
            return False
        for member, grad in zip(self._members, gradients, strict=True):
            member.grad = grad
        for matrices in self.matrices:
            matrices.take_gradients()
        for batch in self._batches:
            if batch.taken is None:
                alike = [counts for counts in self.counts if _are(counts.states, batch.states)]
                batch.taken = alike[0].vectors["step"] if alike else None
        return True

    def _new_gradients(
        self, groups: Sequence[Group], states: Mapping[Tensor, dict[str, Tensor]]
    ) -> list[Tensor] | None:
        """Return the members' new gradients; None if they have other formats, or if something else has changed."""
        if len(groups) != len(self.work) or not _are(states.values(), self._states):
            return None
        gradients = list[Tensor]()
        for group, (known, members), options in zip(groups, self.work, self._options, strict=True):
            if group is not known or options_of(group, self._names) != options:
                return None
            ready = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
            if not _are([p for p, _ in ready], [member.owner for member in members]):
                return None
            gradients += (grad for _, grad in ready)
        is_alike = (
            list(map(attrgetter("dtype"), gradients)) == self._dtypes
            and set(map(attrgetter("layout"), gradients)) <= {torch.strided}
            and all(map(Tensor.is_contiguous, gradients))
            and not any(map(Tensor.is_neg, gradients))
            and all(batch.is_in_place() for batch in self._batches)
            and all(counts.are_in_place() for counts in self.counts)
        )
        return gradients if is_alike else None

    def let_go(self) -> None:
        """Release the gradients, which would otherwise stay alive."""
        for member in self._members:
            member.grad = NONE
        for batch in self._batches:
            batch.grads = []
        for matrices in self.matrices:
            for piece in matrices.pieces:
                piece.grad = NONE


def _are(found: Collection[Any], known: Collection[Any]) -> bool:
    """Whether both hold the same objects."""
    return len(found) == len(known) and all(map(operator.is_, found, known))


def _counts(work: Sequence[tuple[Group, list[Member]]], states: Mapping[Tensor, dict[str, Tensor]]) -> Iterable[Counts]:
    for group, members in work:
        alike: dict[torch.device, list[dict[str, Tensor]]] = {}
        for owner in dict.fromkeys(member.owner for member in members):
            state = states[owner]
            alike.setdefault(state["step"].device, []).append(state)
        yield from (Counts(group, of_device) for of_device in alike.values())
