"""Base class of the three optimizers: their options, and the step from gradients to weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from to_finetune.optim import edges
from to_finetune.optim.blocks import ERROR, GG, PEAK, SUMS, WW, New, Part, is_capturing, share
from to_finetune.optim.diagnostics import Diagnostics
from to_finetune.optim.factored import Matrices, equalize_, matrices_of
from to_finetune.optim.kernels import fused as fused_path
from to_finetune.optim.kernels.batch import Batch, Carried, may_read
from to_finetune.optim.kernels.inplace import Rule, member_bits, moved, store_
from to_finetune.optim.prepared import Counts, Prepared
from to_finetune.optim.rules import sum_of_squares
from to_finetune.optim.schedules import Rates, decoupled_decay, rates_at
from to_finetune.optim.sharding import Member, Shards, all_reduce, members_of
from to_finetune.optim.state import state_key, write_
from to_finetune.optim.stateful import Group, Params, StatefulOptimizer, compute_dtype


class TrainableOptimizer(StatefulOptimizer):
    """Base class of `DiagonalTO`, `RankOneTO` and `FullTO`, which differ only in the form of the slope.

    A variant describes its state (see `StatefulOptimizer`), the sums that it needs over a block (`_own_sums`) and how
    weights move on the plain path (`_update`). State is created in `step()`, and loading never changes its dtype.
    """

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
        grad_scale: Literal["rms", "factored"] | None = None,
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
        """The defaults are the paper's algorithm with the stability guard on; our extensions are marked (ours).

        Args:
            params: tensors, (name, tensor) pairs, or parameter groups with their own hyper-parameters.
            lr: learning rate of the weights, a float or a 0-dim tensor. G has the scale of a gradient, so
                choose rates as for SGD, not as for Adam, unless `grad_scale` is set.
            alpha: learning rate of the slope (A, a, or u and v).
            beta: learning rate of the offset b, in [0, 1]; ``alpha=0`` is momentum with decay ``1 - beta``.
            alpha_decay: factor per step for alpha and beta under ``schedule="exponential"``.
            schedule: "constant"; "exponential"; or "theorem": ``lr/(t+t0)``, ``alpha/(t+t0)^2``,
                ``beta/(t+t0)`` in step t = 0, 1, ...
            t0: offset of the theorem's schedule, above 0; beta may then be up to t0.
            gamma_max: (ours) the guard, between 0 and 2: alpha is lowered where one step would otherwise multiply
                the residual by less than ``1 - gamma_max``. None is the paper's exact update, which may diverge.
            max_norm: radius of the l2 ball that a group's weights, as one vector, are projected onto after the
                step (Proposition 2's feasible set); None for no projection.
            weight_decay: L2 factor, added to the gradient (coupled), as in the paper's theorem.
            decoupled_weight_decay: shrink the weights by ``lr * weight_decay`` instead, as AdamW does.
            relative_alpha: (ours) alpha in units of one over the block's own scale: ``mean(w^2)`` (Diagonal),
                ``(v.w)^2 + ||u||^2 ||w||^2`` but at least ``mean(w^2)`` (RankOne), ``||w||^2`` (Full). alpha then
                means the same for small and large weights. A step may reuse the scale that the last one measured;
                call `forget_last_step` after a change through ``.data``, which torch does not track.
            grad_scale: (ours) "rms" first divides each tensor's gradient by its own root mean square, so that lr, alpha
                and beta mean the same for every tensor and model. "factored" first brings the rows of a matrix to the
                same scale, likewise its columns (`to_finetune.optim.factored`), in ``p.grad`` itself, as clipping does;
                weight decay must then be decoupled. It is meant for hidden layers: put embeddings and output heads
                into a group of their own with "rms", as our Trainer does, or rare tokens move too far.
            maximize: ascend instead of descend.
            foreach: update all tensors together with torch's multi-tensor operations. None: on CUDA, if the fused
                kernels are not used. DiagonalTO only: the other two need sums over blocks, for which torch has no
                multi-tensor operation.
            fused: use our kernels, which read and write each number once: C++ on the CPU, compiled on first use
                (needs a C++ compiler), Triton on CUDA. None: wherever they are available. DiagonalTO and RankOneTO
                only, for contiguous float32 and bfloat16 weights; others take the plain path, with the same results.
            state_dtype: None for float32 (float64 for float64 weights), torch.float32, torch.bfloat16, torch.int8
                (DiagonalTO and RankOneTO only; blocks of 32, 1.03 bytes per number), or one of their names. bfloat16
                and int8 state and bfloat16 weights are rounded stochastically: see `to_finetune.optim.state`.
            lr_decay: factor per step for lr under ``schedule="exponential"``. Added to the rates of the paper's
                scheme so that it is complete in a plain loop, without an LR scheduler.
            scope: the block that shares one slope: "tensor", or "group" for all weights of a parameter group as
                one vector, the paper's mathematics. For DiagonalTO, whose slope is elementwise, it only determines
                what `relative_alpha` averages over.
            seed: seed of the stochastic rounding; must be the same in all replicas.
            skip_nonfinite: (ours) skip a step in which any gradient is infinite or NaN: nothing changes, and the step
                is not counted (`skipped_steps` counts it). Needs no GradScaler and, except with FullTO, never waits
                for the device. Costs one more pass over the gradients, which `grad_scale` and RankOneTO need anyway.
            capturable: keep step counts and rates on the device, so that a CUDA graph can capture the step. For a
                captured step to follow changes of lr, lr must be a tensor on the device. Not available for FullTO,
                whose memory grows.

        Raises:
            ValueError: for a hyper-parameter out of its range, a fast path that the variant does not have, or
                complex or integer weights.
        """
        self.forget_last_step()
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

    def forget_last_step(self) -> None:
        """Drop everything cached from the last step; call it after changing weights or state through ``.data``."""
        self._carried: dict[int, Carried] = {}  # by the position of a batch's first member
        self._prepared: Prepared | None = None  # the last step, if the next one may reuse it
        self._skip: Tensor | None = None  # whether the last step was skipped; None without `skip_nonfinite`
        self._edge_slots: edges.Slots = {}
        self._diagnostics = Diagnostics()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and return the closure's loss, if a closure is given.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @torch.compiler.disable(recursive=True)  # the kernels are compiled already; a compiled training loop calls them
    def _take_step(self) -> None:
        step = self._next()
        first = next((member for _, members in step.work for member in members), None)
        if first is None:
            return
        if not first.is_flat:  # DeepSpeed steps its partitions one by one: keep those of the others
            self._diagnostics = Diagnostics()
        self._step_members(step)
        for group, members in step.work:
            if members and group["max_norm"] is not None:
                self._project(group)
        step.let_go()
        if step.repeats and not is_capturing():  # a graph's tensors have no values before its first replay
            self._prepared = step

    def _next(self) -> Prepared:
        """Reuse the last step with new gradients; prepare another if more changed or a graph must capture it all."""
        step, self._prepared = self._prepared, None
        if step is None or is_capturing() or not step.take_gradients(self.param_groups, self.state):
            self._look_again()
            return self._prepare([(group, self._members(group)) for group in self.param_groups])
        for matrices in step.matrices:
            equalize_(matrices)
        return step

    @torch.no_grad()
    @torch.compiler.disable(recursive=True)
    def step_parameter(self, group_index: int, index: int) -> None:
        """Take one step of one parameter that has a gradient; `release_gradients` calls this.

        Args:
            group_index: the index of the parameter's group.
            index: the parameter's index in that group.
        """
        group = self.param_groups[group_index]
        p = group["params"][index]
        members = self._members_of(group, p, p.grad, self._layout(group, index, p))
        self._step_members(self._prepare([(group, members)]))

    def _prepare(self, work: Sequence[tuple[Group, list[Member]]]) -> Prepared:
        """Prepare a step of these groups; with ``grad_scale="factored"``, scale their gradients by rows and columns."""
        matrices: list[Matrices] = []
        if any(group["grad_scale"] == "factored" for group, _ in work):
            matrices = matrices_of(work, [shape for given in self._given for shape in given.shapes])
        for known in matrices:
            equalize_(known)  # before any part takes a copy of a gradient
        may_skip = any(group["skip_nonfinite"] for group, _ in work)
        parts = [part for group, members in work for part in self._parts(group, members, may_skip)]
        return Prepared(work, parts, matrices, self.state, self.defaults.keys())

    def _step_members(self, step: Prepared) -> None:
        """Update the weights and count the step."""
        work, parts, may_skip = step.work, step.parts, any(group["skip_nonfinite"] for group, _ in step.work)
        self._diagnostics.expect(step.sharers)
        self._measure(parts)
        norms = share(self.variant, may_skip, work, parts)
        for part in parts:
            if part.totals is not None and part.sums is not None:
                self._diagnostics.add_peaks(part, part.sums, part.totals.norm_square)
        self._skip = _nonfinite(norms) if may_skip else None
        if self._skip is None or self._skip.device.type != "cpu" or not self._skip:
            for part in parts:
                if isinstance(part, Batch):
                    self._update_fused(part)
                else:
                    self._update(part)
            edges.store(work, [new for part in parts for new in part.pending or ()], self._edge_slots)
        for counts in step.counts:
            self._count(counts)

    def _parts(self, group: Group, members: list[Member], may_skip: bool) -> list[Part]:
        """Split members into batches for the fused kernels and parts for the plain path, edges of int8 blocks apart."""
        members = [member for member in members if member.p.numel() > 0]
        members, cut = edges.split(members, self.state_names)
        batches: list[Batch] = []
        if "fused" in self.fast_paths and fused_path.may_fuse(group):
            batches, members = fused_path.split(self.variant, group, members, self.state_names, may_skip)
        plain: dict[tuple[Shards, bool], Part] = {}
        for those, are_edges in ((members, False), (cut, True)):
            for member in those:
                new = Part(group, self.variant, [], may_skip, pending=[] if are_edges else None)
                plain.setdefault((member.shards, are_edges), new).members.append(member)
        return [*batches, *plain.values()]

    def _measure(self, parts: Sequence[Part]) -> None:
        batches = [part for part in parts if isinstance(part, Batch)]
        for batch in batches:
            batch.take_gradients()
        fused_path.measure(batches, self._carried)
        for part in parts:
            if not isinstance(part, Batch) and (part.needs_gradient_sums or part.needs_weight_sums):
                part.sums = torch.stack([self._sums(part, member) for member in part.members])

    def _sums(self, part: Part, member: Member) -> Tensor:
        """Compute the sums over a member that its part needs: a row of `Part.sums`, (8,) float64."""
        g = self._gradient(part.group, member)
        found = self._own_sums(member, g) if part.needs_weight_sums else {}
        if part.needs_gradient_sums:
            found |= {GG: sum_of_squares(g), PEAK: g.abs().amax()}
        like = found.get(GG, found.get(WW))
        assert like is not None
        return torch.stack([found[k].to(like) if k in found else torch.zeros_like(like) for k in range(SUMS)])

    def _own_sums(self, member: Member, g: Tensor) -> dict[int, Tensor]:
        """Compute the variant's own sums, by their columns in `Part.sums`."""
        return {}

    def _update_fused(self, batch: Batch) -> None:
        sums = fused_path.step(batch, self._skip, self._carried)
        self._diagnostics.add_squares(batch.members[0], sums[:, ERROR], sums[:, GG])
        if batch.measures_itself:
            self._diagnostics.add_peaks(batch, sums, sums[:, GG])

    @abstractmethod
    def _update(self, part: Part) -> None:
        """Update a part's weights and state on the plain path."""

    def _count(self, counts: Counts) -> None:
        """Count the step as taken or as skipped."""
        if self._skip is None:
            counts.add("step", 1.0)
            return
        skipped = self._skip.to(counts.device, torch.float32)
        counts.add("step", 1.0 - skipped)
        if counts.group["skip_nonfinite"]:
            counts.add("skipped", skipped)

    def _rates(self, group: Mapping[str, Any], member: Member, dtype: torch.dtype) -> Rates:
        """Return the rates of a parameter's next step, on the plain path."""
        taken = member.state["step"]
        if may_read(group, taken):
            return rates_at(int(taken), group)
        return Rates(*(x.to(dtype) if isinstance(x, Tensor) else x for x in rates_at(taken.double(), group)))

    def _key(self, group: Mapping[str, Any], member: Member, position: int) -> int | Tensor:
        """Return the key of the random bits that round a parameter's next step.

        Args:
            position: the parameter's; its complement for the projection after the step, which needs other bits.
        """
        taken = member.state.get("step", torch.tensor(0.0, device="cpu"))
        if may_read(group, taken):
            return state_key(group["seed"], int(taken), position)
        return state_key(group["seed"], taken.long(), torch.tensor(position, device="cpu"))

    def _gradient(self, group: Mapping[str, Any], member: Member) -> Tensor:
        """Return the gradient in p's compute dtype, with coupled weight decay and sign; it may alias ``p.grad``."""
        p = member.p
        g = member.grad.to(compute_dtype(p))
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            g = g + (-group["weight_decay"] if group["maximize"] else group["weight_decay"]) * p.to(g.dtype)
        return -g if group["maximize"] else g

    def _scaled_gradient(self, part: Part, i: int) -> Tensor:
        """Return the gradient that the regression of a part's i-th member sees."""
        g = self._gradient(part.group, part.members[i])
        if part.totals is None or part.totals.factor is None:
            return g
        return g * part.totals.factor[i].to(g.dtype)

    def _apply(self, rule: Rule, part: Part, i: int, **block_sums: Any) -> None:
        """Update a part's i-th member by an elementwise rule, given the sums over its block."""
        group, member, g = part.group, part.members[i], self._scaled_gradient(part, i)
        rates = self._rates(group, member, g.dtype)
        w, state, G = moved(
            rule,
            member,
            g,
            self.state_names,
            decoupled_decay(group, rates),
            **rates._asdict(),
            gamma_max=group["gamma_max"],
            relative_alpha=group["relative_alpha"],
            **block_sums,
        )
        self._finish(part, i, w, state, G - g, g)

    def _finish(self, part: Part, i: int, w: Tensor, state: Sequence[Tensor], error: Tensor, g: Tensor) -> None:
        """Store a member's new values, or leave them to `edges.store`."""
        member = part.members[i]
        self._diagnostics.add_squares(member, sum_of_squares(error), sum_of_squares(g))
        key = self._key(part.group, member, member.position)
        new = New(member, w, self.state_names, state, key, self._skip_on(w.device))
        if part.pending is None:
            store_(new)
        else:
            part.pending.append(new)

    def _skip_on(self, device: torch.device) -> Tensor | None:
        return None if self._skip is None else self._skip.to(device)

    def _project(self, group: Group) -> None:
        """Project the group's weights, as one vector, onto the ball of radius max_norm."""
        if not isinstance(group["lr"], Tensor) and group["lr"] == 0:
            return  # with lr 0 no weight changes at all
        members = []
        for p, layout in self.layouts(group):
            members += members_of(layout, p, p, self.state.get(p, {}))
        squares: dict[Shards, list[Tensor]] = {}
        for member in members:
            squares.setdefault(member.shards, []).append(sum_of_squares(member.p))
        norm = total([all_reduce(total(parts), shards) for shards, parts in squares.items()]).sqrt()
        scale = (group["max_norm"] / norm).clamp(max=1.0)
        if self._skip is not None:
            scale = torch.where(self._skip.to(scale.device), 1.0, scale)
        if isinstance(group["lr"], Tensor):
            scale = torch.where(group["lr"].to(scale.device) > 0, scale, 1.0)
        for member in members:
            p, bits = member.p, None
            if p.dtype == torch.bfloat16:
                bits = member_bits(member, self._key(group, member, ~member.position))
            dtype = compute_dtype(p)
            write_(p, p.to(dtype) * scale.to(p.device, dtype), bits, 0)

    def estimate_error(self) -> Tensor:
        """Return ``||G - g|| / ||g||`` of the last step, over all weights: the relative error of the estimate.

        0-dim, on the device of the first weights; nothing waits for the device until the value is read
        (``.item()``). g is the gradient that the regression sees: with coupled weight decay and after
        `grad_scale`. NaN before the first step; not finite if all gradients are zero. With sharded weights, all
        processes must call it.
        """
        return self._diagnostics.estimate_error()

    def gradient_peak(self) -> Tensor:
        """Return the largest ``max|g| / ||g||`` of any tensor's gradient in the last step, 0-dim.

        With ``grad_scale="rms"``, a value near 1 means that one huge element has scaled all others of its tensor down
        to almost nothing. NaN without `grad_scale` and before the first step. With sharded weights, all processes
        must call it.
        """
        if not any(group["grad_scale"] for group in self.param_groups):
            return torch.tensor(torch.nan, device="cpu")
        return self._diagnostics.gradient_peak()

    def skipped_steps(self) -> Tensor:
        """Return how many steps `skip_nonfinite` has skipped, resumed runs included; 0-dim, on the weights' device."""
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        if not counts:
            return torch.tensor(0.0, device="cpu")
        return torch.stack([count.to(counts[0].device) for count in counts]).max()


def total(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of all elements, 0-dim, on the first part's device."""
    return torch.stack([part.sum().to(parts[0].device) for part in parts]).sum()


def _nonfinite(norms: Sequence[Tensor]) -> Tensor:
    """Return whether any gradient is infinite or NaN, 0-dim bool, given ``||g||^2`` of all tensors."""
    finite = [norm.isfinite().all() for norm in norms] or [torch.tensor(True, device="cpu")]
    return ~torch.stack([x.to(finite[0].device) for x in finite]).all()
