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
    """The key of an int8 state's exponents beside its codes."""
    return f"{name}_exponent"


def blocks_of(first: int, count: int) -> int:
    """How many blocks of 32 hold these weights, `count` from the flattened parameter's `first` on."""
    return (first + count - 1) // BLOCK - first // BLOCK + 1 if count else 0


def new_state(p: Tensor, name: str, dtype: torch.dtype, blocks: int) -> dict[str, Tensor]:
    """State of p's shape that is zero: one tensor, and with int8 its uint8 exponents, one for each of `blocks`."""
    state = {name: torch.zeros_like(p, dtype=dtype)}
    if dtype == torch.int8:
        state[exponents_name(name)] = torch.zeros(blocks, dtype=torch.uint8, device=p.device)
    return state


def fill_(state: dict[str, Tensor], name: str, value: float) -> None:
    """Set new state of a member to `value` everywhere."""
    target, exponents = state[name], state.get(exponents_name(name))
    if exponents is None:
        target.fill_(value)
        return
    nearest = torch.full(target.shape, 1 << 15, device=target.device)
    codes, new_exponents = encode(torch.full(target.shape, value, device=target.device), nearest)
    target.copy_(codes)
    exponents.copy_(new_exponents[:1].expand_as(exponents))  # the same value in every block, wherever it is cut


def read(state: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The state as numbers in `dtype`."""
    x = state[name]
    if x.dtype == torch.int8:
        x = decode(x, state[exponents_name(name)])
    return x.to(dtype)


def read_at(state: dict[str, Tensor], name: str, index: Tensor, first: int) -> Tensor:
    """Some of a member's numbers, float32: those at the flat `index`; `first` is the member's own, as in `Member`."""
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
    """Store `value` in `target`, in its format.

    Args:
        target: weights or state.
        value: the new numbers, of the same shape.
        bits: `random_bits` of the weights; needed for bfloat16 and int8.
        stream: 0 for weights, 1, 2, ... for their state.
        exponents: those of int8 state.
        skip: 0-dim bool; where it is true nothing changes.
        peak: of int8, for a piece of one block: the block's largest absolute value, 0-dim.
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
    """float32 as bfloat16: up with the probability of the bits that are cut off; random: 16 bits an element."""
    bits = x.view(torch.int32)
    return torch.where(x.isnan(), bits, bits + random.to(torch.int32)).bitwise_and(-0x10000).view(x.dtype).bfloat16()


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """int8 codes and uint8 exponents as float32, of the codes' shape."""
    c = _blocks(codes.float())
    return _unblocked(c * c.abs() * _power(exponents.int()).unsqueeze(1), codes.shape)


def encode(x: Tensor, random: Tensor, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 as int8 codes of the same shape and uint8 exponents, one for 32 elements; random: 16 bits an element.

    A piece of one block takes the whole block's `peak`, its largest absolute value, 0-dim.
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
    """int8 state of a run of weights as int16, each code with its block's exponent: it can be cut anywhere.

    Args:
        codes: int8, flat.
        exponents: uint8, of the blocks that the run touches.
        first: the index of the run's first weight in the flattened parameter.
    """
    own = exponents.int().repeat_interleave(BLOCK)[first % BLOCK :][: len(codes)]
    return ((own << 8) | (codes.int() & 0xFF)).to(torch.int16)


def unpack_(codes: Tensor, exponents: Tensor, packed: Tensor, first: int) -> None:
    """Write what `pack` made back into int8 state, of the same weights in any layout."""
    codes.copy_(packed.to(torch.int8).view_as(codes))
    own = (packed.int() >> 8) & 0xFF
    starts = torch.arange(len(exponents), device=packed.device) * BLOCK - first % BLOCK
    exponents.copy_(own[starts.clamp(min=0)])


@overload
def state_key(seed: int, steps: int, positions: int) -> int: ...
@overload
def state_key(seed: int, steps: int | Tensor, positions: Tensor) -> Tensor: ...
def state_key(seed: int, steps: Any, positions: Any) -> Any:
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
