"""RankOne TO: the slope of the gradient model is ``A = u v^T``."""

from __future__ import annotations

from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.optimizer import Group, TrainableOptimizer, compute_dtype, total
from to_finetune.optim.rules import RankOneSums
from to_finetune.optim.schedules import Rates


class RankOneTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = u (v.w) + b`` for each block of weights.

    State: ``u``, ``v`` and ``b``, of the weight's shape, and a 0-dim ``step``; 12 bytes a weight in float32.
    u starts at zero and v at ``1/sqrt(n)``, n the block's size: A starts at zero as the paper has it, but with
    both factors zero it would stay there for ever.
    """

    state_names = ("u", "v", "b")
    fast_paths = ("fused",)

    def _initial_state(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        state = super()._initial_state(group, p)
        block = group["params"] if group["scope"] == "group" else [p]
        state["v"].fill_(max(1, sum(q.numel() for q in block)) ** -0.5)
        return state

    def _update(self, group: Group, params: list[Tensor], rates: list[Rates]) -> None:
        if group["scope"] == "tensor":
            for p, rate in zip(params, rates, strict=True):
                self._apply(rules.rank_one, group, p, self._gradient(group, p), rate)
            return
        grads = [self._gradient(group, p) for p in params]
        parts = [self._sums(p, g) for p, g in zip(params, grads, strict=True)]
        sums = [total(column) for column in zip(*parts, strict=True)]
        for p, g, rate in zip(params, grads, rates, strict=True):
            block = RankOneSums(*(s.to(g) for s in sums))
            self._apply(rules.rank_one, group, p, g, rate, sums=block)

    def _sums(self, p: Tensor, g: Tensor) -> RankOneSums:
        state = [self.state[p][name].to(g.dtype) for name in self.state_names]
        return rules.rank_one_sums(p.to(compute_dtype(p)), g, *state)
