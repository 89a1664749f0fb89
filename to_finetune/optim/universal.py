"""DeepSpeed's universal checkpoint, which knows two states of an optimizer only, ``exp_avg`` and ``exp_avg_sq``.

Under ZeRO a state dict has the offset b and the slope (a, or u) under these names, so that
``python -m deepspeed.checkpoint.ds_to_universal`` takes them; RankOne's v, which it would drop, goes whole into the
first group's options, which it copies. A loaded run gets its own names back at its first step. The loader makes all
state float32, which holds what it was exactly, and gives every group the first one's options, which are put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.sharding import Layout, gathered, unpacked_state

NAMES = {"b": "exp_avg", "a": "exp_avg_sq", "u": "exp_avg_sq"}
WHOLE = "v"  # what goes whole into the options, under this name


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A partition's state under DeepSpeed's names."""
    return {NAMES.get(name, name): x for name, x in state.items()}


def named_back(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of which `renamed` made `state`."""
    slope = "u" if WHOLE in state else "a"
    back = {"exp_avg": "b", "exp_avg_sq": slope}
    return {back.get(name, name): x for name, x in state.items()}


def whole(layout: Layout, flat: Tensor) -> dict[int, Tensor]:
    """The tensors of which the processes hold pieces, by position, on process 0; nothing on the others."""
    tensors = {}
    for run in layout.runs:
        tensor = gathered(run.numel, [(run.there, flat[run.here])], flat, layout.shards)
        if tensor is not None:
            tensors[run.position] = tensor
    return tensors


def taken(
    layout: Layout,
    p: Tensor,
    state: Mapping[str, Any],
    names: Sequence[str],
    dtype: torch.dtype,
    wholes: Mapping[int, Tensor],
) -> dict[str, Any]:
    """The state of a partition as DeepSpeed's universal loader has left it, in our names and formats.

    Args:
        layout, p: of the partition.
        state: with DeepSpeed's names, float32.
        names, dtype: of our state.
        wholes: what `whole` made, of all partitions.
    """
    own = dict(state)
    if WHOLE in names:
        flat = torch.zeros_like(p)
        for run in layout.runs:
            flat[run.here] = wholes[run.position][run.there].to(flat)
        own[WHOLE] = flat
    own = named_back(own)
    stored = torch.int16 if dtype == torch.int8 else dtype
    own |= {name: own[name].to(stored) for name in names}
    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32).clone()
    return unpacked_state(layout, p, own, names) if dtype == torch.int8 else own
