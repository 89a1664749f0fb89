"""Storage formats of weights and state: float32, bfloat16 and int8 blocks, the last two with stochastic rounding.

A value stored in fewer bits than it was computed in is rounded up or down at random so that its expectation is the
exact value: updates too small for the format still add up, and momentum decays to zero instead of getting stuck at the
smallest code. A value that the format represents exactly is stored unchanged. The random bits are a function of (seed,
step, parameter, index of the element in the whole parameter): replicas agree, shards agree with the unsharded
parameter, and a resumed run repeats the interrupted one bit for bit.

int8: 32 consecutive elements of the flattened parameter share an exponent e, stored as a byte. Code c represents
``sign(c) c^2 2^(e - 127)``; e is the smallest exponent for which the codes -127 ... 127 cover every value of the block.
The square makes small codes fine. A power of two seldom changes, and while it does not, unchanged values keep their
codes. 33 bytes hold 32 numbers.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

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
    """Return the key under which an int8 state's exponents are stored beside its codes."""
    return f"{name}_exponent"


def blocks_of(first: int, count: int) -> int:
    """Return how many blocks of 32 hold the `count` weights from index `first` of the flattened parameter on."""
    return (first + count - 1) // BLOCK - first // BLOCK + 1 if count else 0


def new_state(p: Tensor, name: str, dtype: torch.dtype, blocks: int) -> dict[str, Tensor]:
    """Return zero state of p's shape: one tensor and, for int8, its uint8 exponents, one per block."""
    state = {name: torch.zeros_like(p, dtype=dtype)}
    if dtype == torch.int8:
        state[exponents_name(name)] = torch.zeros(blocks, dtype=torch.uint8, device=p.device)
    return state


def fill_(state: dict[str, Tensor], name: str, value: float) -> None:
    """Fill a member's new state with `value`."""
    target, exponents = state[name], state.get(exponents_name(name))
    if exponents is None:
        target.fill_(value)
        return
    nearest = torch.full(target.shape, 1 << 15, device=target.device)
    codes, new_exponents = encode(torch.full(target.shape, value, dtype=torch.float32, device=target.device), nearest)
    target.copy_(codes)
    exponents.copy_(new_exponents[:1].expand_as(exponents))  # the same in every block, wherever a shard cuts it


