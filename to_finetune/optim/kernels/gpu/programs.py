"""Assignment of the programs of a launch to chunks of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from to_finetune.optim.blocks import keep_for_graphs

MANY_WARPS = 8  # for programs that add up or scale


def programs_of(sizes: Sequence[int], device: torch.device, each: int = 1) -> tuple[Tensor, Tensor]:
    """Return each program's (tensor, chunk in it), int32, and the number of each tensor's first program, int64.

    Args:
        sizes: the sizes of the tensors.
        each: the size of a chunk.
    """
    programs, begin = _made_programs(tuple(sizes), device, each)
    keep_for_graphs(programs, begin)
    return programs, begin


@lru_cache(maxsize=256)
def _made_programs(sizes: tuple[int, ...], device: torch.device, each: int) -> tuple[Tensor, Tensor]:
    chunks = torch.tensor([-(-size // each) for size in sizes], device="cpu")
    begin = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    which = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), chunks)
    programs = torch.stack([which, torch.arange(len(which), device="cpu") - begin[which]], dim=1).int()
    return programs.to(device), begin.to(device)
