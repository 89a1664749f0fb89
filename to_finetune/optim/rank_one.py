"""RankOne TO: the slope of the gradient model is ``A = u v^T``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.blocks import UB, UG, UU, VW, WW, Part
from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.rules import RankOneSums
from to_finetune.optim.sharding import Member
from to_finetune.optim.state import fill_, read
from to_finetune.optim.stateful import Group, compute_dtype


class RankOneTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = u (v.w) + b`` for each block of weights.

    State: ``u``, ``v`` and ``b``, of the weight's shape, and a 0-dim ``step``; 12 bytes per weight in float32.
    u starts at zero and v at ``1/sqrt(n)``, n the block's size: A starts at zero as in the paper, but with both factors
    zero it would stay zero forever. With `relative_alpha` (ours), v is zero for weights that are zero when their state
    is created: an all-zero tensor, such as LoRA's B, has no scale for alpha to be relative to, so u would become huge
    in the first steps, and G would grow with the weights. Such a tensor has no slope and moves by momentum.

    A step uses sums over the weights that the last one left behind: call `forget_last_step` after changing them
    through ``.data``, which torch does not track.
    """

    state_names = ("u", "v", "b")
    fast_paths = ("fused",)
    variant = "rank_one"

    def _start(self, group: Group, members: Sequence[Member]) -> None:
        for member in members:
            fill_(member.state, "v", max(1, self._block_size(group, member)) ** -0.5)
            if group["relative_alpha"]:
                member.state["v"] *= member.p != 0

    def _block_size(self, group: Group, member: Member) -> int:
        if group["scope"] == "tensor":
            return member.numel
        return sum(run.numel for _, layout in self.layouts(group) for run in layout.runs)

    def _own_sums(self, member: Member, g: Tensor) -> dict[int, Tensor]:
        state = [read(member.state, name, g.dtype) for name in self.state_names]
        sums = rules.rank_one_sums(member.p.to(g.dtype), g, *state)
        return {VW: sums.vw, WW: sums.ww, UU: sums.uu, UB: sums.ub, UG: sums.ug}

    def _update(self, part: Part) -> None:
        assert part.totals is not None
        for i, member in enumerate(part.members):
            dtype = compute_dtype(member.p)
            sums = RankOneSums(*(column[i].to(dtype) for column in part.totals.block))
            self._apply(rules.rank_one, part, i, sums=sums)
