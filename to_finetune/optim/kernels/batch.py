"""What the fused kernels work on: the tensors of a step as rows of arrays.

The kernels of a step read everything from three arrays with a row a tensor: `table` (addresses, sizes, keys; int64),
`scalars` (float32) and the sums that they return (float64). The constants below are their columns. Those of factored
gradients have a table of `Piece`s.
"""

from __future__ import annotations

import operator
from array import array
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
from to_finetune.optim.state import exponents_name

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
VARIANTS = {"diagonal": 0, "rank_one": 1}
STATES = 3  # columns of the table for state, more than Diagonal needs
NUMEL, KEY, COLUMNS = 8, 10, 11
LR, DECAY, WEIGHT_DECAY, FACTOR, BETA, KEEP, OWN, SCALARS = 0, 1, 2, 3, 4, 5, 6, 10


@dataclass
class Batch(Part):
    """Members of one group, one device and one set of formats, stepped by one launch.

    Attributes:
        formats: numbers of the variant and of the formats of weights, gradients and state, as the kernels know them.
        pointers: the addresses of the weights.
        aligned: whether all addresses are multiples of 16.
        table: (members, 11) int64 on the kernels' device; its KEY is at first the parameter's index in the optimizer.
        held: the sums over weights and state that the last step left and that still hold, (members, 8) float64.
    """

    kernels: ModuleType = field(kw_only=True)
    formats: tuple[int, int, int, int] = field(kw_only=True)
    grads: list[Tensor] = field(kw_only=True)
    pointers: list[int] = field(kw_only=True)
    aligned: bool = field(kw_only=True)
    table: Tensor = field(kw_only=True)
    held: Tensor | None = None

    @cached_property
    def params(self) -> list[Tensor]:
        return [member.p for member in self.members]

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        return [member.state for member in self.members]

    @property
    def is_rank_one(self) -> bool:
        return self.formats[0] == VARIANTS["rank_one"]

    @property
    def measures_itself(self) -> bool:
        """Whether the first pass is part of the second: on the CPU, where no sum concerns more than one tensor."""
        return hasattr(self.kernels, "measure_and_update") and not (
            self.shards or self.may_skip or is_group_wide(self.variant, self.group)
        )

    @cached_property
    def may_carry(self) -> bool:
        """Whether a change of the weights from outside would be seen. DeepSpeed writes its partitions through .data."""
        return all(member.p is local(member.owner) for member in self.members)

    def constants(self) -> Tensor:
        """(members, 10) float32: of the scalars those that `reduce` needs."""
        return rows([0.0, 0.0, *signed_decay_and_sign(self.group), *[0.0] * (SCALARS - 4)], self)


class Carried:
    """The sums over a batch's weights and state as its last step left them, and how to know that they still hold.

    A change of the weights behind autograd's back (through ``.data``) is not seen; it is in the sums one step later.
    """

    def __init__(self, batch: Batch, sums: Tensor) -> None:
        self.sums = sums
        self._params, self._pointers = batch.params, batch.pointers
        self._versions = [p._version for p in self._params]

    def holds_for(self, batch: Batch) -> bool:
        params = batch.params
        return (
            len(self._params) == len(params)
            and all(map(operator.is_, self._params, params))
            and self._pointers == batch.pointers
            and self._versions == [p._version for p in params]
        )


def make_batch(
    kernels: ModuleType,
    variant: str,
    group: Mapping[str, Any],
    members: list[Member],
    names: Sequence[str],
    may_skip: bool,
) -> Batch:
    ps, states = [member.p for member in members], [member.state for member in members]
    grads = [member.grad.contiguous() for member in members]
    pointers = [p.data_ptr() for p in ps]
    state_dtype = states[0][names[0]].dtype
    unused = [0] * len(ps)
    exponents = [exponents_name(name) for name in names] if state_dtype == torch.int8 else []
    addresses = [
        pointers,
        [g.data_ptr() for g in grads],
        *([state[name].data_ptr() for state in states] for name in names),
        *[unused] * (STATES - len(names)),
        *([state[name].data_ptr() for state in states] for name in exponents),
        *[unused] * (STATES - len(exponents)),
    ]
    first = [member.first or 0 for member in members]
    columns = [*addresses, [p.numel() for p in ps], first, [member.position for member in members]]
    table = torch.frombuffer(array("q", chain.from_iterable(zip(*columns, strict=True))), dtype=torch.int64)
    aligned = reduce(operator.or_, chain.from_iterable(addresses[: 2 + len(names)])) % 16 == 0
    device = ps[0].device
    return Batch(
        group,
        variant,
        members,
        may_skip,
        kernels=kernels,
        formats=(VARIANTS[variant], FORMATS[ps[0].dtype], FORMATS[grads[0].dtype], FORMATS[state_dtype]),
        grads=grads,
        pointers=pointers,
        aligned=aligned,
        table=to_device(table.view(-1, COLUMNS), device),
    )


def signed_decay_and_sign(group: Mapping[str, Any]) -> tuple[float, float]:
    """The rule sees the gradient ``(g + decay w) sign``."""
    sign = -1.0 if group["maximize"] else 1.0
    return (0.0 if group["decoupled_weight_decay"] else sign * group["weight_decay"]), sign


def rows(row: Sequence[float], batch: Batch) -> Tensor:
    """The same scalars for all tensors."""
    return to_device(torch.tensor(row).expand(len(batch.params), SCALARS).contiguous(), batch.table.device)


def as_vector(states: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """The 0-dim state of this name as one vector: the one that they are the elements of, if they are, or a new one."""
    numbers = [state[name] for state in states]
    base = numbers[0]._base
    whole = base is not None and base.shape == (len(numbers),)
    if whole and all(x._base is base and x.storage_offset() == i for i, x in enumerate(numbers)):
        return base  # type: ignore[return-value]
    return torch.stack(numbers)


def may_read(group: Mapping[str, Any], count: Tensor) -> bool:
    """Whether a count of steps may be read on the host without waiting for a device or breaking a graph."""
    return count.device.type == "cpu" and not group["capturable"]


class Piece(NamedTuple):
    """Rows of a gradient, or a part of one row.

    Attributes:
        grad: (rows, ...).
        row, column: where its first row and its first column stand in the vector of all rows and columns.
        turn: its number among the pieces of its run: those of one turn share no column. No two pieces share a row.
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


def table_of(pieces: Sequence[Piece]) -> Tensor:
    """(pieces, 5) int64: address, rows, columns, and the places of the first ones."""
    rows = [(p.grad.data_ptr(), p.rows, p.columns, p.row, p.column) for p in pieces]
    return torch.tensor(rows, device="cpu").view(-1, 5)
