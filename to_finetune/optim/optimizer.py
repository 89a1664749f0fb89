"""What the three optimizers share: parameter groups, lazy state, the gradient they see, checks, diagnostics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from to_finetune.optim.kernels.inplace import Rule, apply_, compiled_apply_
from to_finetune.optim.rules import rms_normalized
from to_finetune.optim.schedules import SCHEDULES, Rates, rates_at

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]
NUMBERS = ("lr", "alpha", "beta", "alpha_decay", "lr_decay", "t0", "gamma_max", "max_norm", "weight_decay")


class TrainableOptimizer(Optimizer, ABC):
    """Base class of `DiagonalTO`, `RankOneTO` and `FullTO`, which differ in the form of the slope alone.

    A variant names its state in `state_names` (tensors of the weight's shape that start at zero), the fast paths
    that it has in `fast_paths`, and says in `_update` how a group's weights move. State is created in `step()`
    and never changes its dtype on loading.
    """

    state_names: tuple[str, ...]
    fast_paths: tuple[str, ...] = ()

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        alpha: float = 0.1,
        beta: float = 0.1,
        alpha_decay: float = 1.0,
        schedule: Literal["constant", "exponential", "theorem"] = "constant",
        t0: float = 1.0,
        gamma_max: float | None = 1.0,
        max_norm: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        relative_alpha: bool = False,
        grad_scale: Literal["rms"] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        *,
        lr_decay: float = 1.0,
        scope: Literal["tensor", "group"] = "tensor",
    ) -> None:
        """The defaults are the paper's algorithm with the stability guard on; what is ours is marked (ours).

        Args:
            params: tensors, (name, tensor) pairs, or parameter groups with hyper-parameters of their own.
            lr: learning rate of the weights, a float or a 0-dim tensor. G is as large as a gradient, so SGD's
                rates suit, not Adam's, unless `grad_scale` is set.
            alpha: learning rate of the slope (A, a, or u and v).
            beta: learning rate of the offset b, in [0, 1]; ``alpha=0`` is momentum with decay ``1 - beta``.
            alpha_decay: factor a step of alpha and beta under ``schedule="exponential"``.
            schedule: "constant"; "exponential"; or "theorem": ``lr/(t+t0)``, ``alpha/(t+t0)^2``,
                ``beta/(t+t0)`` in step t = 0, 1, ...
            t0: offset of the theorem's schedule, above 0; beta may then be up to t0.
            gamma_max: (ours) the guard, between 0 and 2: alpha is lowered where one step would otherwise multiply
                the residual by less than ``1 - gamma_max``. None is the paper's exact update, which may diverge.
            max_norm: radius of the l2 ball that a group's weights, as one vector, are projected onto after the
                step (Proposition 2's feasible set); None for no projection.
            weight_decay: L2 factor, added to the gradient (coupled), as the paper's theorem has it.
            decoupled_weight_decay: shrink the weights by ``lr * weight_decay`` instead, as AdamW does.
            relative_alpha: (ours) alpha in units of the inverse of the block's own scale: ``mean(w^2)`` (Diagonal),
                ``(v.w)^2 + ||u||^2 ||w||^2`` but no less than ``mean(w^2)`` (RankOne), ``||w||^2`` (Full). It then
                means the same for small and for large weights.
            grad_scale: (ours) "rms" divides each tensor's gradient by its own root mean square first, so that
                lr, alpha and beta mean the same for every tensor and model.
            maximize: ascend instead of descend.
            foreach: update all tensors together with torch's multi-tensor operations. None: on CUDA, where the
                variant has that path. DiagonalTO only: the other two are sums over blocks, which torch has no
                multi-tensor operation for.
            fused: compile the update into one pass a tensor with torch.compile (on the CPU it needs a C++
                compiler). None: off. DiagonalTO and RankOneTO.
            state_dtype: None for float32 (float64 for float64 weights), torch.float32 or torch.bfloat16.
            lr_decay: factor a step of lr under ``schedule="exponential"``. Added to the rates of the paper's
                scheme so that it is whole in a plain loop, without an LR scheduler.
            scope: the block that shares one slope: "tensor", or "group" for all weights of a parameter group as
                one vector, the paper's mathematics. For DiagonalTO, whose slope is elementwise, it only says what
                `relative_alpha` takes the mean over.

        Raises:
            ValueError: for a hyper-parameter out of its range, a fast path that the variant does not have, and
                complex or integer weights.
        """
        self._forget_last_step()
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "alpha_decay": alpha_decay,
            "schedule": schedule,
            "t0": t0,
            "gamma_max": gamma_max,
            "max_norm": max_norm,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "relative_alpha": relative_alpha,
            "grad_scale": grad_scale,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "state_dtype": state_dtype,
            "lr_decay": lr_decay,
            "scope": scope,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_last_step()

    def _forget_last_step(self) -> None:
        self._squares: list[tuple[Tensor, Tensor]] = []  # (|G - g|^2, |g|^2) of each block of the last step
        self._peaks: list[Tensor] = []

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyperparameters(group)
            for path in ("foreach", "fused"):
                if group[path] and path not in self.fast_paths:
                    raise ValueError(f"{path}=True is not valid: {type(self).__name__} has no such path.")
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} takes real floating-point weights, not {p.dtype}.")
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, keeping each tensor's saved dtype (torch would cast it to the weight's).

        Counts of steps stay on the CPU, so that reading one never waits for a device.
        """
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to("cpu" if name in ("step", "pairs") else p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss, if there is a closure.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients.")
        self._forget_last_step()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            rates = [self._advance(p, group) for p in params]
            live = [(p, rate) for p, rate in zip(params, rates, strict=True) if p.numel() > 0]
            if live:
                self._update(group, [p for p, _ in live], [rate for _, rate in live])
            if params and group["max_norm"] is not None and group["lr"] > 0:  # with lr 0 no weight changes at all
                _project(group["params"], group["max_norm"])
        return loss

    @abstractmethod
    def _update(self, group: Group, params: list[Tensor], rates: list[Rates]) -> None:
        """Move the weights and the state of `params`, all non-empty and with a gradient, at their own rates."""

    def _advance(self, p: Tensor, group: Group) -> Rates:
        """Create p's state where there is none, count this step, and return its rates."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update(self._initial_state(group, p))
        taken = int(state["step"])
        state["step"] = state["step"] + 1  # out of place: a loaded state may share one tensor
        return rates_at(taken, group)

    def _initial_state(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        dtype = group["state_dtype"] or compute_dtype(p)
        return {name: torch.zeros_like(p, dtype=dtype) for name in self.state_names}

    def _gradient(self, group: Group, p: Tensor) -> Tensor:
        """The gradient that the regression sees, in p's compute dtype; it may share p.grad's memory."""
        assert p.grad is not None
        g = p.grad.to(compute_dtype(p))
        if group["maximize"]:
            g = -g
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            g = g + group["weight_decay"] * p.to(g.dtype)
        if group["grad_scale"] == "rms":
            g, peak = rms_normalized(g)
            self._peaks.append(peak)
        return g

    def _apply(
        self,
        rule: Rule,
        group: Group,
        p: Tensor,
        g: Tensor,
        rates: Rates,
        **block_sums: Any,
    ) -> None:
        """Move one tensor by an elementwise rule, given the sums over its block where p is a piece of one."""
        scalars = {**rates._asdict(), "decay": decoupled_decay(group, rates)}
        state = [self.state[p][name] for name in self.state_names]
        apply = apply_
        if group["fused"] and p.numel() > 1 and all(x.is_contiguous() for x in (p, *state)):
            # As vectors that are no views, so that one graph serves all shapes: torch's limit is 8 a function.
            p, g, *state = (x.reshape(-1).detach() for x in (p, g, *state))
            apply = compiled_apply_()
            scalars = {k: torch.as_tensor(x, dtype=g.dtype, device=p.device) for k, x in scalars.items()}
        options = {"gamma_max": group["gamma_max"], "relative_alpha": group["relative_alpha"]}
        self._squares.append(apply(rule, p, g, state, **scalars, **options, **block_sums))

    def estimate_error(self) -> Tensor:
        """``||G - g|| / ||g||`` of the last step, over all weights: how far the estimate is from the gradient.

        0-dim, on the device of the first weights; nothing waits for the device until its value is read
        (``.item()``). g is the gradient that the regression sees: with coupled weight decay and after
        `grad_scale`. NaN before the first step, and for a gradient of zeros.
        """
        if not self._squares:
            return torch.tensor(torch.nan)
        error, norm = (total(parts) for parts in zip(*self._squares, strict=True))
        return (error / norm).sqrt()

    def gradient_peak(self) -> Tensor:
        """The largest share ``max|g| / ||g||`` that one element had of its tensor's gradient in the last step.

        0-dim. With ``grad_scale="rms"`` a value near 1 says that one huge element has scaled all the others of
        its tensor down to nothing. NaN without `grad_scale`, and before the first step.
        """
        if not self._peaks:
            return torch.tensor(torch.nan)
        return torch.stack([peak.to(self._peaks[0].device) for peak in self._peaks]).max()


def compute_dtype(p: Tensor) -> torch.dtype:
    """float32 for weights up to 32 bits, float64 for float64."""
    return torch.promote_types(p.dtype, torch.float32)


def decoupled_decay(group: Group, rates: Rates) -> float | Tensor:
    """The factor of w that a step takes away beside the step itself: lr times the decoupled weight decay."""
    return rates.lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of 0-dim tensors, on the device of the first."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def sum_of_squares(params: Sequence[Tensor]) -> Tensor:
    """``||w||^2`` over all the tensors, 0-dim, in their compute dtype."""
    return total([p.to(compute_dtype(p)).square().sum() for p in params])


def _project(params: list[Tensor], max_norm: float) -> None:
    """Project the vector of all the weights onto the l2 ball of radius max_norm."""
    scale = (max_norm / sum_of_squares(params).sqrt()).clamp(max=1.0)
    for p in params:
        p.copy_(p.to(compute_dtype(p)) * scale.to(p.device))


def _check_hyperparameters(group: Group) -> None:
    """Raise ValueError, naming the key, the value and what is allowed."""

    def check(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{key}={group[key]!r} is not valid: {allowed}.")

    for key in NUMBERS:
        value = group[key]
        optional = value is None and key in ("gamma_max", "max_norm")
        number = isinstance(value, Real) or (key == "lr" and isinstance(value, Tensor) and value.dim() == 0)
        check(key, optional or (number and math.isfinite(value)), "a finite number")
    check("schedule", group["schedule"] in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    theorem = group["schedule"] == "theorem"
    check("t0", group["t0"] > 0, "a number above 0")
    check("lr", bool(group["lr"] >= 0), "a number of at least 0")
    check("alpha", group["alpha"] >= 0, "a number of at least 0")
    largest_beta = group["t0"] if theorem else 1
    check("beta", 0 <= group["beta"] <= largest_beta, f"between 0 and {'t0' if theorem else '1'}")
    for key in ("alpha_decay", "lr_decay"):
        check(key, 0 < group[key] <= 1, "above 0 and at most 1")
        used = group["schedule"] == "exponential" or group[key] == 1
        check(key, used, 'it takes effect only with schedule="exponential"')
    gamma_max, max_norm = group["gamma_max"], group["max_norm"]
    check("gamma_max", gamma_max is None or 0 < gamma_max < 2, "None, or between 0 and 2")
    check("max_norm", max_norm is None or max_norm > 0, "None, or a number above 0")
    check("weight_decay", group["weight_decay"] >= 0, "a number of at least 0")
    check("grad_scale", group["grad_scale"] in (None, "rms"), 'None or "rms"')
    check("state_dtype", group["state_dtype"] in (None, torch.float32, torch.bfloat16),
          "None, torch.float32 or torch.bfloat16")  # fmt: skip
    check("scope", group["scope"] in ("tensor", "group"), '"tensor" or "group"')
    check("foreach", not (group["foreach"] and group["fused"]), "foreach and fused exclude each other")
