"""The fused path on GPUs, in Triton: one launch a pass for all tensors of a batch, whatever their number and sizes.

The twin of `rules.py` and of `cpu.cpp`, and equal to them bit for bit where a GPU's float32 is: products and sums are
not contracted, division and square root round correctly, the sums that a step needs are taken in float64, and all in a
fixed order. Runs on CPU tensors in Triton's interpreter, which is how it is tested without a GPU.

A program of a step takes a chunk of one tensor, in tiles of ROWS rows of 32 weights: the blocks of int8 state. Tensors
are found by address, in a table made for each step, since gradients move. There is no autotuning: it would run a step
that writes in place several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from to_finetune.optim.blocks import keep_for_graphs, to_device
from to_finetune.optim.kernels.batch import Batch, Pieces

# As measured on an H200. Of a step: four weights for a thread in each tile, and few threads wait for each other.
ROWS, TILES, WARPS = 8, 64, 2
COMBINED = 1024  # chunks' sums that are added up at a time
HIGH, WIDE = 32, 128  # rows and columns of a gradient that are squared or scaled at a time
TALL = 512  # rows whose squares one program adds up, a multiple of HIGH
ADDED = 128  # rows or columns whose sums are added up by one program
AT_ONCE = 1 << 29  # elements of gradients that are squared in one launch
MANY_WARPS = 8

BLOCK, FOURS = tl.constexpr(32), tl.constexpr(8)
SMALLEST_DIVISOR = tl.constexpr(1e-30)
# 1.5 * 2^23 and its bits: a small integer more changes the last ones, which is faster than a conversion.
SHIFT, SHIFT_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)

FLOAT32, BFLOAT16, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GG, PEAK, UG, WW, VW, UU, UB, ERROR, SUMS = (tl.constexpr(k) for k in range(9))
COLUMNS, SCALARS, NUMEL, FIRST, KEY = (
    tl.constexpr(11),
    tl.constexpr(10),
    tl.constexpr(8),
    tl.constexpr(9),
    tl.constexpr(10),
)


def reduce(batch: Batch, weights: bool) -> Tensor:
    """The sums over gradients and, with `weights`, over weights and state: (tensors, 8) float64."""
    return _launch(_reduce, batch, batch.constants(), weights, None)


def update(batch: Batch, scalars: Tensor, weights: bool, skip: Tensor | None) -> Tensor:
    """One step in place, unless `skip`; returns sums as `reduce` does, with `weights` those of the new ones."""
    return _launch(_update, batch, scalars, weights, skip)


def _launch(kernel: Any, batch: Batch, scalars: Tensor, weights: bool, skip: Tensor | None) -> Tensor:
    device = batch.table.device
    variant, weight, gradient, state = batch.formats
    chunks, begin = _programs([-(-n // (ROWS * 32 * TILES)) for n in batch.numbers], device)
    # Zeros, for the sums that a program does not take.
    partial = torch.zeros(len(chunks), 8, dtype=torch.float64, device=device)
    sums = torch.empty(len(batch.params), 8, dtype=torch.float64, device=device)
    with torch.cuda.device_of(batch.table):  # Triton launches on the current device
        kernel[(len(chunks),)](
            batch.table,
            scalars,
            chunks,
            partial,
            skip if skip is not None else chunks,
            HAS_SKIP=skip is not None,
            RANK_ONE=bool(variant),
            WEIGHT=weight,
            GRADIENT=gradient,
            STATE=state,
            WEIGHTS_TOO=weights,
            ALIGNED=batch.aligned,
            ROWS=ROWS,
            TILES=TILES,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        combine = _combine[(len(batch.params),)]
        combine(partial, begin, sums, COMBINED=COMBINED, num_warps=MANY_WARPS, enable_fp_fusion=False)
    return sums


def _programs(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensor, chunk in it) of each program, int32, and the number of each tensor's first program, int64."""
    programs, begin = _made_programs(tuple(counts), device)
    keep_for_graphs(programs, begin)
    return programs, begin


