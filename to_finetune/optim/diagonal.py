"""Diagonal TO: the slope of the gradient model is ``A = diag(a)``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from to_finetune.optim import rules
from to_finetune.optim.kernels.foreach import diagonal_
from to_finetune.optim.optimizer import Group, TrainableOptimizer, decoupled_decay, sum_of_squares
from to_finetune.optim.schedules import Rates


class DiagonalTO(TrainableOptimizer):
    """Trainable Optimizer with the gradient model ``G = a * w + b``: a slope and an offset for every weight.

    State: ``a`` and ``b``, of the weight's shape, and a 0-dim ``step``; 8 bytes a weight in float32, as Adam.
    """

    state_names = ("a", "b")
    fast_paths = ("foreach", "fused")

    def _update(self, group: Group, params: list[Tensor], rates: list[Rates]) -> None:
        mean_square = None
        if group["relative_alpha"] and group["scope"] == "group":
            mean_square = sum_of_squares(params) / sum(p.numel() for p in params)
        foreach = group["foreach"]
        if foreach is None:
            foreach = not group["fused"] and all(p.is_cuda for p in params)
        if foreach:
            self._update_foreach(group, params, rates, mean_square)
            return
        for p, rate in zip(params, rates, strict=True):
            g = self._gradient(group, p)
            block = None if mean_square is None else mean_square.to(g)
            self._apply(rules.diagonal, group, p, g, rate, mean_square=block)

    def _update_foreach(
        self, group: Group, params: list[Tensor], rates: list[Rates], mean_square: Tensor | None
    ) -> None:
        # Multi-tensor operations want one device, one dtype and one set of rates.
        alike: dict[Any, list[tuple[Tensor, Rates]]] = defaultdict(list)
        for p, rate in zip(params, rates, strict=True):
            alike[p.device, p.dtype, int(self.state[p]["step"])].append((p, rate))
        for members in alike.values():
            ps, rate = [p for p, _ in members], members[0][1]
            gs = [self._gradient(group, p) for p in ps]
            self._squares += diagonal_(
                ps,
                gs,
                [self.state[p]["a"] for p in ps],
                [self.state[p]["b"] for p in ps],
                **rate._asdict(),
                decay=decoupled_decay(group, rate),
                gamma_max=group["gamma_max"],
                relative_alpha=group["relative_alpha"],
                mean_square=None if mean_square is None else mean_square.to(gs[0]),
            )
