"""Diagonal TO: the slope of the gradient model is ``A = diag(a)``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.kernels import foreach as foreach_path
from to_finetune.optim.kernels.batch import Member, may_read
from to_finetune.optim.kernels.inplace import store_
from to_finetune.optim.optimizer import Group, TrainableOptimizer, compute_dtype, total
from to_finetune.optim.schedules import decoupled_decay
from to_finetune.optim.state import read


class DiagonalTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = a * w + b``: a slope and an offset for every weight.

    State: ``a`` and ``b``, of the weight's shape, and a 0-dim ``step``; 8 bytes a weight in float32, as Adam.
    """

    state_names = ("a", "b")
    fast_paths = ("foreach", "fused")
    variant = "diagonal"

    def _update(self, group: Group, members: list[Member]) -> None:
        mean_square = None
        if group["relative_alpha"] and group["scope"] == "group":
            squares = total([rules.sum_of_squares(m.p.to(compute_dtype(m.p))) for m in members])
            mean_square = squares / sum(m.p.numel() for m in members)
        foreach = group["foreach"] or (group["foreach"] is None and all(m.p.is_cuda for m in members))
        if foreach and all(may_read(group, m.state["step"]) for m in members):
            self._update_foreach(group, members, mean_square)
            return
        for member in members:
            g = self._gradient(group, member)
            block = None if mean_square is None else mean_square.to(g)
            self._apply(rules.diagonal, group, member, g, mean_square=block)

    def _update_foreach(self, group: Group, members: list[Member], mean_square: Tensor | None) -> None:
        # Multi-tensor operations want one device, one dtype and one set of rates.
        alike: dict[Any, list[Member]] = defaultdict(list)
        for member in members:
            alike[member.p.device, compute_dtype(member.p), float(member.state["step"])].append(member)
        for batch in alike.values():
            ps = [member.p for member in batch]
            gs = [self._gradient(group, member) for member in batch]
            dtype = gs[0].dtype
            slopes, offsets = ([read(member.state, name, dtype) for member in batch] for name in self.state_names)
            rates = self._rates(group, batch[0], dtype)
            new = foreach_path.diagonal(
                [p.to(dtype) for p in ps],
                gs,
                slopes,
                offsets,
                **rates._asdict(),
                decay=decoupled_decay(group, rates),
                gamma_max=group["gamma_max"],
                relative_alpha=group["relative_alpha"],
                mean_square=None if mean_square is None else mean_square.to(gs[0]),
            )
            for member, g, w, a, b, G in zip(batch, gs, *new, strict=True):
                p = member.p
                skip = self._skip_on(p.device)
                store_(p, w, member.state, self.state_names, (a, b), self._key(group, member), skip)
                self._squares[p] = (rules.sum_of_squares(G - g), rules.sum_of_squares(g))
