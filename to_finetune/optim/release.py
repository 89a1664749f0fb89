"""Step in backward: each weight moves, and gives its gradient's memory back, as soon as its gradient is there."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.stateful import Group

NEEDS_ALL = "it needs the gradients of all weights before the first one moves, which stepping in backward does not have"


class release_gradients:
    """Step `optimizer` inside ``loss.backward()``, so that never more than a few gradients are in memory.

        with release_gradients(model, optimizer):   # or: handle = release_gradients(...); ...; handle.remove()
            for batch in batches:
                model(batch).loss.backward()        # moves the weights; optimizer.step() finds nothing left to do

    The trajectory is that of ``backward(); optimizer.step()``, bit for bit, for every option that looks at one tensor
    at a time. A learning-rate scheduler steps between backward passes, as always.

    Args:
        model: the model whose parameters the optimizer holds.
        optimizer: a TO whose blocks are tensors.
        accumulation_steps: backward passes to a step; gradients are kept until the last of them, summed as torch does.
        clip_tensor_norm: each tensor's gradient is clipped to this l2 norm by itself. The norm over all gradients,
            which `torch.nn.utils.clip_grad_norm_` takes, is not known before the last weight has moved, so this is
            another clipping, and clipping by the global norm does not exist here. None for none.

    Raises:
        ValueError: for an option of the optimizer that needs all gradients at once (`scope="group"` where it matters,
            `max_norm`, `skip_nonfinite`), a parameter that is not the model's, or a bad argument.
        RuntimeError: with several processes, unless the weights are FSDP2's: DDP averages gradients only after the
            weights here would have moved. Checked again at every step.
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
        self._passes: dict[Tensor, int] = {}
        self._handles = []
        for group_index, group in enumerate(optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                self._handles.append(p.register_post_accumulate_grad_hook(self._hook(group_index, index)))

    def _hook(self, group_index: int, index: int) -> Callable[[Tensor], None]:
        def step(p: Tensor) -> None:
            _check_process(p)
            self._passes[p] = self._passes.get(p, 0) + 1
            if self._passes[p] < self._accumulation_steps:
                return
            self._passes[p] = 0
            assert p.grad is not None
            if self._clip is not None:
                torch.nn.utils.clip_grad_norm_([p], self._clip)
            self._optimizer.step_parameter(group_index, index)
            p.grad = None

        return step

    def remove(self) -> None:
        """Let the optimizer step by ``step()`` again. Gradients that are kept for accumulation stay in ``.grad``."""
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
    if group["scope"] == "group" and (type(optimizer).__name__ != "DiagonalTO" or group["relative_alpha"]):
        raise ValueError(f"scope='group' does not go with release_gradients: {NEEDS_ALL}. Use scope='tensor'.")


def _check_process(p: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(p, DTensor):
        raise RuntimeError(_several_processes())


def _several_processes() -> str:
    return (
        "release_gradients steps before DDP has averaged the gradients, and the processes' weights would drift apart. "
        "Shard the model with FSDP2 (fully_shard), or step after backward."
    )
