"""How weights and state are stored: float32, bfloat16 or int8 blocks, the last two rounded at random.

A value that is stored in fewer bits than it was computed in is rounded up or down at random, so that its expectation is
the exact value: updates too small for the format still add up, and a momentum decays to zero instead of stopping at the
smallest code. A value that the format holds exactly is never changed. The random bits are a function of (seed, step,
parameter, index of the element in the whole parameter): replicas agree, shards agree with the whole, and a resumed run
repeats the interrupted one to the bit.

int8: 32 neighbours of the flattened parameter share an exponent e, stored as a byte; code c is the number
``sign(c) c^2 2^(e - 127)``, and e is the smallest with which every value of the block is within the codes -127 ... 127.
The square makes small codes fine; a power of two seldom changes, and while it does not, values that do not change keep
their codes. 33 bytes hold 32 numbers.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

BLOCK = 32
LARGEST = 127.0**2
WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B1
STREAMS = (1, 1, GOLDEN, 0x85EBCA77)  # stream 0 is for the weight, the others for its state in order

Integer = TypeVar("Integer", int, Tensor)


def exponents_name(name: str) -> str:
    """The key of an int8 state's exponents beside its codes."""
    return f"{name}_exponent"


def new_state(p: Tensor, name: str, dtype: torch.dtype, value: float = 0.0) -> dict[str, Tensor]:
    """State of p's shape that is `value` everywhere: one tensor, and with int8 its uint8 exponents, one a block.

    Raises:
        RuntimeError: for int8 state of a sharded p.
    """
    if dtype != torch.int8:
        return {name: torch.full_like(p, value, dtype=dtype)}
    if isinstance(p, DTensor):  # a plain tensor of a shard's exponents would be taken for the same on all processes
        raise RuntimeError("state_dtype=torch.int8 is not available for sharded weights; use torch.bfloat16.")
    blocks = math.ceil(p.numel() / BLOCK)
    state = {
        name: torch.zeros_like(p, dtype=torch.int8),
        exponents_name(name): torch.zeros(blocks, dtype=torch.uint8, device=p.device),
    }
    if value:
        filled = torch.full(p.shape, value, device=p.device)
        codes, exponents = encode(filled, torch.full(p.shape, 1 << 15, device=p.device))
        state[name].copy_(codes)
        state[exponents_name(name)].copy_(exponents)
    return state


def read(state: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The state as numbers in `dtype`."""
    x = state[name]
    if x.dtype == torch.int8:
        x = decode(x, state[exponents_name(name)])
    return x.to(dtype)


def write_(
    target: Tensor,
    value: Tensor,
    bits: Tensor | None,
    stream: int,
    exponents: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Store `value` in `target`, in its format.

    Args:
        target: weights or state.
        value: the new numbers, of the same shape.
        bits: `random_bits` of the weights; needed for bfloat16 and int8.
        stream: 0 for weights, 1, 2, ... for their state.
        exponents: those of int8 state.
        skip: 0-dim bool; where it is true nothing changes.
    """
    if isinstance(value, DTensor):  # an operation may have chosen another sharding for it
        assert isinstance(target, DTensor)
        value = value.redistribute(placements=target.placements)
    if exponents is not None:
        assert bits is not None
        value, new_exponents = encode(value.float(), random16(bits, stream))
        exponents.copy_(new_exponents if skip is None else torch.where(skip, exponents, new_exponents))
    elif target.dtype == torch.bfloat16:
        assert bits is not None
        value = round_to_bfloat16(value.float(), random16(bits, stream))
    target.copy_(value if skip is None else torch.where(skip, target, value.to(target.dtype)))


def round_to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """float32 as bfloat16: up with the probability of the bits that are cut off; random: 16 bits an element."""
    if isinstance(x, DTensor):
        local = round_to_bfloat16(x.to_local(), random)
        return DTensor.from_local(local, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    bits = x.view(torch.int32)
    return torch.where(x.isnan(), bits, bits + random.to(torch.int32)).bitwise_and(-0x10000).view(x.dtype).bfloat16()


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """int8 codes and uint8 exponents as float32, of the codes' shape."""
    c = _blocks(codes.float())
    return _unblocked(c * c.abs() * _power(exponents.int()).unsqueeze(1), codes.shape)


def encode(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as int8 codes of the same shape and uint8 exponents, one for 32 elements; random: 16 bits an element.

    A block that holds an infinity or NaN (or a number within 0.1 % of float32's largest) gets exponent 255 and reads
    back as non-finite.
    """
    blocks = _blocks(x)
    peak = blocks.abs().amax(1)
    exponents = ((peak / LARGEST).view(torch.int32) + 0x7FFFFF) >> 23
    exponents = torch.where(peak <= 3.4e38, exponents, 255)
    inverse = torch.where(exponents < 254, _power((254 - exponents).clamp(min=0)), 0.0)
    y = blocks.abs() * inverse.unsqueeze(1)
    low = y.sqrt().floor()
    u = _blocks(random.float()) * 2.0**-16 + 2.0**-17
    codes = low + (u * (2 * low + 1) < y - low * low)
    codes = torch.where(blocks.isnan() | blocks.isinf(), 0.0, codes.copysign(blocks))
    return _unblocked(codes, x.shape).to(torch.int8), exponents.to(torch.uint8)


def state_key(seed: int, steps: Integer, positions: Integer) -> Integer:
    """The 32-bit key of the random bits of a parameter in a step; integers, or int64 vectors of one length."""
    words = mix((mix(seed & WORD) + (seed >> 32)) & WORD)
    return mix((mix((words + steps) & WORD) + positions * GOLDEN) & WORD)


def random_bits(p: Tensor, key: int | Tensor) -> Tensor:
    """32 random bits for each element of p, int64; of a sharded p for the local part."""
    return mix((global_index(p) + key) & WORD)


def random16(bits: Tensor, stream: int) -> Tensor:
    """16 of an element's random bits."""
    return bits & 0xFFFF if stream == 1 else ((bits * STREAMS[stream]) & WORD) >> 16


def mix(x: Integer) -> Integer:
    """A bijection of 32-bit words in which each bit depends on all."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def global_index(p: Tensor) -> Tensor:
    """Each element's index in the flattened parameter, int64; of a sharded p for the local part."""
    if not isinstance(p, DTensor):
        return torch.arange(p.numel(), device=p.device).view(p.shape)
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    index = torch.zeros((), dtype=torch.int64, device=p.to_local().device)
    for size, first, whole in zip(shape, offset, p.shape, strict=True):
        index = index.unsqueeze(-1) * whole + torch.arange(first, first + size, device=index.device)
    return index


def _power(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) in float32, 0 for exponent 0 and infinity for 255."""
    return (exponents << 23).view(torch.float32)


def _blocks(x: Tensor) -> Tensor:
    """(blocks, 32), filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.reshape(-1)[: shape.numel()].view(shape)
