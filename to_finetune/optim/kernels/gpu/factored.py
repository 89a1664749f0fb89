"""The fused path of factored gradients on GPUs: sums of squares of rows and columns, and scaling by both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from to_finetune.optim.blocks import keep_for_graphs, to_device
from to_finetune.optim.kernels.batch import Pieces
from to_finetune.optim.kernels.gpu.programs import MANY_WARPS, programs_of
from to_finetune.optim.kernels.gpu.storage import nearest, pointer

HIGH, WIDE = 32, 128  # rows and columns of a gradient that are squared or scaled at a time
TALL = 512  # rows whose squares one program adds up, a multiple of HIGH
ADDED = 128  # rows or columns whose sums are added up by one program
AT_ONCE = 1 << 29  # elements of gradients that are squared in one launch


def add_squares(pieces: Pieces, sums: Tensor) -> None:
    """Add the squares of contiguous pieces of one format to the `sums`, float64, of their rows and columns.

    Each gradient is read once: a program takes TALL rows of a strip of WIDE columns, and a second launch adds up
    their results, in order.
    """
    turns = [piece.turn for piece in pieces.pieces]
    whole = to_device(pieces.table, sums.device)
    for begin, end in _launches(pieces.sizes):
        sizes, table = pieces.sizes[begin:end], whole[begin:end]
        places, count = _places(sizes, sums.device)
        found = torch.empty(count, dtype=torch.float64, device=sums.device)
        blocks = [-(-columns // WIDE) * -(-rows // TALL) for rows, columns in sizes]
        _launch_on_pieces(_square, blocks, pieces, table, places, found, TALL=TALL)
        arrays = table, places, found, sums
        more: dict[str, Any] = {"TALL": TALL, "ADDED": ADDED}
        rows = [rows for rows, _ in sizes]
        _launch_on_pieces(_combine_squares, rows, pieces, *arrays, each=ADDED, OF_COLUMNS=False, **more)
        for turn in sorted(set(turns[begin:end])):
            of_turn = [this == turn for this in turns[begin:end]]
            columns = [columns * now for (_, columns), now in zip(sizes, of_turn, strict=True)]
            _launch_on_pieces(_combine_squares, columns, pieces, *arrays, each=ADDED, OF_COLUMNS=True, **more)


def scale(pieces: Pieces, factors: Tensor) -> None:
    """Multiply each element by its row's and its column's factor, in place, rounding after each."""
    table = to_device(pieces.table, factors.device)
    _launch_on_pieces(_scale, [rows for rows, _ in pieces.sizes], pieces, table, factors, each=HIGH)


def _launch_on_pieces(
    kernel: Any, sizes: Sequence[int], pieces: Pieces, table: Tensor, *arrays: Tensor, each: int = 1, **options: Any
) -> None:
    """Launch a program for every `each` of each piece's size."""
    programs, _ = programs_of(sizes, table.device, each)
    if len(programs):
        with torch.cuda.device_of(table):
            kernel[(len(programs),)](
                table,
                programs,
                *arrays,
                **options,
                GRADIENT=pieces.format,
                ALIGNED=pieces.aligned,
                HIGH=HIGH,
                WIDE=WIDE,
                num_warps=MANY_WARPS,
                enable_fp_fusion=False,
            )


