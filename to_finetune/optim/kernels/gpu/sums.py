"""The sums of a step: the programs' are combined into the tensors', and these into the scalars of the update."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from to_finetune.optim import blocks, rules
from to_finetune.optim.kernels import batch as layout
from to_finetune.optim.kernels.batch import Batch
from to_finetune.optim.kernels.gpu.programs import MANY_WARPS

COMBINED = 512  # the number of programs whose sums are added up at a time

SMALLEST_DIVISOR = tl.constexpr(rules.SMALLEST_DIVISOR)
GG, PEAK, UG, WW, VW, UU, UB, ERROR, SUMS = (tl.constexpr(k) for k in range(blocks.SUMS + 1))
COLUMNS, NUMEL = tl.constexpr(layout.COLUMNS), tl.constexpr(layout.NUMEL)
SCALARS, FACTOR, OWN = tl.constexpr(layout.SCALARS), tl.constexpr(layout.FACTOR), tl.constexpr(layout.OWN)


def combined(
    batch: Batch, partial: Tensor, begin: Tensor, scalars: Tensor | None = None, held: Tensor | None = None
) -> Tensor:
    """Combine the sums per tensor; if given, `held` provides WW to UB, and the dependent `scalars` are written."""
    sums = torch.empty(len(batch.params), blocks.SUMS, dtype=torch.float64, device=partial.device)
    with torch.cuda.device_of(partial):
        _combine[(len(batch.params),)](
            partial,
            begin,
            sums,
            batch.table,
            sums if scalars is None else scalars,
            sums if held is None else held,
            FINISH=scalars is not None,
            HELD=held is not None,
            RANK_ONE=batch.is_rank_one,
            RMS=batch.group["grad_scale"] is not None,
            RELATIVE=batch.group["relative_alpha"],
            COMBINED=COMBINED,
            num_warps=MANY_WARPS,
            enable_fp_fusion=False,
        )
    return sums


@triton.jit
def store_sums(partial, gg, peak, ug, ww, vw, uu, ub, error):
    out = partial + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(out + GG, tl.sum(gg))
    tl.store(out + PEAK, tl.max(peak).to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(out + UG, tl.sum(ug))
    tl.store(out + WW, tl.sum(ww))
    tl.store(out + VW, tl.sum(vw))
    tl.store(out + UU, tl.sum(uu))
    tl.store(out + UB, tl.sum(ub))
    tl.store(out + ERROR, tl.sum(error))


@triton.jit
def _combine(
    partial, begin, sums, table, scalars, held,
    FINISH: tl.constexpr, HELD: tl.constexpr, RANK_ONE: tl.constexpr, RMS: tl.constexpr, RELATIVE: tl.constexpr,
    COMBINED: tl.constexpr,
):  # fmt: skip
    """Add up the sums of each tensor's chunks, in order."""
    row = tl.program_id(0)
    first, last = tl.load(begin + row), tl.load(begin + row + 1)
    column = tl.arange(0, SUMS)
    totals = tl.zeros((COMBINED, SUMS), tl.float64)
    for i in range(first, last, COMBINED):
        chunk = i + tl.arange(0, COMBINED)
        found = tl.load(partial + chunk[:, None] * SUMS + column[None, :], mask=(chunk < last)[:, None], other=0.0)
        totals = tl.where((column == PEAK)[None, :], tl.maximum(totals, found), totals + found)
    total = tl.where(column == PEAK, tl.max(totals, axis=0), tl.sum(totals, axis=0))
    if HELD:
        total = tl.where((column >= WW) & (column < ERROR), tl.load(held + row * SUMS + column), total)
    if FINISH:
        n = tl.load(table + row * COLUMNS + NUMEL)
        total = _finish(scalars + row * SCALARS, n, total, RANK_ONE, RMS, RELATIVE)
    tl.store(sums + row * SUMS + column, total)


@triton.jit
def _at(sums, COLUMN: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SUMS) == COLUMN, sums, 0.0), axis=0)


@triton.jit
def _positive(x):
    return tl.where(x < SMALLEST_DIVISOR, SMALLEST_DIVISOR, x)


@triton.jit
def _finish(s, n, sums, RANK_ONE: tl.constexpr, RMS: tl.constexpr, RELATIVE: tl.constexpr):
    """Compute the scalars of a block's step from its sums: rules.rms_factor, relative and rank_one_scalars."""
    if RMS:
        factor = (tl.sqrt(n.to(tl.float64)) / _positive(tl.sqrt(_at(sums, GG)))).to(tl.float32)
        tl.store(s + FACTOR, tl.load(s + FACTOR) * factor)
        column = tl.arange(0, SUMS)
        sums = tl.where((column == UG) | (column == PEAK), sums * factor.to(tl.float64), sums)
    ww, alpha, room = _at(sums, WW), tl.load(s + OWN), tl.load(s + OWN + 1)
    if RANK_ONE:
        vw, uu = _at(sums, VW).to(tl.float32), _at(sums, UU).to(tl.float32)
        ub, ug, w2 = _at(sums, UB).to(tl.float32), _at(sums, UG).to(tl.float32), ww.to(tl.float32)
        c = vw * uu + ub - ug
        q = vw * vw + uu * w2
        if RELATIVE:
            alpha = tl.div_rn(alpha, _positive(tl.maximum(q, tl.div_rn(w2, n.to(tl.float32)))))
        guarded = tl.div_rn(room, _positive(q))
        alpha = tl.where(guarded < alpha, guarded, alpha)
        tl.store(s + OWN, vw)
        tl.store(s + OWN + 1, vw - alpha * c * w2)
        tl.store(s + OWN + 2, alpha * vw)
        tl.store(s + OWN + 3, alpha * c)
    elif RELATIVE:
        tl.store(s + OWN, tl.div_rn(alpha, _positive((ww / n.to(tl.float64)).to(tl.float32))))
    return sums
