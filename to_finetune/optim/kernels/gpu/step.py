"""The fused path on GPUs, in Triton: one launch per pass for all tensors of a batch, whatever their number and sizes.

Equal to `rules.py` and `cpu.cpp` bit for bit, as far as a GPU's float32 is: products and sums are not contracted,
division is correctly rounded, the sums that a step needs are accumulated in float64, and all sums are taken in a fixed
order. Also runs on CPU tensors in Triton's interpreter, which is how it is tested without a GPU.

A program of a step takes a chunk of one tensor, in tiles of ROWS rows of 32 weights: the blocks of int8 state. Tensors
are found by address, in a table made for each step, since gradients move. There is no autotuning, as it would run an
in-place step several times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from to_finetune.optim.kernels import batch as layout
from to_finetune.optim.kernels.batch import Batch
from to_finetune.optim.kernels.gpu.programs import programs_of
from to_finetune.optim.kernels.gpu.storage import (
    BLOCK,
    LARGEST_DIVISOR,
    divide,
    load,
    load_state,
    mix,
    pointer,
    random16,
    store_state,
    store_values,
)
from to_finetune.optim.kernels.gpu.sums import COLUMNS, NUMEL, PEAK, SCALARS, SMALLEST_DIVISOR, combined, store_sums

# Chosen by measurement on an H200: four weights per thread in each tile, and few threads that wait for each other.
ROWS, TILES, WARPS = 8, 64, 2
AT_ONCE = 4  # tiles that `_reduce` reads as one: it reads few bytes per weight, and needs many on their way

FOURS = tl.constexpr(8)
FIRST, KEY = tl.constexpr(layout.FIRST), tl.constexpr(layout.KEY)


def reduce(batch: Batch, weights: bool) -> Tensor:
    """Return the sums over gradients and, with `weights`, over weights and state: (tensors, 8) float64."""
    return combined(batch, *_launch(_reduce, batch, batch.constants(), weights, None))


def update(batch: Batch, scalars: Tensor, weights: bool, skip: Tensor | None) -> Tensor:
    """Take one step in place, unless `skip`; return sums as `reduce` does, with `weights` over the new ones."""
    return combined(batch, *_launch(_update, batch, scalars, weights, skip))


def measure_and_update(batch: Batch, scalars: Tensor, weights: bool, held: Tensor | None) -> Tensor:
    """Do both passes of a batch in which each tensor is a block; combining the sums also computes the scalars."""
    if held is None or batch.needs_gradient_sums:
        found = _launch(_reduce, batch, scalars, weights and held is None, None)
    else:  # `held` has all that is needed: no program's sums are added to it
        found = held, torch.zeros(len(batch.params) + 1, dtype=torch.int64, device=held.device)
    measured = combined(batch, *found, scalars, held)
    sums = update(batch, scalars, weights, None)
    if batch.group["grad_scale"] is not None:  # otherwise PEAK is not used
        sums[:, PEAK.value] = measured[:, PEAK.value]
    return sums


def _launch(kernel: Any, batch: Batch, scalars: Tensor, weights: bool, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch one pass; return the sums of each program, (programs, 8) float64, and each tensor's first program."""
    variant, weight, gradient, state = batch.formats
    chunks, begin = programs_of(batch.numbers, batch.table.device, ROWS * 32 * TILES)
    at_once = AT_ONCE if kernel is _reduce else 1
    new = torch.empty if skip is None else torch.zeros  # a program that skips writes no sums
    partial = new(len(chunks), 8, dtype=torch.float64, device=batch.table.device)
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
            ROWS=ROWS * at_once,
            TILES=TILES // at_once,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return partial, begin


# ---- The rules -------------------------------------------------------------------------------------------------------


@triton.jit
def _diagonal(w, g, a, b, scalars):
    lr, decay, _, _, beta, keep, alpha, room, _, _ = scalars
    q = tl.minimum(tl.maximum(w * w, SMALLEST_DIVISOR), LARGEST_DIVISOR)
    guarded = tl.minimum(divide(tl.zeros_like(q) + room, q), alpha)
    target = g - a * w
    r = b - target
    a = a - guarded * w * r
    b = keep * b + beta * target
    G = a * w + b
    return (w - lr * G) - decay * w, a, b, G


@triton.jit
def _rank_one(w, g, u, v, b, scalars):
    lr, decay, _, _, beta, keep, s, s_new, u_gain, v_gain = scalars
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
    """Load this program's row in the table, its first weight in that tensor, and the number of its weights."""
    pid = tl.program_id(0)
    row = tl.load(chunks + 2 * pid).to(tl.int64)
    begin = tl.load(chunks + 2 * pid + 1).to(tl.int64) * WEIGHTS
    return row, begin, tl.minimum(tl.load(table + row * COLUMNS + NUMEL) - begin, WEIGHTS).to(tl.int32)


