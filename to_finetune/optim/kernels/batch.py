"""Data of the fused kernels: the tensors of a step as rows of arrays.

The kernels of a step work on three arrays with one row per tensor: `table` (addresses, sizes, keys; int64), `scalars`
(float32) and the sums that they return (float64). The constants below are their columns. The kernels of factored
gradients have a table of `Piece`s.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from to_finetune.optim.blocks import Part, is_group_wide, to_device
from to_finetune.optim.sharding import Member, local
from to_finetune.optim.state import exponents_name, state_key

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
VARIANTS = {"diagonal": 0, "rank_one": 1}
STATES = 3  # columns of the table for state; Diagonal needs fewer
GRADIENT, NUMEL, FIRST, KEY, COLUMNS = 1, 8, 9, 10, 11
LR, DECAY, WEIGHT_DECAY, FACTOR, BETA, KEEP, OWN, SCALARS = 0, 1, 2, 3, 4, 5, 6, 10


class Formats(NamedTuple):
    """The kernels' codes for the variant and for the formats of weights, gradients and state, in their order."""

    variant: int
    weight: int
    gradient: int
    state: int


@dataclass
class Batch(Part):
    """Members of one group, one device and one set of formats, stepped by one launch.

    Attributes:
        names: the names of the state.
        places: the addresses of weights, state and exponents.
        grads: the members' gradients, contiguous.
        aligned: whether all addresses are multiples of 16.
        state_versions: autograd's version counters of the state whose sums are carried; a step does not change them.
        table: (members, 11) int64 on the kernels' device.
        held: the last step's sums over weights and state, if still valid, (members, 8) float64.
        taken: the members' step counts, if known to be one tensor.
    """

    kernels: ModuleType = field(kw_only=True)
    formats: Formats = field(kw_only=True)
    names: Sequence[str] = field(kw_only=True)
    grads: list[Tensor] = field(init=False)
    aligned: bool = field(init=False)
    state_versions: list[int] = field(init=False)
    table: Tensor = field(init=False)
    held: Tensor | None = None
    taken: Tensor | None = None

    def __post_init__(self) -> None:
        for p, state in zip(self.params, self.states, strict=True):
            for name in self.names:
                if state[name].numel() != p.numel():
                    raise RuntimeError(
                        f"A weight has the shape {tuple(p.shape)}, its state {name!r} {tuple(state[name].shape)}: it "
                        "was given another shape after its first step. Give the optimizer the new one."
                    )
        self.places = self._find()
        self._alignment = reduce(operator.or_, chain.from_iterable(self.places[: 1 + len(self.names)]))
        unused = [0] * len(self.members)
        weights, *others = self.places
        states, exponents = others[: len(self.names)], others[len(self.names) :]
        columns = [
            weights,
            unused,
            *(*states, *[unused] * STATES)[:STATES],
            *(*exponents, *[unused] * STATES)[:STATES],
            self.numbers,
            [member.first or 0 for member in self.members],
            unused,
        ]
        self._rows = torch.tensor(columns, device="cpu").t().contiguous()

    def take_gradients(self) -> None:
        """Look up the addresses of the members' gradients, and drop all sums over earlier ones."""
        self.grads = [member.grad.contiguous() for member in self.members]
        addresses = list(map(Tensor.data_ptr, self.grads))
        self._rows[:, GRADIENT] = torch.tensor(addresses, device="cpu")
        if self.rounds and may_read(self.group, self.steps):
            counts = set(self.steps.tolist())
            count = int(counts.pop()) if len(counts) == 1 else self.steps.long()  # faster with a single number
            self._rows[:, KEY] = state_key(self.group["seed"], count, self._positions)
        self.aligned = reduce(operator.or_, addresses, self._alignment) % 16 == 0
        self.table = to_device(self._rows, self.device)
        self.sums = self.totals = self.held = None
        self.state_versions = [x._version for x in self._summed_state]

    def is_in_place(self) -> bool:
        """Whether weights and state are still at the addresses that they had when this was made."""
        same = self._find() == self.places and tuple(map(Tensor.numel, self.params)) == self.numbers
        return same and all(map(Tensor.is_contiguous, self.params))

    def _find(self) -> list[list[int]]:
        """Return the addresses of weights, state and exponents."""
        is_int8 = self.formats.state == FORMATS[torch.int8]
        names = [*self.names, *map(exponents_name, self.names if is_int8 else ())]
        tensors = [self.params, *([state[x] for state in self.states] for x in names)]
        return [list(map(Tensor.data_ptr, some)) for some in tensors]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def steps(self) -> Tensor:
        """The number of steps that each member has taken, (members,)."""
        return as_vector(self.states, "step") if self.taken is None else self.taken

    @property
    def rounds(self) -> bool:
        """Whether weights or state are stored in fewer bits than they are computed in."""
        return {self.formats.weight, self.formats.state} != {FORMATS[torch.float32]}

    def set_keys(self, steps: Tensor) -> None:
        """Set the random bits' keys from step counts on the device; the table already has those of host counts."""
        self.table[:, KEY] = state_key(self.group["seed"], steps.long(), to_device(self._positions, self.device))

    @cached_property
    def _positions(self) -> Tensor:
        """The parameters' indices in the optimizer, (members,) int64 on the host."""
        return torch.tensor([member.position for member in self.members], device="cpu")

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The members' numbers of weights on this process."""
        return tuple(p.numel() for p in self.params)

    @cached_property
    def params(self) -> list[Tensor]:
        return [member.p for member in self.members]

    @cached_property
    def _summed_state(self) -> list[Tensor]:
        """The state over which a step leaves sums for the next, as it does over the weights: RankOne's."""
        return [state[name] for state in self.states for name in self.names] if self.is_rank_one else []

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        return [member.state for member in self.members]

    @property
    def is_rank_one(self) -> bool:
        return self.formats.variant == VARIANTS["rank_one"]

    @property
    def measures_itself(self) -> bool:
        """Whether the kernels do both passes in one call, since no sum spans more than one tensor."""
        return not (self.shards or self.may_skip or is_group_wide(self.variant, self.group))

    @cached_property
    def may_carry(self) -> bool:
        """Whether an outside change of the weights is noticed; DeepSpeed writes its partitions through ``.data``."""
        return all(member.p is local(member.owner) for member in self.members)

    def constants(self) -> Tensor:
        """Return the scalars that `reduce` needs, (members, 10) float32."""
        return rows([0.0, 0.0, *signed_decay_and_sign(self.group), *[0.0] * (SCALARS - 4)], self)


