"""int8 blocks cut by a shard boundary: their pieces, on several processes, agree on one exponent.

Blocks are counted from the start of the whole parameter, so they are the same on any number of processes. A shard's
whole blocks are stepped like any others. The pieces at its two ends take the plain path: they are stored only after
the processes have exchanged the largest values that they would store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from to_finetune.optim.blocks import New
from to_finetune.optim.kernels.inplace import store_
from to_finetune.optim.sharding import Member, Shards, all_reduce, cut
from to_finetune.optim.state import BLOCK, blocks_of

Edge = tuple[int, int]  # a parameter's position, and the number of the block in it
Slots = dict[Any, dict[Edge, int]]  # by processes and parameters: the slot of every edge of any process


def split(members: Sequence[Member], names: Sequence[str]) -> tuple[list[Member], list[Member]]:
    """Return the members without the pieces of cut int8 blocks, and those pieces as members of their own."""
    whole: list[Member] = []
    pieces: list[Member] = []
    for member in members:
        if not member.shards or member.state[names[0]].dtype != torch.int8:
            whole.append(member)
            continue
        first, count = member.first or 0, member.p.numel()
        last = first + count
        head = min(-first % BLOCK, count)
        tail = min(last % BLOCK, count - head) if last < member.numel else 0
        for start, stop, where in ((0, head, pieces), (head, count - tail, whole), (count - tail, count, pieces)):
            if stop > start:
                where.append(_part(member, start, stop))
    return whole, pieces


def _part(member: Member, start: int, stop: int) -> Member:
    """Return a member for a part of a member's weights, from `start` to `stop`."""
    first = member.first or 0
    block = (first + start) // BLOCK - first // BLOCK
    return replace(
        member,
        p=member.p.view(-1)[start:stop],
        grad=member.grad.reshape(-1)[start:stop],
        state=cut(member.state, start, stop - start, block, blocks_of(first + start, stop - start)),
        first=first + start,
    )


def store(work: Sequence[tuple[Any, list[Member]]], pending: Sequence[New], slots: Slots) -> None:
    """Store the edges of a step, with the exponents of their whole blocks.

    Args:
        work: the groups and all their members, on all processes the same parameters.
        pending: the new values of this process's edges.
        slots: the optimizer's; filled in by the first step, when the processes exchange their edges.
    """
    together: dict[Shards, list[int]] = {}
    for group, members in work:
        if group["state_dtype"] == torch.int8:
            for member in members:
                if member.shards:
                    together.setdefault(member.shards, []).append(member.position)
    for shards, positions in together.items():
        mine = [new for new in pending if new.member.shards == shards]
        key = shards, *positions
        if key not in slots:
            slots[key] = _all_edges(shards, mine)
        if slots[key]:
            _store(mine, shards, slots[key])


def _edge(new: New) -> Edge:
    return new.member.position, (new.member.first or 0) // BLOCK


def _all_edges(shards: Shards, mine: Sequence[New]) -> dict[Edge, int]:
    (processes,) = shards
    found: list[set[Edge]] = [set()] * dist.get_world_size(processes)
    dist.all_gather_object(found, {_edge(new) for new in mine}, processes)
    return {edge: slot for slot, edge in enumerate(sorted(set().union(*found)))}


def _store(mine: Sequence[New], shards: Shards, slots: dict[Edge, int]) -> None:
    states = len(mine[0].values) if mine else 0
    peaks = torch.zeros(len(slots), 3, dtype=torch.float32, device=mine[0].w.device if mine else "cpu")
    for new in mine:
        for k in range(states):
            peaks[slots[_edge(new)], k] = _finite(new.values[k].abs().amax())
    peaks = all_reduce(peaks, shards, ReduceOp.MAX)
    for new in mine:
        store_(new, peaks[slots[_edge(new)]].unbind())


def _finite(peak: Tensor) -> Tensor:
    """Replace NaN, which a max all-reduce may lose, by infinity, which it keeps; both read back as non-finite."""
    return torch.where(peak.isnan(), torch.inf, peak)
