"""The memory of an optimizer's state, measured by letting the optimizer create it for weights without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer

from to_finetune.optim import FullTO, TrainableOptimizer
from to_finetune.optim.full import history_is_smaller, more_rows
from to_finetune.planning.dry_run import LiveBytes
from to_finetune.planning.settings import CannotSay, Settings

PAGED_FROM = 100_000  # elements; bitsandbytes leaves smaller state unpaged


class StateBytes(NamedTuple):
    """Bytes that an optimizer takes.

    Attributes:
        held: state, from the first step on.
        paged: the part of it that the driver moves to CPU memory when the GPU's does not suffice.
        in_step: temporary memory of a step.
    """

    held: int
    paged: int
    in_step: int


def state_bytes(settings: Settings, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> StateBytes:
    """Return the optimizer's bytes for trained weights of these shapes.

    Raises:
        CannotSay: for an optimizer that cannot create its state without data.
    """
    name = getattr(settings.optimizer, "__name__", str(settings.optimizer))
    try:
        with FakeTensorMode():
            parameters = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
            if settings.optimizer.__module__.startswith("bitsandbytes"):
                with unset_fake_temporarily():  # its constructor computes quantisation tables
                    optimizer = settings.optimizer(parameters, **settings.optimizer_options)
                return _bitsandbytes_bytes(optimizer)
            return _state_bytes(settings, settings.optimizer(parameters, **settings.optimizer_options), parameters)
    except Exception as error:  # an optimizer may fail on fake tensors in any way
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise CannotSay(f"The state of {name} is not known: it cannot be made without data ({reason}).") from error


def _state_bytes(settings: Settings, optimizer: Optimizer, parameters: Sequence[Tensor]) -> StateBytes:
    if isinstance(optimizer, FullTO):
        return StateBytes(_full_bytes(optimizer, settings.max_steps), 0, 0)
    if isinstance(optimizer, TrainableOptimizer):
        optimizer.held()  # creates the state; a step needs 1 MiB more, or up to 50 on a GPU or in shards
        return StateBytes(_bytes_of(_tensors(optimizer)), 0, 0)
    for group in optimizer.param_groups:
        if settings.work.device != "cpu" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice on a GPU
    for p in parameters:
        p.grad = torch.empty_like(p)
    with LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None)]) as live:
        optimizer.step()
    held = _bytes_of(_tensors(optimizer))
    return StateBytes(held, 0, max(0, live.peak - held))


def _bitsandbytes_bytes(optimizer: Any) -> StateBytes:
    """Create the state without a step: bitsandbytes' kernels need data, its state does not."""
    is_paged, optimizer.is_paged = optimizer.is_paged, False
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            optimizer.init_state(group, p, i, j)
    tensors = _tensors(optimizer)
    paged = [t for t in tensors if t.numel() >= PAGED_FROM] if is_paged else []
    return StateBytes(_bytes_of(tensors), _bytes_of(paged), 0)


def _full_bytes(optimizer: FullTO, steps: int | None) -> int:
    """Return the bytes of FullTO's state after `steps`; without it, its largest: b, and a matrix for each block."""
    total = 0
    for group in optimizer.param_groups:
        numels = [p.numel() for p in group["params"]]
        itemsize = (group["state_dtype"] or torch.float32).itemsize
        total += sum(numels) * itemsize + 4 * len(numels)
        blocks = numels if group["scope"] == "tensor" else [sum(numels)]
        total += sum(_slope_numbers(n, steps) * itemsize + 8 * _has_history(n, steps) for n in blocks)
    return total


def _slope_numbers(n: int, steps: int | None) -> int:
    """Count a block's slope elements: pairs of vectors, in buffers that double, or the matrix once it is smaller."""
    if steps is None or not _has_history(n, steps):
        return n * n
    rows = 0
    while rows < steps:
        rows = more_rows(n, rows)
    return 2 * rows * n


def _has_history(n: int, steps: int | None) -> bool:
    return steps is not None and history_is_smaller(n, steps)


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of the tensors' storages, shared ones once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
