"""DeepSpeed's universal checkpoint, which knows only two optimizer states, ``exp_avg`` and ``exp_avg_sq``.

Under ZeRO, a state dict has the offset b and the slope (a or u) under these names, so that
``python -m deepspeed.checkpoint.ds_to_universal`` converts them. RankOne's v, which it would drop, goes unsharded into
the first group's options, which it copies. The first step after loading restores our names. DeepSpeed's loader also
casts all state to float32, without loss, and gives every group the first one's options; both are undone too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim.sharding import Layout, gathered, unpacked_state

NAMES = {"b": "exp_avg", "a": "exp_avg_sq", "u": "exp_avg_sq"}
WHOLE = "v"  # the state that goes unsharded into the options


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a partition's state under DeepSpeed's names."""
    return {NAMES.get(name, name): x for name, x in state.items()}


def named_back(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `renamed`: return the state under our names."""
    slope = "u" if WHOLE in state else "a"
    back = {"exp_avg": "b", "exp_avg_sq": slope}
    return {back.get(name, name): x for name, x in state.items()}


def whole(layout: Layout, flat: Tensor) -> dict[int, Tensor]:
    """Gather the tensors whose pieces the processes hold, by position, on process 0; the others get an empty dict."""
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
    """Convert a partition's state, as DeepSpeed's universal loader left it, to our names and formats.

    Args:
        layout, p: of the partition.
        state: with DeepSpeed's names, float32.
        names, dtype: of our state.
        wholes: the tensors that `whole` gathered, of all partitions.
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
