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

from to_finetune.optim.sharding import Member, Shards, all_reduce

CHUNK = 1 << 18  # elements that are squared at a time
SMALLEST = 1e-8  # a row below a ten-thousandth of the matrix's root mean square is noise, and stays small


class Piece(NamedTuple):
    """A part of a matrix's gradient, (rows, ...), and which rows and columns they are of the matrix."""

    grad: Tensor
    rows: slice
    columns: slice


def equalize_(work: Sequence[tuple[Mapping[str, Any], list[Member]]], shapes: Sequence[torch.Size]) -> None:
    """Scale the gradients of matrices in place, in the groups that ask for it; vectors are left as they are.

    Args:
        work: the groups and all their members, also those without a weight on this process, which add nothing.
        shapes: of all parameters that the optimizer was given; of more than two dimensions the first one is the rows.
    """
    matrices: dict[tuple[Shards, torch.device], list[tuple[list[Piece], int, int]]] = {}
    for group, members in work:
        if group["grad_scale"] == "factored":
            for member in members:
                rows, columns = shapes[member.position][:1].numel(), shapes[member.position][1:].numel()
                if len(shapes[member.position]) > 1:
                    alike = matrices.setdefault((member.shards, member.grad.device), [])
                    alike.append((list(_pieces(member, columns)), rows, columns))
    for (shards, device), those in matrices.items():
        squares = all_reduce(torch.cat([_squares(*matrix, device) for matrix in those]), shards)
        both = squares.split([size for _, *sizes in those for size in sizes])
        for (pieces, *_), of_rows, of_columns in zip(those, both[::2], both[1::2], strict=True):
            for piece in pieces:
                others = (1,) * (piece.grad.dim() - 1)
                piece.grad.mul_(_factors(of_rows, piece.grad.dtype)[piece.rows].view(-1, *others))
                piece.grad.mul_(_factors(of_columns, piece.grad.dtype)[piece.columns].view(piece.grad.shape[1:]))


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


def _squares(pieces: Sequence[Piece], rows: int, columns: int, device: torch.device) -> Tensor:
    """The sums of squares of the matrix's rows, then of its columns, as far as they are here; one vector, float64."""
    sums = torch.zeros(rows + columns, dtype=torch.float64, device=device)
    of_rows, of_columns = sums.split([rows, columns])
    for grad, here, there in pieces:
        for begin in range(0, len(grad), step := max(CHUNK // max(columns, 1), 1)):
            squares = grad[begin : begin + step].flatten(1).double().square()
            of_rows[here][begin : begin + step] += squares.sum(1)
            of_columns[there] += squares.sum(0)
    return sums


def _factors(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the root mean square of each row, or column, in units of the whole matrix's."""
    relative = squares / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
    return relative.clamp(min=SMALLEST).rsqrt().to(dtype)