@lru_cache(maxsize=256)
def _made_programs(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    chunks = torch.tensor(counts)
    begin = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    which = torch.repeat_interleave(torch.arange(len(counts)), chunks)
    programs = torch.stack([which, torch.arange(len(which)) - begin[which]], dim=1).int()
    return programs.to(device), begin.to(device)


def add_squares(pieces: Pieces, sums: Tensor) -> None:
    """Add to `sums`, float64, the squares of the rows and columns of contiguous pieces of one format.

    Each gradient is read once: a program takes TALL rows of a strip of WIDE columns, and a second launch adds up what
    they found, in order.
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
        blocks = [-(-rows // ADDED) for rows, _ in sizes]
        _launch_on_pieces(_combine_squares, blocks, pieces, *arrays, OF_COLUMNS=False, **more)
        for turn in sorted(set(turns[begin:end])):
            of_turn = [this == turn for this in turns[begin:end]]
            blocks = [-(-columns // ADDED) * now for (_, columns), now in zip(sizes, of_turn, strict=True)]
            _launch_on_pieces(_combine_squares, blocks, pieces, *arrays, OF_COLUMNS=True, **more)


def scale(pieces: Pieces, factors: Tensor) -> None:
    """Multiply each element by its row's and its column's factor, in place, rounded after each."""
    table = to_device(pieces.table, factors.device)
    _launch_on_pieces(_scale, [-(-rows // HIGH) for rows, _ in pieces.sizes], pieces, table, factors)


def _launch_on_pieces(
    kernel: Any, blocks: Sequence[int], pieces: Pieces, table: Tensor, *arrays: Tensor, **options: Any
) -> None:
    """A program for each of a piece's blocks."""
    programs, _ = _programs(blocks, table.device)
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
    """Runs of pieces that are squared in one launch, so that what it finds stays some 40 MB: AT_ONCE, or one larger."""
    begin, weights = 0, 0
    for i, (rows, columns) in enumerate(sizes):
        if i > begin and weights + rows * columns > AT_ONCE:
            yield begin, i
            begin, weights = i, 0
        weights += rows * columns
    if begin < len(sizes):
        yield begin, len(sizes)


def _places(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """Where `_square` puts the sums of each piece's rows and of its columns, (pieces, 2) int64, and their number."""
    places, count = _made_places(sizes, device)
    keep_for_graphs(places)
    return places, count


@lru_cache(maxsize=256)
def _made_places(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    counts = [x for rows, columns in sizes for x in (-(-columns // WIDE) * rows, -(-rows // TALL) * columns)]
    ends = torch.tensor([0, *counts]).cumsum(0)
    return ends[:-1].view(-1, 2).to(device), int(ends[-1])


# ---- Storage, as in ../state.py --------------------------------------------------------------------------------------


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random16(bits, STREAM: tl.constexpr):
    if STREAM == 1:
        return bits & 0xFFFF
    if STREAM == 2:
        bits = bits * 0x9E3779B1
    if STREAM == 3:
        bits = bits * 0x85EBCA77
    return bits >> 16


@triton.jit
def _address(table, row, column, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    return _pointer(tl.load(table + row * COLUMNS + column), FORMAT, ALIGNED)


@triton.jit
def _pointer(address, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    if FORMAT == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == BFLOAT16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # lets a thread load 16 bytes at a time
    return pointer


@triton.jit
def _exponents(table, row, which):
    address = tl.load(table + row * COLUMNS + 5 + which)
    return address.to(tl.pointer_type(tl.uint8))


@triton.jit
def _load_stored(pointer, offsets, n, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < n, other=0)
    return tl.load(pointer + offsets)


@triton.jit
def _load(pointer, offsets, n, MASKED: tl.constexpr):
    return _load_stored(pointer, offsets, n, MASKED).to(tl.float32)


@triton.jit
def _store(pointer, offsets, n, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, x, mask=offsets < n)
    else:
        tl.store(pointer + offsets, x)


@triton.jit
def _power(exponents):
    return (exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_state(pointer, exponents, offsets, blocks, n, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    if FORMAT != INT8:
        return _load(pointer, offsets, n, MASKED)
    codes = _load_stored(pointer, offsets, n, MASKED)
    x = (codes.to(tl.int32) + SHIFT_BITS).to(tl.float32, bitcast=True) - SHIFT
    e = tl.load(exponents + blocks, mask=blocks * BLOCK < n, other=0).to(tl.int32)
    return x * tl.abs(x) * _power(e)[:, None]


@triton.jit
def _rounded(x, random):
    """float32 rounded to bfloat16's numbers."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(x != x, bits, bits + random)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _store_values(pointer, offsets, n, x, random, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Store weights or state that is not int8; returns what is stored."""
    if FORMAT == BFLOAT16:
        x = _rounded(x, random)
        _store(pointer, offsets, n, x.to(tl.bfloat16), MASKED)
    else:
        _store(pointer, offsets, n, x, MASKED)
    return x


@triton.jit
def _store_state(pointer, exponents, offsets, blocks, n, x, random, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    if FORMAT != INT8:
        return _store_values(pointer, offsets, n, x, random, FORMAT, MASKED)
    if MASKED:
        x = tl.where(offsets < n, x, 0.0)
    bits = x.to(tl.int32, bitcast=True)
    peak = tl.max(bits & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    e = (tl.div_rn(peak, tl.full(peak.shape, 16129.0, tl.float32)).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    e = tl.where(peak <= 3.4e38, e, 255)
    inverse = tl.where(e < 254, _power(254 - tl.minimum(e, 254)), 0.0)
    finite = (e < 255)[:, None]
    y = tl.where(finite, tl.abs(x), 0.0) * inverse[:, None]
    root = tl.sqrt_rn(y)
    low = (root + SHIFT) - SHIFT  # the nearest integer
    low = tl.where(low > root, low - 1.0, low)
    u = ((random << 7) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0  # random / 2^16 + 2^-17
    code = low + tl.where(u * (2.0 * low + 1.0) < y - low * low, 1.0, 0.0)
    code = tl.where(bits < 0, -code, code)
    _store(pointer, offsets, n, (code + SHIFT).to(tl.int32, bitcast=True).to(tl.int8), MASKED)
    tl.store(exponents + blocks, e.to(tl.uint8), mask=blocks * BLOCK < n)
    return code * tl.abs(code) * _power(e)[:, None]


# ---- The rules -------------------------------------------------------------------------------------------------------


@triton.jit
def _diagonal(w, g, a, b, s):
    lr, decay, beta, keep = tl.load(s), tl.load(s + 1), tl.load(s + 4), tl.load(s + 5)
    alpha, room = tl.load(s + 6), tl.load(s + 7)
    q = tl.maximum(w * w, SMALLEST_DIVISOR)
    guarded = tl.minimum(tl.div_rn(tl.zeros_like(q) + room, q), alpha)
    target = g - a * w
    r = b - target
    a = a - guarded * w * r
    b = keep * b + beta * target
    G = a * w + b
    return (w - lr * G) - decay * w, a, b, G


@triton.jit
def _rank_one(w, g, u, v, b, scalars):
    lr, decay, beta, keep = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 4), tl.load(scalars + 5)
    s, s_new, u_gain, v_gain = (
        tl.load(scalars + 6),
        tl.load(scalars + 7),
        tl.load(scalars + 8),
        tl.load(scalars + 9),
    )
    target = g - s * u
    r = b - target
    u = u - u_gain * r
    v = v - v_gain * w
    b = keep * b + beta * target
    G = s_new * u + b
    return (w - lr * G) - decay * w, u, v, b, G


# ---- The two passes --------------------------------------------------------------------------------------------------


@triton.jit
def _place(table, chunks, WEIGHTS: tl.constexpr):
    """This program's row in the table, its first weight there, and the number of weights of the tensor."""
    pid = tl.program_id(0)
    row = tl.load(chunks + 2 * pid).to(tl.int64)
    begin = tl.load(chunks + 2 * pid + 1).to(tl.int64) * WEIGHTS
    return row, begin, tl.load(table + row * COLUMNS + NUMEL)


@triton.jit
def _store_weight_sums(out, ww, vw, uu, ub):
    tl.store(out + WW, tl.sum(ww))
    tl.store(out + VW, tl.sum(vw))
    tl.store(out + UU, tl.sum(uu))
    tl.store(out + UB, tl.sum(ub))


@triton.jit
def _fours(x):
    """A tile by fours, which one thread holds: what is added up there needs no other thread."""
    return tl.reshape(x, (x.shape[0], FOURS, 4))


@triton.jit
def _add(total, x):
    return total + tl.sum(_fours(x.to(tl.float64)), axis=2)


@triton.jit
def _add_roughly(total, x):
    """Fours in float32: for what is shown, and no step needs."""
    return total + tl.sum(_fours(x), axis=2).to(tl.float64)


@triton.jit
def _update_tile(
    table, s, row, start, n, key, totals,
    RANK_ONE: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    WEIGHTS_TOO: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    gg, ww, vw, uu, ub, error = totals
    rows = tl.arange(0, totals[0].shape[0])
    offsets = start + (rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    blocks = start // BLOCK + rows
    wp = _address(table, row, 0, WEIGHT, ALIGNED)
    gp = _address(table, row, 1, GRADIENT, ALIGNED)
    p0, e0 = _address(table, row, 2, STATE, ALIGNED), _exponents(table, row, 0)
    p1, e1 = _address(table, row, 3, STATE, ALIGNED), _exponents(table, row, 1)
    w = _load(wp, offsets, n, MASKED)
    g = (_load(gp, offsets, n, MASKED) + tl.load(s + 2) * w) * tl.load(s + 3)
    x0 = _load_state(p0, e0, offsets, blocks, n, STATE, MASKED)
    x1 = _load_state(p1, e1, offsets, blocks, n, STATE, MASKED)
    bits = _mix(offsets.to(tl.uint32) + key)
    if RANK_ONE:
        p2, e2 = _address(table, row, 4, STATE, ALIGNED), _exponents(table, row, 2)
        x2 = _load_state(p2, e2, offsets, blocks, n, STATE, MASKED)
        w, x0, x1, x2, G = _rank_one(w, g, x0, x1, x2, s)
        x2 = _store_state(p2, e2, offsets, blocks, n, x2, _random16(bits, 3), STATE, MASKED)
    else:
        w, x0, x1, G = _diagonal(w, g, x0, x1, s)
    w = _store_values(wp, offsets, n, w, _random16(bits, 0), WEIGHT, MASKED)
    x0 = _store_state(p0, e0, offsets, blocks, n, x0, _random16(bits, 1), STATE, MASKED)
    x1 = _store_state(p1, e1, offsets, blocks, n, x1, _random16(bits, 2), STATE, MASKED)
    difference = G - g
    if MASKED:
        inside = offsets < n
        difference, g = tl.where(inside, difference, 0.0), tl.where(inside, g, 0.0)
        w, x0, x1 = tl.where(inside, w, 0.0), tl.where(inside, x0, 0.0), tl.where(inside, x1, 0.0)
    error = _add_roughly(error, difference * difference)
    gg = _add_roughly(gg, g * g)
    if WEIGHTS_TOO:
        ww = _add(ww, w.to(tl.float64) * w.to(tl.float64))
        if RANK_ONE:
            vw = _add(vw, x1.to(tl.float64) * w.to(tl.float64))
            uu = _add(uu, x0.to(tl.float64) * x0.to(tl.float64))
            ub = _add(ub, x0.to(tl.float64) * x2.to(tl.float64))
    return gg, ww, vw, uu, ub, error


@triton.jit
def _reduce_tile(
    table, s, row, start, n, totals,
    RANK_ONE: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    WEIGHTS_TOO: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    gg, peak, ug, ww, vw, uu, ub = totals
    rows = tl.arange(0, totals[0].shape[0])
    offsets = start + (rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    blocks = start // BLOCK + rows
    wp = _address(table, row, 0, WEIGHT, ALIGNED)
    g = _load(_address(table, row, 1, GRADIENT, ALIGNED), offsets, n, MASKED)
    decay = tl.load(s + 2)
    if decay != 0:
        g = g + decay * _load(wp, offsets, n, MASKED)
    magnitude = tl.max(_fours(g.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=2)
    peak = tl.maximum(peak, magnitude)
    gg = _add(gg, g.to(tl.float64) * g.to(tl.float64))
    if RANK_ONE:
        u = _load_state(
            _address(table, row, 2, STATE, ALIGNED), _exponents(table, row, 0), offsets, blocks, n, STATE, MASKED
        )
        ug = _add(ug, u.to(tl.float64) * g.to(tl.float64) * tl.load(s + 3).to(tl.float64))
    if WEIGHTS_TOO:
        w = _load(wp, offsets, n, MASKED)
        ww = _add(ww, w.to(tl.float64) * w.to(tl.float64))
        if RANK_ONE:
            v = _load_state(
                _address(table, row, 3, STATE, ALIGNED), _exponents(table, row, 1),
                offsets, blocks, n, STATE, MASKED,
            )  # fmt: skip
            b = _load_state(
                _address(table, row, 4, STATE, ALIGNED), _exponents(table, row, 2),
                offsets, blocks, n, STATE, MASKED,
            )  # fmt: skip
            vw = _add(vw, v.to(tl.float64) * w.to(tl.float64))
            uu = _add(uu, u.to(tl.float64) * u.to(tl.float64))
            ub = _add(ub, u.to(tl.float64) * b.to(tl.float64))
    return gg, peak, ug, ww, vw, uu, ub


@triton.jit
def _update(
    table, scalars, chunks, partial, skip,
    HAS_SKIP: tl.constexpr, RANK_ONE: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    WEIGHTS_TOO: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP and tl.load(skip) != 0:
        return
    row, begin, n = _place(table, chunks, ROWS * BLOCK * TILES)
    key = (tl.load(table + row * COLUMNS + KEY) + tl.load(table + row * COLUMNS + FIRST)).to(tl.uint32)
    s = scalars + row * SCALARS
    zero = tl.zeros((ROWS, FOURS), tl.float64)
    gg, ww, vw, uu, ub, error = zero, zero, zero, zero, zero, zero
    for tile in range(TILES):
        start = begin + tile * ROWS * BLOCK
        if start + ROWS * BLOCK <= n:
            gg, ww, vw, uu, ub, error = _update_tile(
                table, s, row, start, n, key, (gg, ww, vw, uu, ub, error),
                RANK_ONE, WEIGHT, GRADIENT, STATE, WEIGHTS_TOO, ALIGNED, False,
            )  # fmt: skip
        elif start < n:
            gg, ww, vw, uu, ub, error = _update_tile(
                table, s, row, start, n, key, (gg, ww, vw, uu, ub, error),
                RANK_ONE, WEIGHT, GRADIENT, STATE, WEIGHTS_TOO, ALIGNED, True,
            )  # fmt: skip
    out = partial + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(out + GG, tl.sum(gg))
    tl.store(out + ERROR, tl.sum(error))
    if WEIGHTS_TOO:
        _store_weight_sums(out, ww, vw, uu, ub)


@triton.jit
def _reduce(
    table, scalars, chunks, partial, skip,
    HAS_SKIP: tl.constexpr, RANK_ONE: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    WEIGHTS_TOO: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, begin, n = _place(table, chunks, ROWS * BLOCK * TILES)
    s = scalars + row * SCALARS
    zero = tl.zeros((ROWS, FOURS), tl.float64)
    gg, peak, ug, ww, vw, uu, ub = zero, tl.zeros((ROWS, FOURS), tl.int32), zero, zero, zero, zero, zero
    for tile in range(TILES):
        start = begin + tile * ROWS * BLOCK
        if start + ROWS * BLOCK <= n:
            gg, peak, ug, ww, vw, uu, ub = _reduce_tile(
                table, s, row, start, n, (gg, peak, ug, ww, vw, uu, ub),
                RANK_ONE, WEIGHT, GRADIENT, STATE, WEIGHTS_TOO, ALIGNED, False,
            )  # fmt: skip
        elif start < n:
            gg, peak, ug, ww, vw, uu, ub = _reduce_tile(
                table, s, row, start, n, (gg, peak, ug, ww, vw, uu, ub),
                RANK_ONE, WEIGHT, GRADIENT, STATE, WEIGHTS_TOO, ALIGNED, True,
            )  # fmt: skip
    out = partial + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(out + GG, tl.sum(gg))
    tl.store(out + PEAK, tl.max(peak).to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(out + UG, tl.sum(ug))
    if WEIGHTS_TOO:
        _store_weight_sums(out, ww, vw, uu, ub)


@triton.jit
def _combine(partial, begin, sums, COMBINED: tl.constexpr):
    """Add up the sums of each tensor's chunks, in order."""
    row = tl.program_id(0)
    first, last = tl.load(begin + row), tl.load(begin + row + 1)
    column = tl.arange(0, SUMS)
    total, peak = tl.zeros((SUMS,), tl.float64), tl.zeros((SUMS,), tl.float64)
    for i in range(first, last, COMBINED):
        chunk = i + tl.arange(0, COMBINED)
        found = tl.load(partial + chunk[:, None] * SUMS + column[None, :], mask=(chunk < last)[:, None], other=0.0)
        total += tl.sum(found, axis=0)
        peak = tl.maximum(peak, tl.max(found, axis=0))
    tl.store(sums + row * SUMS + column, tl.where(column == PEAK, peak, total))


# ---- Rows and columns of gradients that weigh alike: factored.py -----------------------------------------------------


@triton.jit
def _piece(table, programs, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's piece (its gradient, rows and columns, and the places of the first ones), and its block there."""
    pid = tl.program_id(0)
    piece = table + tl.load(programs + 2 * pid).to(tl.int64) * 5
    columns = tl.load(piece + 2)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    g = _pointer(tl.load(piece), GRADIENT, ALIGNED)
    return g, tl.load(piece + 1), columns, tl.load(piece + 3), tl.load(piece + 4), tl.load(programs + 2 * pid + 1)


@triton.jit
def _square(
    table, programs, places, found,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """Of a strip of columns and some of its rows: each row's sum of squares, and each column's."""
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
    """Add what `_square` found of some rows, or columns, of a piece to their sums."""
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
def _nearest(x, FORMAT: tl.constexpr):
    """float32 rounded to the numbers of a format, ties to even."""
    if FORMAT == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, bits, bits + 0x7FFF + (bits >> 16 & 1))
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x


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
        x = _nearest(_nearest(x * of_rows, GRADIENT) * of_columns, GRADIENT)
        tl.store(here, x.to(g.dtype.element_ty), mask=inside)