@triton.jit
def _addresses(
    table, row, begin, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Load the addresses of this program's weights, gradients, three states and their exponents from the table."""
    t, block = table + row * COLUMNS, begin // BLOCK
    w, g = pointer(tl.load(t), WEIGHT, ALIGNED) + begin, pointer(tl.load(t + 1), GRADIENT, ALIGNED) + begin
    x0, x1, x2 = (
        pointer(tl.load(t + 2), STATE, ALIGNED) + begin,
        pointer(tl.load(t + 3), STATE, ALIGNED) + begin,
        pointer(tl.load(t + 4), STATE, ALIGNED) + begin,
    )
    e0, e1, e2 = (
        tl.load(t + 5).to(tl.pointer_type(tl.uint8)) + block,
        tl.load(t + 6).to(tl.pointer_type(tl.uint8)) + block,
        tl.load(t + 7).to(tl.pointer_type(tl.uint8)) + block,
    )
    return w, g, x0, x1, x2, e0, e1, e2


@triton.jit
def _scalars(s):
    """Load a tensor's scalars, in the order of batch.py."""
    return (
        tl.load(s),
        tl.load(s + 1),
        tl.load(s + 2),
        tl.load(s + 3),
        tl.load(s + 4),
        tl.load(s + 5),
        tl.load(s + 6),
        tl.load(s + 7),
        tl.load(s + 8),
        tl.load(s + 9),
    )


@triton.jit
def _fours(x):
    """Reshape a tile to groups of four, each held by one thread: summing a group involves no other thread."""
    return tl.reshape(x, (x.shape[0], FOURS, 4))


@triton.jit
def _doubles(x):
    """Return the first, second, third and fourth of each group of four, in float64."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], FOURS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first.to(tl.float64), second.to(tl.float64), third.to(tl.float64), fourth.to(tl.float64)


@triton.jit
def _add_products(total, x, y):
    """Add up groups of four products of float32, which are exact in float64."""
    x0, x1, x2, x3 = x
    y0, y1, y2, y3 = y
    return tl.fma(x3, y3, tl.fma(x2, y2, tl.fma(x1, y1, tl.fma(x0, y0, total))))


@triton.jit
def _add_roughly(total, x):
    """Add up groups of four in float32: for diagnostics, which no step depends on."""
    return total + tl.sum(_fours(x), axis=2).to(tl.float64)


@triton.jit
def _update_tile(
    addresses, scalars, start, n, key, totals,
    RANK_ONE: tl.constexpr, WEIGHT: tl.constexpr, STATE: tl.constexpr, WEIGHTS_TOO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    gg, ww, vw, uu, ub, error = totals
    wp, gp, p0, p1, p2, e0, e1, e2 = addresses
    _, _, weight_decay, factor, _, _, _, _, _, _ = scalars
    rows = tl.arange(0, gg.shape[0])
    offsets = start + (rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    blocks = start // BLOCK + rows
    w = load(wp, offsets, n, MASKED)
    g = (load(gp, offsets, n, MASKED) + weight_decay * w) * factor
    x0 = load_state(p0, e0, offsets, blocks, n, STATE, MASKED)
    x1 = load_state(p1, e1, offsets, blocks, n, STATE, MASKED)
    bits = mix(offsets.to(tl.uint32) + key)
    if RANK_ONE:
        x2 = load_state(p2, e2, offsets, blocks, n, STATE, MASKED)
        w, x0, x1, x2, G = _rank_one(w, g, x0, x1, x2, scalars)
        x2 = store_state(p2, e2, offsets, blocks, n, x2, random16(bits, 3), STATE, MASKED)
    else:
        w, x0, x1, G = _diagonal(w, g, x0, x1, scalars)
    w = store_values(wp, offsets, n, w, random16(bits, 0), WEIGHT, MASKED)
    x0 = store_state(p0, e0, offsets, blocks, n, x0, random16(bits, 1), STATE, MASKED)
    x1 = store_state(p1, e1, offsets, blocks, n, x1, random16(bits, 2), STATE, MASKED)
    difference = G - g
    if MASKED:
        inside = offsets < n
        difference, g = tl.where(inside, difference, 0.0), tl.where(inside, g, 0.0)
        w, x0, x1 = tl.where(inside, w, 0.0), tl.where(inside, x0, 0.0), tl.where(inside, x1, 0.0)
    error = _add_roughly(error, difference * difference)
    gg = _add_roughly(gg, g * g)
    if WEIGHTS_TOO:
        w64 = _doubles(w)
        ww = _add_products(ww, w64, w64)
        if RANK_ONE:
            u64 = _doubles(x0)
            vw = _add_products(vw, _doubles(x1), w64)
            uu = _add_products(uu, u64, u64)
            ub = _add_products(ub, u64, _doubles(x2))
    return gg, ww, vw, uu, ub, error


@triton.jit
def _reduce_tile(
    addresses, scalars, start, n, totals,
    RANK_ONE: tl.constexpr, STATE: tl.constexpr, WEIGHTS_TOO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    gg, peak, ug, ww, vw, uu, ub = totals
    wp, gp, p0, p1, p2, e0, e1, e2 = addresses
    _, _, weight_decay, _, _, _, _, _, _, _ = scalars
    rows = tl.arange(0, gg.shape[0])
    offsets = start + (rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    blocks = start // BLOCK + rows
    g = load(gp, offsets, n, MASKED)
    if weight_decay != 0:
        g = g + weight_decay * load(wp, offsets, n, MASKED)
    magnitude = tl.max(_fours(g.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=2)
    peak = tl.maximum(peak, magnitude)
    g64 = _doubles(g)
    gg = _add_products(gg, g64, g64)
    if RANK_ONE:
        u64 = _doubles(load_state(p0, e0, offsets, blocks, n, STATE, MASKED))
        ug = _add_products(ug, u64, g64)
    if WEIGHTS_TOO:
        w64 = _doubles(load(wp, offsets, n, MASKED))
        ww = _add_products(ww, w64, w64)
        if RANK_ONE:
            vw = _add_products(vw, _doubles(load_state(p1, e1, offsets, blocks, n, STATE, MASKED)), w64)
            uu = _add_products(uu, u64, u64)
            ub = _add_products(ub, u64, _doubles(load_state(p2, e2, offsets, blocks, n, STATE, MASKED)))
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
    key = (tl.load(table + row * COLUMNS + KEY) + tl.load(table + row * COLUMNS + FIRST) + begin).to(tl.uint32)
    # Loaded before the loop: inside it, every tile would load them again, since tiles write to memory.
    addresses = _addresses(table, row, begin, WEIGHT, GRADIENT, STATE, ALIGNED)
    own = _scalars(scalars + row * SCALARS)
    zero = tl.zeros((ROWS, FOURS), tl.float64)
    gg, ww, vw, uu, ub, error = zero, zero, zero, zero, zero, zero
    for tile in range(TILES):
        start = tile * ROWS * BLOCK
        if start + ROWS * BLOCK <= n:
            gg, ww, vw, uu, ub, error = _update_tile(
                addresses, own, start, n, key, (gg, ww, vw, uu, ub, error), RANK_ONE, WEIGHT, STATE, WEIGHTS_TOO, False
            )
        elif start < n:
            gg, ww, vw, uu, ub, error = _update_tile(
                addresses, own, start, n, key, (gg, ww, vw, uu, ub, error), RANK_ONE, WEIGHT, STATE, WEIGHTS_TOO, True
            )
    store_sums(partial, gg, tl.zeros((ROWS, FOURS), tl.int32), zero, ww, vw, uu, ub, error)


@triton.jit
def _reduce(
    table, scalars, chunks, partial, skip,
    HAS_SKIP: tl.constexpr, RANK_ONE: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    WEIGHTS_TOO: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, begin, n = _place(table, chunks, ROWS * BLOCK * TILES)
    # Loaded before the loop, as in `_update`.
    addresses = _addresses(table, row, begin, WEIGHT, GRADIENT, STATE, ALIGNED)
    own = _scalars(scalars + row * SCALARS)
    zero = tl.zeros((ROWS, FOURS), tl.float64)
    gg, peak, ug, ww, vw, uu, ub = zero, tl.zeros((ROWS, FOURS), tl.int32), zero, zero, zero, zero, zero
    for tile in range(TILES):
        start = tile * ROWS * BLOCK
        if start + ROWS * BLOCK <= n:
            gg, peak, ug, ww, vw, uu, ub = _reduce_tile(
                addresses, own, start, n, (gg, peak, ug, ww, vw, uu, ub), RANK_ONE, STATE, WEIGHTS_TOO, False
            )
        elif start < n:
            gg, peak, ug, ww, vw, uu, ub = _reduce_tile(
                addresses, own, start, n, (gg, peak, ug, ww, vw, uu, ub), RANK_ONE, STATE, WEIGHTS_TOO, True
            )
    _, _, _, factor, _, _, _, _, _, _ = own
    store_sums(partial, gg, peak, ug * factor.to(tl.float64), ww, vw, uu, ub, zero)
