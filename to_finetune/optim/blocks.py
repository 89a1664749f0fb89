"""Sums over blocks, which a step needs over a whole tensor or group before any of its weights can move.

The fused kernels and the plain path sum over the weights of this process; here their sums become those of the blocks,
with one all-reduce per step for all blocks that several processes share, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from to_finetune.optim.rules import RankOneSums, accumulator, rms_factor
from to_finetune.optim.sharding import Member, Shards, all_reduce

GG, PEAK, UG, WW, VW, UU, UB, ERROR = range(8)  # columns of sums; g.g, max|g|, u.g, w.w, v.w, u.u, u.b, |G - g|^2
SUMS = 8


class Totals(NamedTuple):
    """Totals for the members of a part, one row each.

    Attributes:
        norm_square: ``||g||^2`` of the whole tensor, before scaling.
        factor: the factor by which `grad_scale` multiplies the gradient; None without `grad_scale`.
        block: the sums over the block.
    """

    norm_square: Tensor
    factor: Tensor | None
    block: RankOneSums


class New(NamedTuple):
    """A member's new weights and state, not yet stored.

    Attributes:
        w: the new weights.
        names, values: the new state.
        key: the key of the random bits for stochastic rounding (`state.state_key`).
        skip: 0-dim bool; if true, nothing changes.
    """

    member: Member
    w: Tensor
    names: Sequence[str]
    values: Sequence[Tensor]
    key: int | Tensor
    skip: Tensor | None


@dataclass
class Part:
    """Members of one group that are measured and moved together.

    Attributes:
        may_skip: whether any group uses `skip_nonfinite`, for which all gradients must be measured.
        sums: sums over this process's weights, (members, 8) float64; None if not needed or not yet computed.
        totals: the totals that `share` computes from the sums.
        pending: the new values of pieces of int8 blocks; None if results are stored at once.
    """

    group: Mapping[str, Any]
    variant: str
    members: list[Member]
    may_skip: bool
    sums: Tensor | None = None
    totals: Totals | None = None
    pending: list[New] | None = None

    @property
    def shards(self) -> Shards:
        return self.members[0].shards

    @cached_property
    def numels(self) -> Tensor:
        """`numels_of` its members."""
        return numels_of(self.members, self.members[0].p.device)

    @property
    def needs_weight_sums(self) -> bool:
        return needs_weight_sums(self.variant, self.group)

    @property
    def needs_gradient_sums(self) -> bool:
        return needs_gradient_sums(self.variant, self.group, self.may_skip)


def needs_weight_sums(variant: str, group: Mapping[str, Any]) -> bool:
    return variant == "rank_one" or (variant == "diagonal" and group["relative_alpha"])


def needs_gradient_sums(variant: str, group: Mapping[str, Any], may_skip: bool) -> bool:
    return variant == "rank_one" or group["grad_scale"] is not None or may_skip


def is_group_wide(variant: str, group: Mapping[str, Any]) -> bool:
    """Whether no weight can move before its whole group has been measured."""
    return group["scope"] == "group" and needs_weight_sums(variant, group)


Work = Sequence[tuple[Mapping[str, Any], list[Member]]]


def share(variant: str, may_skip: bool, work: Work, parts: Sequence[Part]) -> list[Tensor]:
    """Fill in the totals of the measured parts; return their ``||g||^2``, and those of all sharded tensors.

    Args:
        variant: the optimizer's variant.
        may_skip: as in `Part`.
        work: the groups and all their members, including those without a weight on this process: the all-reduce
            needs the same rows on all processes.
        parts: the measured parts.
    """
    tables = _tables(variant, may_skip, work, parts)
    for group, members in work:
        measured = [part for part in parts if part.group is group and part.sums is not None]
        for part in measured:
            assert part.sums is not None
            sums = part.sums
            if part.shards:
                rows, table = tables[part.shards]
                sums = table[_index(rows, part.members, table.device)].to(sums.device)
            part.totals = _totals(group, sums, part.members, part.numels)
        if measured and is_group_wide(variant, group):
            blocks = [part.totals.block for part in measured if part.totals and not part.shards]
            for shards, (rows, table) in tables.items():
                once = list({member.position: member for member in members if member.shards == shards}.values())
                if once:
                    sums = table[_index(rows, once, table.device)]
                    blocks.append(_totals(group, sums, once, numels_of(once, sums.device)).block)
            columns = zip(*blocks, strict=True)
            whole = [torch.stack([x.sum().to(blocks[0].n.device) for x in column]).sum() for column in columns]
            for part in measured:
                assert part.totals is not None
                n = part.totals.block.n
                part.totals = part.totals._replace(block=RankOneSums(*(x.to(n.device).expand_as(n) for x in whole)))
    own = [part.totals.norm_square for part in parts if part.totals and not part.shards]
    return [*own, *(table[:, GG] for _, table in tables.values())]


def _tables(
    variant: str, may_skip: bool, work: Work, parts: Sequence[Part]
) -> dict[Shards, tuple[dict[int, int], Tensor]]:
    """Return, per set of processes, the rows of the parameters that they share and their sums, (rows, 8) float64."""
    held: dict[Shards, dict[int, Member]] = {}
    for group, members in work:
        if needs_weight_sums(variant, group) or needs_gradient_sums(variant, group, may_skip):
            for member in members:
                if member.shards:
                    held.setdefault(member.shards, {}).setdefault(member.position, member)
    tables = {}
    for shards, of in held.items():
        rows = {position: row for row, position in enumerate(of)}
        table = torch.zeros(len(rows), SUMS, dtype=torch.float64, device=next(iter(of.values())).p.device)
        for part in parts:
            if part.shards == shards and part.sums is not None:
                table.index_add_(0, _index(rows, part.members, table.device), part.sums.to(table.device))
        tables[shards] = rows, all_reduce(table, shards)
    return tables


def _index(rows: Mapping[int, int], members: Sequence[Member], device: torch.device) -> Tensor:
    return to_device(torch.tensor([rows[member.position] for member in members], device="cpu"), device)


def numels_of(members: Sequence[Member], device: torch.device) -> Tensor:
    """Return the sizes of the members' whole tensors, in the dtype of sums on this device."""
    numbers = [float(member.numel) for member in members]
    return to_device(torch.tensor(numbers, dtype=accumulator(device), device="cpu"), device)


def _totals(group: Mapping[str, Any], sums: Tensor, members: Sequence[Member], numels: Tensor) -> Totals:
    """Compute totals from sums over whole tensors, each a block; ``u.g`` becomes that of the scaled gradient."""
    factor, ug = None, sums[:, UG]
    if group["grad_scale"] is not None:
        factor = rms_factor(sums[:, GG].sqrt(), numels)
        if all(member.p.dtype != torch.float64 for member in members):
            factor = factor.float()
        ug = ug * factor
    vw, ww, uu, ub = (sums[:, k] for k in (VW, WW, UU, UB))  # indexing by a list would copy it to the device
    return Totals(sums[:, GG], factor, RankOneSums(vw, ww, uu, ub, ug, numels))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move a small array from the host to the kernels' device, without waiting for it."""
    if device.type != "cuda":
        return x.to(device)
    pinned = x.pin_memory()
    keep_for_graphs(pinned)
    return pinned.to(device, non_blocking=True)


def keep_for_graphs(*tensors: Tensor) -> None:
    """Keep alive the tensors that a CUDA graph, if one is being captured, will read at each replay."""
    if is_capturing():
        _READ_BY_GRAPHS.extend(tensors)


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_READ_BY_GRAPHS: list[Tensor] = []  # a graph may live as long as the process