def read(state: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Return the decoded state in `dtype`."""
    x = state[name]
    if x.dtype == torch.int8:
        x = decode(x, state[exponents_name(name)])
    return x.to(dtype)


def read_at(state: dict[str, Tensor], name: str, index: Tensor, first: int) -> Tensor:
    """Return the numbers at the flat `index` of a member's state, float32; `first` is that of the `Member`."""
    x = state[name].reshape(-1)[index].float()
    exponents = state.get(exponents_name(name))
    return x if exponents is None else x * x.abs() * _power(exponents[(first % BLOCK + index) // BLOCK].int())


def write_(
    target: Tensor,
    value: Tensor,
    bits: Tensor | None,
    stream: int,
    exponents: Tensor | None = None,
    skip: Tensor | None = None,
    peak: Tensor | None = None,
) -> None:
    """Store `value` in `target`, in the target's format.

    Args:
        target: weights or state.
        value: the new numbers, of the same shape.
        bits: `random_bits` of the weights; needed for bfloat16 and int8.
        stream: 0 for weights, 1, 2, ... for their state.
        exponents: those of int8 state.
        skip: 0-dim bool; if true, nothing changes.
        peak: for a piece of an int8 block: the whole block's largest absolute value, 0-dim.
    """
    if exponents is not None:
        assert bits is not None
        value, new_exponents = encode(value.float(), random16(bits, stream), peak)
        exponents.copy_(new_exponents if skip is None else torch.where(skip, exponents, new_exponents))
    elif target.dtype == torch.bfloat16:
        assert bits is not None
        value = round_to_bfloat16(value.float(), random16(bits, stream))
    target.copy_(value if skip is None else torch.where(skip, target, value.to(target.dtype)))


def round_to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability that the cut-off bits give; random: 16 bits per element."""
    bits = x.view(torch.int32)
    return torch.where(x.isnan(), bits, bits + random.to(torch.int32)).bitwise_and(-0x10000).view(x.dtype).bfloat16()


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """Decode int8 codes and uint8 exponents to float32 of the codes' shape."""
    c = _blocks(codes.float())
    return _unblocked(c * c.abs() * _power(exponents.int()).unsqueeze(1), codes.shape)


def encode(x: Tensor, random: Tensor, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode float32 as int8 codes of its shape and uint8 exponents, one per 32 elements; random: 16 bits per element.

    For a piece of one block, `peak` is the largest absolute value of the whole block, 0-dim.
    A block that holds an infinity or NaN (or a number within 0.1 % of float32's largest) gets exponent 255 and reads
    back as non-finite.
    """
    blocks = _blocks(x)
    peak = blocks.abs().amax(1) if peak is None else peak.expand(len(blocks))
    exponents = ((peak / LARGEST).view(torch.int32) + 0x7FFFFF) >> 23
    exponents = torch.where(peak <= 3.4e38, exponents, 255)
    inverse = torch.where(exponents < 254, _power((254 - exponents).clamp(min=0)), 0.0)
    y = blocks.abs() * inverse.unsqueeze(1)
    low = y.sqrt().floor()
    u = _blocks(random.float()) * 2.0**-16 + 2.0**-17
    codes = low + (u * (2 * low + 1) < y - low * low)
    codes = torch.where(blocks.isnan() | blocks.isinf(), 0.0, codes.copysign(blocks))
    return _unblocked(codes, x.shape).to(torch.int8), exponents.to(torch.uint8)


def pack(codes: Tensor, exponents: Tensor, first: int) -> Tensor:
    """Pack the int8 state of a run of weights as int16, each code with its exponent, so that it can be cut anywhere.

    Args:
        codes: int8, flat.
        exponents: uint8, of the blocks that the run touches.
        first: the index of the run's first weight in the flattened parameter.
    """
    own = exponents.int().repeat_interleave(BLOCK)[first % BLOCK :][: len(codes)]
    return ((own << 8) | (codes.int() & 0xFF)).to(torch.int16)


def unpack_(codes: Tensor, exponents: Tensor, packed: Tensor, first: int) -> None:
    """Write `packed`, made by `pack`, back into the int8 state of the same weights, in any layout."""
    codes.copy_(packed.to(torch.int8).view_as(codes))
    own = (packed.int() >> 8) & 0xFF
    starts = torch.arange(len(exponents), device=packed.device) * BLOCK - first % BLOCK
    exponents.copy_(own[starts.clamp(min=0)])


@overload
def state_key(seed: int, steps: int, positions: int) -> int: ...
@overload
def state_key(seed: int, steps: int | Tensor, positions: Tensor) -> Tensor: ...
def state_key(seed: int, steps: Any, positions: Any) -> Any:
    """Return the 32-bit key of a parameter's random bits in a step; integers, or int64 vectors of equal length."""
    words = mix((mix(seed & WORD) + (seed >> 32)) & WORD)
    return mix((mix((words + steps) & WORD) + positions * GOLDEN) & WORD)


def random_bits(p: Tensor, key: int | Tensor) -> Tensor:
    """Return 32 random bits for each element of p, int64; for a sharded p, of its local part."""
    return mix((global_index(p) + key) & WORD)


def random16(bits: Tensor, stream: int) -> Tensor:
    """Return the 16 of each element's random bits that belong to a stream."""
    return bits & 0xFFFF if stream == 1 else ((bits * STREAMS[stream]) & WORD) >> 16


def mix(x: Integer) -> Integer:
    """Mix 32-bit words by a bijection in which each output bit depends on all input bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def global_index(p: Tensor) -> Tensor:
    """Return each element's index in the flattened parameter, int64; for a sharded p, of its local part."""
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
    """Reshape to (blocks, 32), padded with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.reshape(-1)[: shape.numel()].view(shape)