class Carried:
    """The sums over a batch's weights and state after its last step, and a check that they are still valid.

    A change that autograd does not see (through ``.data``) goes unnoticed; it is in the sums one step later.
    """

    def __init__(self, batch: Batch, sums: Tensor) -> None:
        self.sums = sums
        self._params, self._places, self._numbers = batch.params, batch.places, batch.numbers
        self._states = batch.states  # kept alive, so that no others take their addresses
        self._versions = [p._version for p in self._params], batch.state_versions

    def holds_for(self, batch: Batch) -> bool:
        params = batch.params
        return (
            len(self._params) == len(params)
            and all(map(operator.is_, self._params, params))
            and (self._places, self._numbers) == (batch.places, batch.numbers)
            and self._versions == ([p._version for p in params], batch.state_versions)
        )


def make_batch(
    kernels: ModuleType,
    variant: str,
    group: Mapping[str, Any],
    members: list[Member],
    names: Sequence[str],
    may_skip: bool,
) -> Batch:
    first = members[0]
    dtypes = (first.p.dtype, first.grad.dtype, first.state[names[0]].dtype)
    weight, gradient, state = (FORMATS[dtype] for dtype in dtypes)
    formats = Formats(VARIANTS[variant], weight, gradient, state)
    return Batch(group, variant, members, may_skip, kernels=kernels, formats=formats, names=names)


def signed_decay_and_sign(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return decay and sign of the gradient that the rule sees, ``(g + decay w) sign``."""
    sign = -1.0 if group["maximize"] else 1.0
    return (0.0 if group["decoupled_weight_decay"] else sign * group["weight_decay"]), sign


def rows(row: Sequence[float], batch: Batch) -> Tensor:
    """Repeat a row of scalars for all members, on the batch's device."""
    one = torch.tensor(row, dtype=torch.float32, device="cpu")
    return to_device(one.expand(len(batch.members), SCALARS).contiguous(), batch.device)


def as_vector(states: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """Return the 0-dim states of this name as one vector: the one that they are views of, if any, or a new one."""
    numbers = [state[name] for state in states]
    base = numbers[0]._base
    whole = base is not None and base.shape == (len(numbers),)
    if whole and all(x._base is base and x.storage_offset() == i for i, x in enumerate(numbers)):
        return base  # type: ignore[return-value]
    return torch.stack(numbers)


def may_read(group: Mapping[str, Any], count: Tensor) -> bool:
    """Whether a step count may be read on the host without waiting for a device or breaking a graph."""
    return count.device.type == "cpu" and not group["capturable"]


@dataclass(slots=True, eq=False)
class Piece:
    """Rows of a gradient, or a part of one row.

    Attributes:
        grad: (rows, ...).
        row, column: the positions of its first row and first column in the vector of all rows and columns.
        turn: its index among the pieces of its run: pieces of equal turn share no column. No two pieces share a row.
    """

    grad: Tensor
    row: int
    column: int
    turn: int = 0

    @property
    def rows(self) -> int:
        return len(self.grad)

    @property
    def columns(self) -> int:
        return self.grad.shape[1:].numel()


@dataclass(eq=False)
class Pieces:
    """The input of one call of the kernels of factored gradients: pieces of one format on one device.

    Attributes:
        table: (pieces, 5) int64 on the host: address, rows, columns, row, column (see `Piece`).
        aligned: whether all rows begin at multiples of 16 bytes.
    """

    pieces: list[Piece]

    def __post_init__(self) -> None:
        rows = [(0, *size, piece.row, piece.column) for size, piece in zip(self.sizes, self.pieces, strict=True)]
        self.table = torch.tensor(rows, device="cpu").view(-1, 5)
        self._rows_align = all(columns % 16 == 0 for _, columns in self.sizes)
        self.take_gradients()

    def take_gradients(self) -> None:
        """Look up the addresses of the pieces' gradients."""
        addresses = [piece.grad.data_ptr() for piece in self.pieces]
        self.table[:, 0] = torch.tensor(addresses, device="cpu")
        self.aligned = self._rows_align and all(address % 16 == 0 for address in addresses)

    @property
    def format(self) -> int:
        return FORMATS[self.pieces[0].grad.dtype]

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The numbers of rows and columns of each piece."""
        return tuple((piece.rows, piece.columns) for piece in self.pieces)
