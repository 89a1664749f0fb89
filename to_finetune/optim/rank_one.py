"""RankOne TO: the slope of the gradient model is ``A = u v^T``."""

from __future__ import annotations

from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.kernels.batch import Member
from to_finetune.optim.optimizer import Group, TrainableOptimizer, total
from to_finetune.optim.rules import RankOneSums
from to_finetune.optim.state import new_state, read


class RankOneTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = u (v.w) + b`` for each block of weights.

    State: ``u``, ``v`` and ``b``, of the weight's shape, and a 0-dim ``step``; 12 bytes a weight in float32.
    u starts at zero and v at ``1/sqrt(n)``, n the block's size: A starts at zero as the paper has it, but with
    both factors zero it would stay there for ever.
    """

    state_names = ("u", "v", "b")
    fast_paths = ("fused",)
    variant = "rank_one"

    def _initial_state(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        state = super()._initial_state(group, p)
        block = group["params"] if group["scope"] == "group" else [p]
        n = max(1, sum(q.numel() for q in block))
        state.update(new_state(p, "v", state["v"].dtype, n**-0.5))
        return state

    def _update(self, group: Group, members: list[Member]) -> None:
        if group["scope"] == "tensor":
            for member in members:
                self._apply(rules.rank_one, group, member, self._gradient(group, member))
            return
        grads = [self._gradient(group, member) for member in members]
        parts = [self._sums(member, g) for member, g in zip(members, grads, strict=True)]
        sums = [total(column) for column in zip(*parts, strict=True)]
        for member, g in zip(members, grads, strict=True):
            self._apply(rules.rank_one, group, member, g, sums=RankOneSums(*(s.to(g) for s in sums)))

    def _sums(self, member: Member, g: Tensor) -> RankOneSums:
        state = [read(member.state, name, g.dtype) for name in self.state_names]
        return rules.rank_one_sums(member.p.to(g.dtype), g, *state)
