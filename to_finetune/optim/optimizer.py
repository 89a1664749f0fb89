"""What the three optimizers share: parameter groups, lazy state, the gradient they see, checks, diagnostics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from to_finetune.optim.checks import check_hyperparameters
from to_finetune.optim.kernels import fused as fused_path
from to_finetune.optim.kernels.batch import ERROR, GG, PEAK, Batch, Carried, Member, as_vector, may_read
from to_finetune.optim.kernels.inplace import Rule, apply_
from to_finetune.optim.rules import SMALLEST_DIVISOR, rms_normalized, sum_of_squares
from to_finetune.optim.schedules import Rates, decoupled_decay, rates_at
from to_finetune.optim.state import new_state, random_bits, state_key, write_

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]
COUNTERS = ("step", "pairs", "skipped")


class TrainableOptimizer(Optimizer, ABC):
    """Base class of `DiagonalTO`, `RankOneTO` and `FullTO`, which differ in the form of the slope alone.

    A variant names its state in `state_names` (tensors of the weight's shape that start at zero), the fast paths
    that it has in `fast_paths`, and says in `_update` how a group's weights move on the plain path. State is created
    in `step()` and never changes its dtype on loading.
    """

    state_names: tuple[str, ...]
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.int8)
    fast_paths: tuple[str, ...] = ()
    variant: str  # its name in the fused kernels

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
        state_dtype: torch.dtype | str | None = None,
        *,
        lr_decay: float = 1.0,
        scope: Literal["tensor", "group"] = "tensor",
        seed: int = 0,
        skip_nonfinite: bool = False,
        capturable: bool = False,
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
            foreach: update all tensors together with torch's multi-tensor operations. None: on CUDA where the fused
                kernels are missing. DiagonalTO only: the other two are sums over blocks, which torch has no
                multi-tensor operation for.
            fused: our kernels, which read and write each number once: C++ on the CPU, compiled on first use (needs
                a C++ compiler), Triton on CUDA. None: wherever they are to be had. DiagonalTO and RankOneTO, for
                contiguous weights of float32 and bfloat16; others take the plain path, with the same results.
            state_dtype: None for float32 (float64 for float64 weights), torch.float32, torch.bfloat16, torch.int8 (of
                DiagonalTO and RankOneTO; blocks of 32, 1.03 bytes a number), or their names. bfloat16 and int8 state,
                and bfloat16 weights, are rounded at random: see `to_finetune.optim.state`.
            lr_decay: factor a step of lr under ``schedule="exponential"``. Added to the rates of the paper's
                scheme so that it is whole in a plain loop, without an LR scheduler.
            scope: the block that shares one slope: "tensor", or "group" for all weights of a parameter group as
                one vector, the paper's mathematics. For DiagonalTO, whose slope is elementwise, it only says what
                `relative_alpha` takes the mean over.
            seed: of the random rounding; the same in all replicas.
            skip_nonfinite: (ours) a step in which any gradient is infinite or NaN changes nothing and is not counted
                (`skipped_steps` counts it), without a GradScaler and without waiting for the device. Takes one more
                pass over the gradients, which `grad_scale` and RankOneTO take anyhow. FullTO waits for the device.
            capturable: keep counts and rates on the device, so that a CUDA graph can hold the step. lr must then be a
                tensor on the device for a captured step to follow its changes. Not of FullTO, whose memory grows.

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
            "seed": seed,
            "skip_nonfinite": skip_nonfinite,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a version that had fewer options
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._forget_last_step()

    def _forget_last_step(self) -> None:
        self._carried: dict[Tensor, Carried] = {}
        self._skip: Tensor | None = None  # whether the last step was skipped, where that is asked for
        self._forget_diagnostics()

    def _forget_diagnostics(self) -> None:
        self._squares: dict[Tensor, tuple[Tensor, Tensor]] = {}  # |G - g|^2 and |g|^2, by a block's first tensor
        self._peaks: dict[Tensor, tuple[Tensor, Tensor]] = {}  # max|g| and |g|^2

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if isinstance(group["state_dtype"], str):
                group["state_dtype"] = getattr(torch, group["state_dtype"], group["state_dtype"])
            check_hyperparameters(group, self.state_dtypes)
            if group["capturable"] and not self.fast_paths:
                raise ValueError(f"capturable=True is not valid: the memory of {type(self).__name__} grows.")
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

        Counts stay on the CPU, so that reading one never waits for a device, unless the device itself counts.
        """
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = ((group, p) for group in self.param_groups for p in group["params"])
        for saved_id, (group, p) in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    device = _counting_device(group, p) if name in COUNTERS else p.device
                    self.state[p][name] = value.to(device)

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
        self._take_step()
        return loss

    @torch.compiler.disable(recursive=True)  # the kernels are compiled already; a user's compiled loop calls them
    def _take_step(self) -> None:
        work, position = [], 0
        for group in self.param_groups:
            params = enumerate(group["params"], position)
            members = [self._member(group, i, p, grad) for i, p in params if (grad := p.grad) is not None]
            work.append((group, members))
            position += len(group["params"])
        if not any(members for _, members in work):
            return
        self._forget_diagnostics()
        self._step_members(work)
        position = 0
        for group, members in work:
            if members and group["max_norm"] is not None:
                self._project(group, position)
            position += len(group["params"])

    @torch.no_grad()
    @torch.compiler.disable(recursive=True)
    def step_parameter(self, group_index: int, position: int, p: Tensor) -> None:
        """One step of one parameter that has a gradient, as `release_gradients` takes them.

        Args:
            group_index: the parameter group that holds it.
            position: its index among all parameters of the optimizer.
            p: the parameter.
        """
        group = self.param_groups[group_index]
        assert p.grad is not None
        self._step_members([(group, [self._member(group, position, p, p.grad)])])

    def _member(self, group: Group, position: int, p: Tensor, grad: Tensor) -> Member:
        """A parameter that has a gradient, with its state, made here if there is none."""
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients.")
        state = self.state[p]
        if not state:
            state.update(self._initial_state(group, p))
        return Member(position, p, grad, state)

    def _step_members(self, work: Sequence[tuple[Group, list[Member]]]) -> None:
        """Move these parameters, and count the step."""
        parts = [(group, *self._split(group, [m for m in members if m.p.numel() > 0])) for group, members in work]
        for _, batches, _ in parts:
            fused_path.measure(batches, self._carried)
        self._skip = _nonfinite(parts)
        known_to_skip = self._skip is not None and self._skip.device.type == "cpu" and bool(self._skip)
        for group, batches, others in parts:
            if batches and not known_to_skip:
                self._update_fused(group, batches)
            if others and not known_to_skip:
                self._update(group, others)
        for group, members in work:
            self._count(group, members)

    def _split(self, group: Group, members: list[Member]) -> tuple[list[Batch], list[Member]]:
        """Those that the fused kernels take, in batches, and the others."""
        if "fused" not in self.fast_paths or group["fused"] is False or group["foreach"]:
            return [], members
        return fused_path.split(self.variant, group, members, self.state_names)

    def _update_fused(self, group: Group, batches: list[Batch]) -> None:
        for batch, sums in zip(batches, fused_path.step(batches, self._skip, self._carried), strict=True):
            first = batch.params[0]
            self._squares[first] = (sums[:, ERROR], sums[:, GG])
            if group["grad_scale"] is not None:
                self._peaks[first] = (sums[:, PEAK], sums[:, GG])

    @abstractmethod
    def _update(self, group: Group, members: list[Member]) -> None:
        """Move weights and state of the group's members, all non-empty and with a gradient, on the plain path."""

    def _initial_state(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        counters = {"step": 0.0, "skipped": 0.0} if group["skip_nonfinite"] else {"step": 0.0}
        state = {name: torch.full((), x, device=_counting_device(group, p)) for name, x in counters.items()}
        for name in self.state_names:
            state.update(new_state(p, name, group["state_dtype"] or compute_dtype(p)))
        return state

    def _count(self, group: Group, members: Sequence[Member]) -> None:
        """Count the step, or that it was skipped."""
        alike: dict[torch.device, list[dict[str, Tensor]]] = {}
        for member in members:
            alike.setdefault(member.state["step"].device, []).append(member.state)
        for device, states in alike.items():
            amounts: dict[str, float | Tensor] = {"step": 1.0}
            if self._skip is not None:
                skipped = self._skip.to(device, torch.float32)
                amounts["step"] = 1.0 - skipped
                if group["skip_nonfinite"]:
                    amounts["skipped"] = skipped
            for name, amount in amounts.items():
                counts = as_vector(states, name)
                counts += amount
                if states[0][name]._base is not counts:  # new, or of a loaded state, which may share one tensor
                    for state, count in zip(states, counts.unbind(), strict=True):
                        state[name] = count

    def _rates(self, group: Group, member: Member, dtype: torch.dtype) -> Rates:
        """The rates of a parameter's next step, on the plain path."""
        taken = member.state["step"]
        if may_read(group, taken):
            return rates_at(int(taken), group)
        return Rates(*(x.to(dtype) if isinstance(x, Tensor) else x for x in rates_at(taken.double(), group)))

    def _key(self, group: Group, member: Member) -> int | Tensor:
        """The key of the random bits with which a parameter's next step is stored."""
        taken = member.state["step"]
        if may_read(group, taken):
            return state_key(group["seed"], int(taken), member.position)
        return state_key(group["seed"], taken.long(), torch.tensor(member.position))

    def _gradient(self, group: Group, member: Member) -> Tensor:
        """The gradient that the regression sees, in p's compute dtype; it may share p.grad's memory."""
        p = member.p
        g = member.grad.to(compute_dtype(p))
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            g = g + (-group["weight_decay"] if group["maximize"] else group["weight_decay"]) * p.to(g.dtype)
        if group["maximize"]:
            g = -g
        if group["grad_scale"] == "rms":
            g, peak = rms_normalized(g)
            self._peaks[p] = (peak, torch.ones_like(peak))
        return g

    def _apply(self, rule: Rule, group: Group, member: Member, g: Tensor, **block_sums: Any) -> None:
        """Move one tensor by an elementwise rule, given the sums over its block where p is a piece of one."""
        p = member.p
        rates = self._rates(group, member, g.dtype)
        self._squares[p] = apply_(
            rule,
            p,
            g,
            member.state,
            self.state_names,
            **rates._asdict(),
            decay=decoupled_decay(group, rates),
            key=self._key(group, member),
            skip=self._skip_on(p.device),
            gamma_max=group["gamma_max"],
            relative_alpha=group["relative_alpha"],
            **block_sums,
        )

    def _skip_on(self, device: torch.device) -> Tensor | None:
        return None if self._skip is None else self._skip.to(device)

    def _project(self, group: Group, first: int) -> None:
        """Project the vector of the group's weights, the `first` of the optimizer's on, onto the ball of max_norm."""
        scale = (group["max_norm"] / total([sum_of_squares(p) for p in group["params"]]).sqrt()).clamp(max=1.0)
        if self._skip is not None:
            scale = torch.where(self._skip.to(scale.device), 1.0, scale)
        lr = torch.as_tensor(group["lr"])
        scale = torch.where(lr.to(scale.device) > 0, scale, 1.0)  # with lr 0 no weight changes at all
        for position, p in enumerate(group["params"], first):
            dtype = compute_dtype(p)
            bits = None
            if p.dtype == torch.bfloat16:
                steps = int(self.state[p]["step"]) if self.state[p] else 0
                bits = random_bits(p, state_key(group["seed"], steps, ~position))  # not those of the next step
            write_(p, p.to(dtype) * scale.to(p.device, dtype), bits, 0)

    def estimate_error(self) -> Tensor:
        """``||G - g|| / ||g||`` of the last step, over all weights: how far the estimate is from the gradient.

        0-dim, on the device of the first weights; nothing waits for the device until its value is read
        (``.item()``). g is the gradient that the regression sees: with coupled weight decay and after
        `grad_scale`. NaN before the first step, and for a gradient of zeros.
        """
        if not self._squares:
            return torch.tensor(torch.nan)
        error, norm = (total(parts) for parts in zip(*self._squares.values(), strict=True))
        return (error / norm).sqrt()

    def gradient_peak(self) -> Tensor:
        """The largest share ``max|g| / ||g||`` that one element had of its tensor's gradient in the last step.

        0-dim. With ``grad_scale="rms"`` a value near 1 says that one huge element has scaled all the others of
        its tensor down to nothing. NaN without `grad_scale`, and before the first step.
        """
        if not self._peaks:
            return torch.tensor(torch.nan)
        shares = [(peak / norm.sqrt().clamp(min=SMALLEST_DIVISOR)).max() for peak, norm in self._peaks.values()]
        return torch.stack([share.to(shares[0].device) for share in shares]).max()

    def skipped_steps(self) -> Tensor:
        """How many steps `skip_nonfinite` has skipped, over all runs of this state; 0-dim, on the weights' device."""
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        if not counts:
            return torch.tensor(0.0)
        return torch.stack([count.to(counts[0].device) for count in counts]).max()


def compute_dtype(p: Tensor) -> torch.dtype:
    """float32 for weights up to 32 bits, float64 for float64."""
    return torch.promote_types(p.dtype, torch.float32)


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all elements, 0-dim, on the device of the first."""
    return torch.stack([part.sum().to(parts[0].device) for part in parts]).sum()


def _counting_device(group: Group, p: Tensor) -> torch.device:
    """Where p's steps are counted: on the CPU, where reading them never waits, unless the device itself decides."""
    return p.device if group["capturable"] or group["skip_nonfinite"] else torch.device("cpu")


def _nonfinite(work: Sequence[tuple[Group, list[Batch], list[Member]]]) -> Tensor | None:
    """Whether any gradient is infinite or NaN, 0-dim bool; None where nobody asks."""
    if not any(group["skip_nonfinite"] for group, _, _ in work):
        return None
    finite = []
    for _, batches, others in work:
        for batch in batches:
            if batch.needs_gradient_sums and batch.sums is not None:
                finite.append(batch.sums[:, GG].isfinite().all())
            else:
                finite += [g.isfinite().all() for g in batch.grads]
        finite += [member.grad.isfinite().all() for member in others]
    flags = [x.full_tensor() if isinstance(x, DTensor) else x for x in finite] or [torch.tensor(True)]
    return ~torch.stack([x.to(flags[0].device) for x in flags]).all()
