"""Which program of a launch takes which part of which tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from to_finetune.optim.blocks import keep_for_graphs

MANY_WARPS = 8  # of the programs that add up or scale


def programs_of(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
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
