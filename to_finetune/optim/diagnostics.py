"""Diagnostics of the last step: how far the estimate was from the gradient, and how uneven the gradient was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from to_finetune.optim.blocks import PEAK, Part
from to_finetune.optim.rules import SMALLEST_DIVISOR
from to_finetune.optim.sharding import Member, Shards, all_reduce

Piece = tuple[int, int | None]  # a parameter's position, and where in it the piece begins


class Diagnostics:
    """Sums over this process's pieces, by the processes that share the weights; reduced when read, not in the step."""

    def __init__(self) -> None:
        self._squares: dict[Shards, dict[Piece, tuple[Tensor, Tensor]]] = {}  # |G - g|^2 and |g|^2
        self._peaks: dict[Shards, dict[Piece, tuple[Tensor, Tensor]]] = {}  # max|g| and |g|^2

    def expect(self, sharers: Iterable[Shards]) -> None:
        """Register these processes even if none of their weights is held here: all must join the later all-reduce."""
        for shards in sharers:
            self._squares.setdefault(shards, {})
            self._peaks.setdefault(shards, {})

    def add_squares(self, member: Member, error: Tensor, norm: Tensor) -> None:
        """Record ``||G - g||^2`` and ``||g||^2`` of a member, or of all members of a batch that begins with it."""
        self._squares[member.shards][_piece(member)] = error, norm

    def add_peaks(self, part: Part, sums: Tensor, norm_square: Tensor) -> None:
        """Record the peaks among the sums over a part's members, and ``||g||^2`` of their whole tensors."""
        if part.group["grad_scale"] is not None:
            self._peaks[part.shards][_piece(part.members[0])] = sums[:, PEAK], norm_square

    def estimate_error(self) -> Tensor:
        """Return ``||G - g|| / ||g||``, 0-dim; NaN before the first step."""
        sums = []
        for shards, pieces in self._squares.items():
            squares = [torch.stack([x.double().sum() for x in pair]) for pair in pieces.values()]
            sums.append(
                all_reduce(_folded(squares, Tensor.add, torch.zeros(2, dtype=torch.float64, device="cpu")), shards)
            )
        error, norm = _folded(sums, Tensor.add, torch.full((2,), torch.nan, device="cpu"))
        return (error / norm).sqrt()

    def gradient_peak(self) -> Tensor:
        """Return the largest ``max|g| / ||g||`` of any tensor, 0-dim; NaN before the first step."""
        none = torch.zeros((), dtype=torch.float64, device="cpu")
        peaks = []
        for shards, pieces in self._peaks.items():
            own = [(peak / square.sqrt().clamp(min=SMALLEST_DIVISOR)).max() for peak, square in pieces.values()]
            peaks.append(all_reduce(_folded(own, torch.maximum, none), shards, ReduceOp.MAX))
        return _folded(peaks, torch.maximum, torch.tensor(torch.nan, device="cpu"))


def _piece(member: Member) -> Piece:
    return member.position, member.first


def _folded(parts: Sequence[Tensor], by: Callable[[Tensor, Tensor], Tensor], of_none: Tensor) -> Tensor:
    """Reduce all parts to one, on the first one's device; `of_none` if there are none."""
    return reduce(by, [part.to(parts[0].device) for part in parts]) if parts else of_none
