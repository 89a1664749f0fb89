"""(ours) `grad_scale="factored"`: the rows of a matrix's gradient weigh alike, and its columns, without any state.

With ``r_i`` and ``c_j`` the mean squares of a row and of a column and m that of the whole, an element is multiplied by
``m / sqrt(r_i c_j)``: Adafactor's estimate of its size, taken from this one gradient. The tensor's own root mean square
is then divided out as by "rms". Rows and columns may be in pieces; the processes add up their squares in one all-reduce
for all matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from to_finetune.optim.blocks import to_device
from to_finetune.optim.rules import accumulator
from to_finetune.optim.sharding import Member, Shards, all_reduce

CHUNK = 1 << 18  # elements that are squared at a time
SMALLEST = 1e-8  # a row below a ten-thousandth of the matrix's root mean square is noise, and stays small


class Piece(NamedTuple):
    """A part of a matrix's gradient, (rows, ...), and which rows and columns they are of the matrix."""

    grad: Tensor
    rows: slice
    columns: slice


class Matrix(NamedTuple):
    """What this process has of a matrix's gradient, and the numbers of rows and columns of the whole."""

    pieces: list[Piece]
    rows: int
    columns: int


def equalize_(work: Sequence[tuple[Mapping[str, Any], list[Member]]], shapes: Sequence[torch.Size]) -> None:
    """Scale the gradients of matrices in place, in the groups that ask for it; vectors are left as they are.

    Args:
        work: the groups and all their members, also those without a weight on this process, which add nothing.
        shapes: of all parameters that the optimizer was given; of more than two dimensions the first one is the rows.
    """
    matrices: dict[tuple[Shards, torch.device, torch.dtype], list[Matrix]] = {}
    for group, members in work:
        for member in members:
            rows, columns = shapes[member.position][:1].numel(), shapes[member.position][1:].numel()
            if group["grad_scale"] == "factored" and len(shapes[member.position]) > 1:
                alike = matrices.setdefault((member.shards, member.grad.device, member.grad.dtype), [])
                alike.append(Matrix(list(_pieces(member, columns)), rows, columns))
    for (shards, device, dtype), those in matrices.items():
        squares = all_reduce(torch.cat([_squares(matrix, device) for matrix in those]), shards)
        sizes = [size for matrix in those for size in (matrix.rows, matrix.columns)]
        factors = _factors(squares, to_device(torch.tensor(sizes), device)).to(dtype).split(sizes)
        for matrix, of_rows, of_columns in zip(those, factors[::2], factors[1::2], strict=True):
            for grad, here, there in matrix.pieces:
                grad.mul_(of_rows[here].view(-1, *(1,) * (grad.dim() - 1)))
                grad.mul_(of_columns[there].view(grad.shape[1:]))


def _pieces(member: Member, columns: int) -> Iterator[Piece]:
    """The whole rows of a run, and the parts of rows in which it begins and ends."""
    grad, first = member.grad, member.first
    assert first is not None
    if grad.dim() > 1:
        row = first // columns if columns else 0
        yield Piece(grad, slice(row, row + len(grad)), slice(None))
        return
    at, end = first, first + len(grad)
    while at < end:
        row, column = divmod(at, columns)
        width = min(columns - column, end - at)
        rows = max((end - at) // columns, 1) if column == 0 else 1
        yield Piece(
            grad[at - first :][: rows * width].view(rows, width), slice(row, row + rows), slice(column, column + width)
        )
        at += rows * width


def _squares(matrix: Matrix, device: torch.device) -> Tensor:
    """The sums of squares of the matrix's rows, then of its columns, as far as they are here; one vector, float64."""
    wide = accumulator(device)
    sums = torch.zeros(matrix.rows + matrix.columns, dtype=wide, device=device)
    of_rows, of_columns = sums.split([matrix.rows, matrix.columns])
    for grad, here, there in matrix.pieces:
        for begin in range(0, len(grad), step := max(CHUNK // max(matrix.columns, 1), 1)):
            squares = grad[begin : begin + step].flatten(1).to(wide).square()
            of_rows[here][begin : begin + step] += squares.sum(1)
            of_columns[there] += squares.sum(0)
    return sums


def _factors(squares: Tensor, sizes: Tensor) -> Tensor:
    """One over the root mean square of each row, and of each column, in units of the whole matrix's.

    Args:
        squares: the sums of all matrices' rows and columns, end to end.
        sizes: how many belong together.
    """
    means = torch.segment_reduce(squares, "mean", lengths=sizes).clamp(min=torch.finfo(squares.dtype).tiny)
    relative = squares / means.repeat_interleave(sizes, output_size=len(squares))
    return relative.clamp(min=SMALLEST).rsqrt()
