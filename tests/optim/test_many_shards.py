"""Up to 1,024 shards, in one process: the number of shards does not matter, and sums take one message a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from to_finetune.optim import TrainableOptimizer, stateful
from to_finetune.optim.sharding import Layout, Run

from .helpers import OPTIMIZERS

SHAPES = ((33, 31), (7,), (64, 50), (1,))
NUMELS = [torch.Size(shape).numel() for shape in SHAPES]
STEPS = 2
OPTIONS: dict[str, Any] = {
    "alpha": 0.3,
    "lr": 0.01,
    "relative_alpha": True,
    "grad_scale": "rms",
    "max_norm": 5.0,
    "skip_nonfinite": True,
}


class Waits(Exception):
    """A process has sent something, and cannot go on before all others have."""


class World:
    """Processes that run one after the other, each with a flat partition of all weights.

    A message that not all have sent yet ends a process's step there; the step is undone, and repeated when all have.
    """

    _device_types = (torch.device("cpu"),)

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0
        self.answers: list[Any] = []  # of the messages of this step that all have sent
        self._sent: list[Any] = []
        self._next = 0

    def step(self, optimizers: list[TrainableOptimizer]) -> int:
        """One step of all; returns how many sums over all it took."""
        self.answers = []
        while True:
            self._sent = []
            for self.rank, optimizer in enumerate(optimizers):
                self._next = 0
                undo = snapshot(optimizer)
                try:
                    optimizer.step()
                except Waits:
                    undo()
            if not self._sent:
                return sum(isinstance(answer, Tensor) for answer in self.answers)
            assert len(self._sent) == self.size
            if isinstance(self._sent[0], tuple):
                op, parts = self._sent[0][0], torch.stack([x for _, x in self._sent])
                self.answers.append(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))
            else:
                self.answers.append(list(self._sent))

    def _exchange(self, mine: Any) -> Any:
        if self._next == len(self.answers):
            self._sent.append(mine)
            raise Waits
        self._next += 1
        return self.answers[self._next - 1]

    def all_reduce(self, x: Tensor, op: Any, group: Any) -> None:
        x.copy_(self._exchange((op, x.clone())))

    def all_gather_object(self, found: list[Any], mine: Any, group: Any) -> None:
        found[:] = self._exchange(mine)

    def runs(self) -> list[Run]:
        """What this process's partition holds of each parameter; the partitions cut them anywhere."""
        share = -(-sum(NUMELS) // self.size)
        low, high = self.rank * share, (self.rank + 1) * share
        runs, begin, start = [], 0, 0
        for position, numel in enumerate(NUMELS):
            first, last = max(low - begin, 0), min(high - begin, numel)
            length = max(0, last - first)
            runs.append(Run(position, numel, first if length else 0, start, length))
            start += length
            begin += numel
        return runs


def snapshot(optimizer: TrainableOptimizer) -> Callable[[], None]:
    """What puts weights and state back to what they are now."""
    (p,) = optimizer.param_groups[0]["params"]
    weights, grad = p.detach().clone(), p.grad
    assert grad is not None
    state, slots, gradient = copy.deepcopy(dict(optimizer.state.get(p, {}))), optimizer._edge_slots, grad.clone()

    def undo() -> None:
        p.data.copy_(weights)
        grad.copy_(gradient)
        optimizer.state.clear()
        if state:
            optimizer.state[p] = state
        optimizer._edge_slots = slots

    optimizer._edge_slots = dict(slots)
    return undo


def train(variant: str, size: int, **options: Any) -> tuple[Tensor, int]:
    """All weights after some steps, and how many sums over all shards the last one took."""
    world = World(size)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(sum(NUMELS), generator=generator)
    share = -(-sum(NUMELS) // size)
    shards = [part.clone().requires_grad_(True) for part in weights.split(share)]

    def layout(*_: Any) -> Layout:
        return Layout(world.runs(), (world,), is_flat=True)  # type: ignore[arg-type]

    patches = (
        mock.patch.object(stateful, "layout_of", layout),
        mock.patch.object(dist, "all_reduce", world.all_reduce),
        mock.patch.object(dist, "all_gather_object", world.all_gather_object),
        mock.patch.object(dist, "get_world_size", return_value=size),
    )
    with patches[0], patches[1], patches[2], patches[3]:
        optimizers = [OPTIMIZERS[variant]([p], **{**OPTIONS, **options}) for p in shards]
        for optimizer in optimizers:
            optimizer._given[0].shapes[:] = [torch.Size(shape) for shape in SHAPES]
        world.size = len(shards)
        for _ in range(STEPS):
            slope = torch.randn(sum(NUMELS), generator=generator)
            for p, part in zip(shards, slope.split(share), strict=True):
                p.grad = part * (p.detach() + 1)
            messages = world.step(optimizers)
    return torch.cat([p.detach() for p in shards]), messages


@pytest.mark.parametrize("scope", ["tensor", "group"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [2, 7, 64])
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_the_number_of_shards_does_not_matter(variant: str, size: int, state_dtype: str, scope: str) -> None:
    """One sum over the shards for all blocks, another for `max_norm`, a third where int8 blocks are cut."""
    compare(variant, size, state_dtype=state_dtype, scope=scope)


@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_nor_do_1024(variant: str) -> None:
    """Five weights a shard, so that a block of int8 lies on eight of them."""
    compare(variant, 1024, state_dtype="int8")


@pytest.mark.parametrize("size", [7, 1024])
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_nor_where_rows_and_columns_weigh_alike(variant: str, size: int) -> None:
    """Rows of the matrices begin and end anywhere in a shard, and one sum more takes their squares together."""
    compare(variant, size, state_dtype="float32", grad_scale="factored")


def compare(variant: str, size: int, **options: Any) -> None:
    one, _ = train(variant, 1, **options)
    expected = 2 + (options["state_dtype"] == "int8") + (options.get("grad_scale") == "factored")
    many, messages = train(variant, size, **options)
    if variant == "diagonal":
        assert torch.equal(one, many)
    else:
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)
    assert messages == expected
