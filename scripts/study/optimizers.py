"""Optimizers of the study that Hugging Face's `optim` has no name for: Muon from torch's parts, and ideas for TO."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from to_finetune.optim.rules import SMALLEST_DIVISOR


class MuonAndAdamW(Optimizer):
    """torch's Muon on the matrices of the decoder's layers, AdamW on embeddings and vectors, as Muon's authors do.

    Muon's step is scaled to AdamW's (`match_rms_adamw`), so that one rate serves both. There is one group for each of
    the two optimizers, so that a scheduler sets their rates.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")  # from torch 2.9 on
        self.parts: list[Optimizer] = [muon]
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=0.0))
        super().__init__([{"params": part.param_groups[0]["params"]} for part in self.parts], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_tensors(self) -> list[Tensor]:
        return [x for part in self.parts for state in part.state.values() for x in state.values()]


class IdeaTO(Optimizer):
    """Diagonal TO with both options, in plain, slow code, to try one more idea; without ideas it is `DiagonalTO`.

    Args:
        centre: "start" or "mean": the slope multiplies ``w - c`` instead of w, where c is the weights at the start, or
            their running mean of rate beta. While w hardly moves, ``a w`` and b cannot be told apart; ``a (w - c)``
            and b can.
        rows: alpha is relative to the mean square of a weight's row instead of its tensor.
        scale: "rows" divides each row of the gradient by its own rms, "factored" each element by the product of its
            row's and its column's, over the tensor's rms, for embeddings too; "running" does so with Adafactor's
            running means of squares.
        warm: beta is ``max(beta, 1/(t + 1))`` in step t = 0, 1, ..., so that the estimate is a mean from the start.
        momentum: the step is taken along a running mean of G with this factor.
        clip: the residual is clipped to this many times its tensor's rms.
        slope: if False, only b learns, at the rate that slope and offset have together,
            ``beta + alpha w^2 / mean(w^2)``: a running mean with its own rate for each weight.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        alpha: float = 0.3,
        beta: float = 0.1,
        centre: str = "",
        rows: bool = False,
        scale: str = "tensor",
        warm: bool = False,
        momentum: float = 0.0,
        clip: float = 0.0,
        slope: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.alpha, self.beta, self.centre, self.rows, self.scale = alpha, beta, centre, rows, scale
        self.warm, self.momentum, self.clip, self.slope = warm, momentum, clip, slope

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, self.state[p], group["lr"])

    def _step(self, w: Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            zeros = {name: torch.zeros_like(w) for name in ("a", "b", "m")}
            state |= {"t": 0, "c": w.clone() if self.centre else torch.zeros_like(w), **zeros}
        assert w.grad is not None
        beta = max(self.beta, 1 / (state["t"] + 1)) if self.warm else self.beta
        g, x = w.grad / self._size(w.grad, state), w - state["c"]
        unit = _scale(x, "rows" if self.rows else "tensor").square()
        gain = torch.where(unit > SMALLEST_DIVISOR, self.alpha * x * x / unit, 0.0).clamp(max=max(1 - beta, 0.0))
        residual = state["a"] * x + state["b"] - g
        if self.clip:
            bound = self.clip * _scale(residual, "tensor")
            residual = residual.clamp(-bound, bound)
        if self.slope:
            state["a"] -= torch.where(x != 0, gain / x, 0.0) * residual
            state["b"] -= beta * residual
        else:
            state["b"] -= (beta + gain) * residual
        G = state["a"] * x + state["b"]
        if self.momentum:
            G = state["m"].mul_(self.momentum).add_(G, alpha=1 - self.momentum)
        w -= lr * G
        if self.centre == "mean":
            state["c"].lerp_(w, self.beta)
        state["t"] += 1

    def _size(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        if self.scale != "running":
            return _scale(g, self.scale)
        squares = state.setdefault("squares", torch.zeros_like(g))
        squares.lerp_(g.square(), (state["t"] + 1) ** -0.8)
        size = _size_of(squares, "factored")
        return (size * _scale(g / size, "tensor")).clamp(min=SMALLEST_DIVISOR)


def _scale(x: Tensor, of: str) -> Tensor:
    """Return the rms of the tensor, of each row, or of each element as estimated from its row and column."""
    return _size_of(x.square(), of)


def _size_of(squares: Tensor, of: str) -> Tensor:
    if of == "tensor" or squares.ndim != 2:
        mean = squares.mean()
    elif of == "rows":
        mean = squares.mean(1, keepdim=True)
    else:
        rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
        mean = rows * columns / rows.mean().clamp(min=SMALLEST_DIVISOR)
    return mean.sqrt().clamp(min=SMALLEST_DIVISOR)
