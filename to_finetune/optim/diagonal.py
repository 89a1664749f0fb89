"""Diagonal TO: the slope of the gradient model is ``A = diag(a)``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.blocks import WW, Part
from to_finetune.optim.kernels import foreach as foreach_path
from to_finetune.optim.kernels.batch import may_read
from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.schedules import decoupled_decay
from to_finetune.optim.sharding import Member
from to_finetune.optim.state import read
from to_finetune.optim.stateful import compute_dtype


class DiagonalTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = a * w + b``: a slope and an offset for every weight.

    State: ``a`` and ``b``, of the weight's shape, and a 0-dim ``step``; 8 bytes per weight in float32, as for Adam.
    """

    state_names = ("a", "b")
    fast_paths = ("foreach", "fused")
    variant = "diagonal"

    def _own_sums(self, member: Member, g: Tensor) -> dict[int, Tensor]:
        return {WW: rules.sum_of_squares(member.p)}

    def _update(self, part: Part) -> None:
        group, members = part.group, part.members
        foreach = group["foreach"] or (group["foreach"] is None and all(m.p.is_cuda for m in members))
        if foreach and part.pending is None and all(may_read(group, m.state["step"]) for m in members):
            self._update_foreach(part)
            return
        for i, member in enumerate(members):
            mean_square = _mean_square(part, i, compute_dtype(member.p)) if group["relative_alpha"] else None
            self._apply(rules.diagonal, part, i, mean_square=mean_square)

    def _update_foreach(self, part: Part) -> None:
        # Multi-tensor operations need one device, one dtype and one set of rates.
        group, alike = part.group, defaultdict[Any, list[int]](list)
        for i, member in enumerate(part.members):
            alike[member.p.device, compute_dtype(member.p), float(member.state["step"])].append(i)
        for (_, dtype, _), batch in alike.items():
            members = [part.members[i] for i in batch]
            gs = [self._scaled_gradient(part, i) for i in batch]
            slopes, offsets = ([read(member.state, name, dtype) for member in members] for name in self.state_names)
            rates = self._rates(group, members[0], dtype)
            new = foreach_path.diagonal(
                [member.p.to(dtype) for member in members],
                gs,
                slopes,
                offsets,
                **rates._asdict(),
                decay=decoupled_decay(group, rates),
                gamma_max=group["gamma_max"],
                mean_squares=[_mean_square(part, i, dtype) for i in batch] if group["relative_alpha"] else None,
            )
            for i, g, w, a, b, G in zip(batch, gs, *new, strict=True):
                self._finish(part, i, w, (a, b), G - g, g)


def _mean_square(part: Part, i: int, dtype: torch.dtype) -> Tensor:
    """Return the mean of w^2 over the block of a part's i-th member."""
    assert part.totals is not None
    block = part.totals.block
    return (block.ww[i] / block.n[i]).to(dtype)
