"""Optimizers of the study that Hugging Face's `optim` has no name for, from torch's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAndAdamW(Optimizer):
    """torch's Muon on the matrices of the decoder's layers, AdamW on embeddings and vectors, as Muon's authors have it.

    Muon's step is scaled to AdamW's (`match_rms_adamw`), so that one rate serves both. The groups are those of the two
    optimizers, so that a scheduler moves their rates.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
        self.parts: list[Optimizer] = [Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=0.0))
        super().__init__([{"params": part.param_groups[0]["params"]} for part in self.parts], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_tensors(self) -> list[torch.Tensor]:
        return [x for part in self.parts for state in part.state.values() for x in state.values()]
