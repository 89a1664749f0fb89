"""Reading and writing numbers in the kernels, in the formats of `state.py`.

`FORMAT` is a value of `batch.FORMATS`; offsets and `n` count elements, and with `MASKED` none from n on is touched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

from to_finetune.optim import state
from to_finetune.optim.kernels.batch import FORMATS

LARGEST_DIVISOR = tl.constexpr(2.0**125)  # whose inverse is a normal float32
BLOCK = tl.constexpr(state.BLOCK)  # weights in a block of int8 state
FLOAT32, BFLOAT16, INT8 = map(tl.constexpr, FORMATS.values())
# 1.5 * 2^23 and its bits: adding a small integer adds it to the last bits, which is faster than a conversion.
SHIFT, SHIFT_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
# Bits of float32: 127^2's mantissa (127^2 is 1.97 2^13), 127^2 times half the smallest number, and 3.4e38.
SQUARE_MANTISSA, HALF_A_STEP, LARGEST_PEAK = tl.constexpr(0x7C0400), tl.constexpr(8064), tl.constexpr(0x7F7FC99E)


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


HAS_PTX = tl.constexpr(isinstance(mix, JITFunction) and torch.version.hip is None)  # not in the interpreter


@triton.jit
def divide(x, y):
    """Divide, correctly rounded, by a divisor from 1e-30 to LARGEST_DIVISOR.

    On NVIDIA's GPUs these are the instructions of `tl.div_rn` without its check for other divisors, which takes as long
    again. An infinite `x` gives NaN.
    """
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 inverse, minus, error, near;
            rcp.approx.ftz.f32 inverse, $2;
            neg.f32 minus, $2;
            fma.rn.f32 error, minus, inverse, 0f3F800000;
            fma.rn.f32 inverse, inverse, error, inverse;
            mul.rn.f32 near, $1, inverse;
            fma.rn.f32 error, minus, near, $1;
            fma.rn.f32 $0, inverse, error, near;
            }""",
            "=f,f,f",
            [x, y],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.div_rn(x, y)


@triton.jit
def random16(bits, STREAM: tl.constexpr):
    if STREAM == 1:
        return bits & 0xFFFF
    if STREAM == 2:
        bits = bits * 0x9E3779B1
    if STREAM == 3:
        bits = bits * 0x85EBCA77
    return bits >> 16


@triton.jit
def pointer(address, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    if FORMAT == FLOAT32:
        typed = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == BFLOAT16:
        typed = address.to(tl.pointer_type(tl.bfloat16))
    else:
        typed = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)  # lets a thread load 16 bytes at a time
    return typed


@triton.jit
def load_stored(pointer, offsets, n, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < n, other=0)
    return tl.load(pointer + offsets)


@triton.jit
def load(pointer, offsets, n, MASKED: tl.constexpr):
    return load_stored(pointer, offsets, n, MASKED).to(tl.float32)


@triton.jit
def store(pointer, offsets, n, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, x, mask=offsets < n)
    else:
        tl.store(pointer + offsets, x)


@triton.jit
def _power(exponents):
    return (exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def _blocks_of(n):
    return (n + BLOCK - 1) // BLOCK


@triton.jit
def _exponent(peak):
    """Return the smallest e with peak <= 127^2 2^(e - 127), given the bits of the peak; 255 if it is not finite."""
    e = ((peak + 0x7FFFFF - SQUARE_MANTISSA) >> 23) - 13
    e = tl.where(peak > HALF_A_STEP, tl.maximum(e, 1), 0)
    return tl.where(peak <= LARGEST_PEAK, e, 255)


@triton.jit
def load_state(pointer, exponents, offsets, blocks, n, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    if FORMAT != INT8:
        return load(pointer, offsets, n, MASKED)
    codes = load_stored(pointer, offsets, n, MASKED)
    x = (codes.to(tl.int32) + SHIFT_BITS).to(tl.float32, bitcast=True) - SHIFT
    e = load_stored(exponents, blocks, _blocks_of(n), MASKED).to(tl.int32)
    return x * tl.abs(x) * _power(e)[:, None]


@triton.jit
def _rounded(x, random):
    """Round float32 stochastically to values of bfloat16."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(x != x, bits, bits + random)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x, FORMAT: tl.constexpr):
    """Round float32 to the nearest values of a format, ties to even."""
    if FORMAT == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, bits, bits + 0x7FFF + (bits >> 16 & 1))
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def store_values(pointer, offsets, n, x, random, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Store weights, or state that is not int8; return the stored values."""
    if FORMAT == BFLOAT16:
        x = _rounded(x, random)
        bits = x.to(tl.uint32, bitcast=True) >> 16
        store(pointer, offsets, n, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), MASKED)
    else:
        store(pointer, offsets, n, x, MASKED)
    return x


@triton.jit
def store_state(pointer, exponents, offsets, blocks, n, x, random, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    if FORMAT != INT8:
        return store_values(pointer, offsets, n, x, random, FORMAT, MASKED)
    if MASKED:
        x = tl.where(offsets < n, x, 0.0)
    bits = x.to(tl.int32, bitcast=True)
    e = _exponent(tl.max(bits & 0x7FFFFFFF, axis=1))
    inverse = tl.where(e < 254, _power(254 - tl.minimum(e, 254)), 0.0)
    finite = (e < 255)[:, None]
    y = tl.where(finite, tl.abs(x), 0.0) * inverse[:, None]
    low = (tl.sqrt(y) + SHIFT) - SHIFT  # the integer nearest to the root, of which a GPU may get the last bits wrong
    low = tl.where(low * low > y, low - 1.0, low)  # the largest one whose square is at most y, exactly
    u = ((random << 7) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0  # random / 2^16 + 2^-17
    high = low + 1.0
    code = tl.where(u * (low + high) < y - low * low, high, low)
    code = (code.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # the sign of x
    store(pointer, offsets, n, (code + SHIFT).to(tl.int32, bitcast=True).to(tl.int8), MASKED)
    store(exponents, blocks, _blocks_of(n), e.to(tl.uint8), MASKED)
    return code * tl.abs(code) * _power(e)[:, None]
