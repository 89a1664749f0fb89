"""Sizes of the slopes that a live optimizer has learned: a few numbers per tensor, the same in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from to_finetune.optim.diagonal import DiagonalTO
from to_finetune.optim.rank_one import RankOneTO
from to_finetune.optim.sharding import Member, gathered
from to_finetune.optim.state import read_at

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLE = 1 << 16  # elements of a tensor, at most


class Slope(NamedTuple):
    """The slope A of one tensor, from a sample of its elements (all of them, if no more than 65,536).

    Attributes:
        size: DiagonalTO: the root mean square of a. RankOneTO: ``||u|| ||v||``, which is A's one singular value (with
            ``scope="group"``, that of the tensor's own block of A).
        weight: the root mean square of the weights.
        quantiles: DiagonalTO: of a, at `QUANTILES`. RankOneTO: none.
    """

    size: float
    weight: float
    quantiles: list[float]


@torch.no_grad()
def slopes(optimizer: DiagonalTO | RankOneTO) -> dict[int, Slope]:
    """Measure the slopes, by parameter position, on process 0; the others get an empty dict.

    All processes must call it. No tensor is copied or gathered whole. Weights sharded along a dimension other than the
    first are left out.
    """
    here: dict[int, list[Member]] = {}
    for member in optimizer.held():
        here.setdefault(member.position, []).append(member)
    found = {}
    for position, members in sorted(here.items()):
        numel = members[0].numel
        if numel == 0 or any(member.first is None for member in members):
            continue
        samples = [_sample(members, name) for name in (None, *optimizer.state_names) if name != "b"]
        on_process_0 = [sample for sample in samples if sample is not None]
        if on_process_0:
            found[position] = _slope(numel, *on_process_0)
    return found


def _slope(numel: int, w: Tensor, *factors: Tensor) -> Slope:
    """Compute a slope from samples of w and a, or of w, u and v."""
    if len(factors) == 2:
        u, v = factors
        return Slope(_rms(u) * _rms(v) * numel, _rms(w), [])
    (a,) = factors
    return Slope(_rms(a), _rms(w), torch.quantile(a, a.new_tensor(QUANTILES)).tolist())


def _sample(members: Sequence[Member], name: str | None) -> Tensor | None:
    """Sample a tensor's elements at regular intervals, over all processes' members; None but on process 0.

    Args:
        members: this process's members of the tensor.
        name: the name of the state; None for the weights.

    Returns:
        Flat float32 on the CPU.
    """
    numel = members[0].numel
    every = -(-numel // SAMPLE) | 1  # odd, so that the samples cover all columns of a matrix
    pieces = []
    for member in members:
        first = member.first or 0
        begin, end = -(-first // every), -(-(first + member.p.numel()) // every)
        index = torch.arange(begin, end, device=member.p.device) * every - first
        numbers = member.p.reshape(-1)[index] if name is None else read_at(member.state, name, index, first)
        pieces.append((slice(begin, end), numbers.float()))
    return gathered(-(-numel // every), pieces, pieces[0][1], members[0].shards)


def _rms(x: Tensor) -> float:
    return (torch.linalg.vector_norm(x, dtype=torch.float64) / x.numel() ** 0.5).item()
