"""Step in backward: each weight moves, and its gradient is freed, as soon as the gradient is ready."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from to_finetune.optim.blocks import is_group_wide
from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.stateful import Group

NEEDS_ALL = "it needs the gradients of all weights before the first one moves, which stepping in backward does not have"


class release_gradients:
    """Step `optimizer` inside ``loss.backward()``, so that only a few gradients are in memory at a time.

        with release_gradients(model, optimizer):   # or: handle = release_gradients(...); ...; handle.remove()
            for batch in batches:
                model(batch).loss.backward()        # moves the weights; optimizer.step() finds nothing left to do

    The trajectory is that of ``backward(); optimizer.step()``, bit for bit, for every option that works on one tensor
    at a time. A learning-rate scheduler steps between backward passes, as always. Activation checkpointing must not be
    reentrant if weights are used more than once in a step, by accumulation or by several layers: each use would be a
    backward pass of its own.

    Args:
        model: the model whose parameters the optimizer holds.
        optimizer: a TO whose blocks are tensors.
        accumulation_steps: backward passes per step; gradients are kept until the last pass and summed as torch does.
            If above 1, a weight that has a gradient in one pass of a step must have one in each.
        clip_tensor_norm: clip each tensor's gradient to this l2 norm on its own; None for no clipping. Clipping by
            the norm over all gradients, as in `torch.nn.utils.clip_grad_norm_`, is not possible here: that norm is
            unknown until the last weight has moved.

    Raises:
        ValueError: for an option of the optimizer that needs all gradients at once (`scope="group"` where it matters,
            `max_norm`, `skip_nonfinite`), a parameter that is not the model's, or a bad argument.
        RuntimeError: with several processes, unless the weights are sharded by FSDP2: DDP would average gradients only
            after the weights have moved. Checked again at every step. Also for parameters that the optimizer was given
            later, and if a weight had a gradient in only some passes of a step, so that the others moved without it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: TrainableOptimizer,
        *,
        accumulation_steps: int = 1,
        clip_tensor_norm: float | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps!r} is not valid: at least 1.")
        if clip_tensor_norm is not None and not clip_tensor_norm > 0:
            raise ValueError(f"clip_tensor_norm={clip_tensor_norm!r} is not valid: None, or a number above 0.")
        if isinstance(model, DistributedDataParallel):
            raise RuntimeError(_several_processes())
        of_model = set(model.parameters())
        for group in optimizer.param_groups:
            _check_group(group, optimizer)
            for p in group["params"]:
                if p not in of_model:
                    raise ValueError("The optimizer holds a parameter that is not the model's.")
                _check_process(p)
        self._optimizer = optimizer
        self._accumulation_steps = accumulation_steps
        self._clip = clip_tensor_norm
        self._waiting: dict[Tensor, int] = {}  # for their step's last pass, with their passes so far
        self._last_pass: int | None = None  # the backward pass that took the last step; None in later ones
        self._handles = list[RemovableHandle]()
        for group_index, group in enumerate(optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                self._handles.append(p.register_post_accumulate_grad_hook(self._hook(group_index, index)))

    def _hook(self, group_index: int, index: int) -> Callable[[Tensor], None]:
        def step(p: Tensor) -> None:
            _check_process(p)
            if sum(len(group["params"]) for group in self._optimizer.param_groups) > len(self._handles):
                raise RuntimeError("Parameters were added to the optimizer: call release_gradients again.")
            if not self._is_last_pass(p):
                return
            assert p.grad is not None
            if self._clip is not None:
                torch.nn.utils.clip_grad_norm_([p], self._clip)
            self._optimizer.step_parameter(group_index, index)
            p.grad = None

        return step

    def _is_last_pass(self, p: Tensor) -> bool:
        """Count a gradient of p and return whether it is the last one before its step."""
        current = torch._C._current_graph_task_id()
        if self._last_pass not in (None, current):
            if self._waiting:
                raise RuntimeError(
                    f"accumulation_steps={self._accumulation_steps}: {len(self._waiting)} weights had a gradient in "
                    "some of the passes to the last step only, and did not move with the others. Step after backward, "
                    "or, if that is due to reentrant checkpoints, use those with use_reentrant=False."
                )
            self._last_pass = None
        passes = self._waiting.pop(p, 0) + 1
        if passes < self._accumulation_steps:
            self._waiting[p] = passes
            return False
        self._last_pass = current
        return True

    def remove(self) -> None:
        """Remove the hooks, so that ``step()`` steps again. Gradients kept for accumulation stay in ``.grad``."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> release_gradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _check_group(group: Group, optimizer: TrainableOptimizer) -> None:
    for key in ("max_norm", "skip_nonfinite"):
        if group[key]:
            raise ValueError(f"{key}={group[key]!r} does not go with release_gradients: {NEEDS_ALL}.")
    is_full = optimizer.variant == "full" and group["scope"] == "group"
    if is_full or is_group_wide(optimizer.variant, group):
        raise ValueError(f"scope='group' does not go with release_gradients: {NEEDS_ALL}. Use scope='tensor'.")


def _check_process(p: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(p, DTensor):
        raise RuntimeError(_several_processes())


def _several_processes() -> str:
    return (
        "release_gradients steps before DDP has averaged the gradients, and the processes' weights would drift apart. "
        "Shard the model with FSDP2 (fully_shard), or step after backward."
    )