def _launches(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges of pieces to square in one launch: AT_ONCE elements (some 40 MB of results), or one larger piece."""
    begin, weights = 0, 0
    for i, (rows, columns) in enumerate(sizes):
        if i > begin and weights + rows * columns > AT_ONCE:
            yield begin, i
            begin, weights = i, 0
        weights += rows * columns
    if begin < len(sizes):
        yield begin, len(sizes)


def _places(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """Return where `_square` puts the sums of each piece's rows and columns, (pieces, 2) int64, and their number."""
    places, count = _made_places(sizes, device)
    keep_for_graphs(places)
    return places, count


@lru_cache(maxsize=256)
def _made_places(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    counts = [x for rows, columns in sizes for x in (-(-columns // WIDE) * rows, -(-rows // TALL) * columns)]
    ends = torch.tensor([0, *counts], device="cpu").cumsum(0)
    return ends[:-1].view(-1, 2).to(device), int(ends[-1])


@triton.jit
def _piece(table, programs, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Load this program's piece (gradient, rows, columns, row, column) and the number of its block in the piece."""
    pid = tl.program_id(0)
    piece = table + tl.load(programs + 2 * pid).to(tl.int64) * 5
    columns = tl.load(piece + 2)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    g = pointer(tl.load(piece), GRADIENT, ALIGNED)
    return g, tl.load(piece + 1), columns, tl.load(piece + 3), tl.load(piece + 4), tl.load(programs + 2 * pid + 1)


@triton.jit
def _square(
    table, programs, places, found,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Sum the squares of each row and of each column, over a strip of columns and TALL rows of it."""
    g, rows, columns, _, _, block = _piece(table, programs, GRADIENT, ALIGNED)
    place = places + 2 * tl.load(programs + 2 * tl.program_id(0))
    strips = tl.cdiv(columns, WIDE)
    strip, chunk = block % strips, block // strips
    j = strip * WIDE + tl.arange(0, WIDE).to(tl.int64)
    of_rows = found + tl.load(place) + strip * rows
    of_columns = tl.zeros((HIGH, WIDE), tl.float64)
    for at in range(chunk * TALL, tl.minimum((chunk + 1) * TALL, rows), HIGH):
        i = at + tl.arange(0, HIGH).to(tl.int64)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        x = tl.load(g + i[:, None] * columns + j[None, :], mask=inside, other=0).to(tl.float32).to(tl.float64)
        of_columns += x * x
        tl.store(of_rows + i, tl.sum(x * x, axis=1), mask=i < rows)
    tl.store(found + tl.load(place + 1) + chunk * columns + j, tl.sum(of_columns, axis=0), mask=j < columns)


@triton.jit
def _combine_squares(
    table, programs, places, found, sums,
    OF_COLUMNS: tl.constexpr, ADDED: tl.constexpr, TALL: tl.constexpr,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the results of `_square` for some rows, or columns, of a piece to their sums."""
    _, rows, columns, row, column, block = _piece(table, programs, GRADIENT, ALIGNED)
    place = places + 2 * tl.load(programs + 2 * tl.program_id(0))
    if OF_COLUMNS:
        begin, out, length, parts = tl.load(place + 1), sums + column, columns, tl.cdiv(rows, TALL)
    else:
        begin, out, length, parts = tl.load(place), sums + row, rows, tl.cdiv(columns, WIDE)
    i = block * ADDED + tl.arange(0, ADDED)
    total = tl.load(out + i, mask=i < length, other=0)
    for part in range(0, parts, HIGH):
        k = part + tl.arange(0, HIGH).to(tl.int64)
        inside = (k < parts)[:, None] & (i < length)[None, :]
        total += tl.sum(tl.load(found + begin + k[:, None] * length + i[None, :], mask=inside, other=0), axis=0)
    tl.store(out + i, total, mask=i < length)


@triton.jit
def _scale(
    table, programs, factors,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    g, rows, columns, row, column, block = _piece(table, programs, GRADIENT, ALIGNED)
    i, j = block * HIGH + tl.arange(0, HIGH).to(tl.int64), tl.arange(0, WIDE).to(tl.int64)
    of_rows = tl.load(factors + row + i, mask=i < rows, other=0).to(tl.float32)[:, None]
    for at in range(0, columns, WIDE):
        inside = (i < rows)[:, None] & (at + j < columns)[None, :]
        of_columns = tl.load(factors + column + at + j, mask=at + j < columns, other=0).to(tl.float32)[None, :]
        here = g + i[:, None] * columns + (at + j)[None, :]
        x = tl.load(here, mask=inside, other=0).to(tl.float32)
        x = nearest(nearest(x * of_rows, GRADIENT) * of_columns, GRADIENT)
        tl.store(here, x.to(g.dtype.element_ty), mask=inside)
