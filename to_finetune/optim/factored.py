"""(ours) `grad_scale="factored"`: bring a gradient's rows to the same scale, and its columns, without any state.

With ``r_i`` and ``c_j`` the mean squares of a row and of a column and m that of the whole matrix, each element is
multiplied by ``m / sqrt(r_i c_j)``: divided by Adafactor's estimate of its relative size, taken from this gradient
alone. The tensor's own root mean square is then divided out as for "rms". Rows and columns may be sharded; the
processes sum their squares in one all-reduce for all matrices, or one per two million rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from to_finetune.optim.blocks import to_device
from to_finetune.optim.kernels import fused
from to_finetune.optim.kernels.batch import Piece, Pieces
from to_finetune.optim.rules import accumulator
from to_finetune.optim.sharding import Member, Shards, all_reduce

CHUNK = 1 << 18  # elements that the plain path squares at a time
LARGEST = 1 << 21  # rows and columns measured together: 17 MB of sums, and twice that to compute their factors
SMALLEST = 1e-8  # a row below a ten-thousandth of the matrix's root mean square is noise, and stays small


class Kind(NamedTuple):
    """The properties that matrices measured together have in common."""

    shards: Shards
    device: torch.device
    dtype: torch.dtype
    may_fuse: bool


@dataclass
class Matrices:
    """Matrices that are measured together: their pieces on this process, and the sizes of each: rows, columns."""

    kind: Kind
    members: list[Member] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    size: int = 0  # their sum

    def add(self, member: Member, rows: int, columns: int) -> None:
        self.members.append(member)
        self.pieces += _pieces(member, columns, self.size, self.size + rows)
        self.sizes += [rows, columns]
        self.size += rows + columns

    def take_gradients(self) -> None:
        """Take over the members' new gradients; the members must be whole."""
        for piece, member in zip(self.pieces, self.members, strict=True):
            piece.grad = member.grad
        if self.fused:
            self.fused.take_gradients()

    @cached_property
    def sizes_on_device(self) -> Tensor:
        return to_device(torch.tensor(self.sizes, device="cpu"), self.kind.device)

    @cached_property
    def kernels(self) -> ModuleType | None:
        if not (self.kind.may_fuse and self.pieces):
            return None
        return fused.kernels_like(self.pieces[0].grad, [self.kind.dtype])

    @cached_property
    def fused(self) -> Pieces | None:
        """The pieces as the kernels take them; None if the plain path scales them."""
        contiguous = all(piece.grad.is_contiguous() for piece in self.pieces)
        return Pieces(self.pieces) if contiguous and self.kernels else None


def matrices_of(work: Sequence[tuple[Mapping[str, Any], list[Member]]], shapes: Sequence[torch.Size]) -> list[Matrices]:
    """Collect the matrices of groups with ``grad_scale="factored"``, as measured together; vectors are not scaled.

    Args:
        work: the groups and all their members, including those without a weight on this process, which add nothing.
        shapes: of all parameters that the optimizer was given. The first dimension is the rows, all others the columns.
    """
    alike: dict[Kind, list[Matrices]] = {}
    for group, members in work:
        for member in members if group["grad_scale"] == "factored" else ():
            rows, columns = shapes[member.position][:1].numel(), shapes[member.position][1:].numel()
            if len(shapes[member.position]) > 1:
                kind = Kind(member.shards, member.grad.device, member.grad.dtype, fused.may_fuse(group))
                together = alike.setdefault(kind, [Matrices(kind)])
                if together[-1].size > LARGEST:
                    together.append(Matrices(kind))
                together[-1].add(member, rows, columns)
    return [matrices for together in alike.values() for matrices in together]


def equalize_(matrices: Matrices) -> None:
    """Scale the matrices' gradients in place."""
    kind, kernels = matrices.kind, matrices.kernels if matrices.fused else None
    if kernels and not kind.shards and hasattr(kernels, "equalize"):
        kernels.equalize(matrices.fused)
        return
    add_squares, scale = (kernels.add_squares, kernels.scale) if kernels else (_add_squares, _scale)
    pieces: Any = matrices.fused or matrices.pieces
    squares = torch.zeros(matrices.size, dtype=accumulator(kind.device), device=kind.device)
    add_squares(pieces, squares)
    factors = _factors_(all_reduce(squares, kind.shards), matrices.sizes_on_device)
    scale(pieces, factors.to(kind.dtype))


def _pieces(member: Member, columns: int, row: int, column: int) -> Iterator[Piece]:
    """Yield a run's whole rows, and the partial rows at its ends; `row`, `column`: the matrix's first in the sums."""
    grad, first = member.grad, member.first
    assert first is not None
    if grad.dim() > 1:
        yield Piece(grad, row + (first // columns if columns else 0), column)
        return
    at, end, turn = first, first + len(grad), 0
    while at < end:
        i, j = divmod(at, columns)
        width = min(columns - j, end - at)
        rows = max((end - at) // columns, 1) if j == 0 else 1
        yield Piece(grad[at - first :][: rows * width].view(rows, width), row + i, column + j, turn)
        at += rows * width
        turn += 1


def _add_squares(pieces: Sequence[Piece], sums: Tensor) -> None:
    """Add to each row's and each column's sum of squares."""
    for piece in pieces:
        step = max(CHUNK // max(piece.columns, 1), 1)
        for begin in range(0, piece.rows, step):
            squares = piece.grad[begin : begin + step].flatten(1).to(sums.dtype).square()
            sums[piece.row + begin :][: len(squares)] += squares.sum(1)
            sums[piece.column :][: piece.columns] += squares.sum(0)


def _scale(pieces: Sequence[Piece], factors: Tensor) -> None:
    """Multiply each element by its row's and its column's factor, in place."""
    for piece in pieces:
        grad = piece.grad
        grad.mul_(factors[piece.row :][: piece.rows].view(-1, *(1,) * (grad.dim() - 1)))
        grad.mul_(factors[piece.column :][: piece.columns].view(grad.shape[1:]))


def _factors_(squares: Tensor, sizes: Tensor) -> Tensor:
    """Compute one over the root mean square of each row, and of each column, in units of the whole matrix's.

    Args:
        squares: the sums of squares of all matrices' rows and columns, concatenated; overwritten with the factors.
        sizes: how many consecutive sums belong together: a matrix's rows, or its columns.
    """
    means = torch.segment_reduce(squares, "mean", lengths=sizes, unsafe=True)  # checks would wait for the device
    means.clamp_(min=torch.finfo(squares.dtype).tiny)
    squares /= means.repeat_interleave(sizes, output_size=len(squares))
    return squares.clamp_(min=SMALLEST).rsqrt_()
