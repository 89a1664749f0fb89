"""Weights that FSDP2 has sharded over two processes: rounded like the whole, stepped in backward; refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from to_finetune.optim import DiagonalTO, FullTO, RankOneTO, TrainableOptimizer, release_gradients
from to_finetune.optim.checkpoint import load_state, load_weights, save_state, whole_weights

PROCESSES = 2
Make = Callable[..., TrainableOptimizer]


def model(dtype: torch.dtype) -> nn.Module:
    """Odd sizes, so that the shards are uneven."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    """Weights of a sharded and of an unsharded model."""
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, **tolerance)


def same_gradients(make: Make, dtype: torch.dtype, **tolerance: float) -> None:
    """Three steps with the same gradients on the shards and on the whole."""
    alone = model(dtype)
    sharded = fully_shard(copy.deepcopy(alone))
    one, many = make(alone.parameters()), make(sharded.parameters())
    for t in range(3):
        torch.manual_seed(t)
        for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            assert isinstance(q, DTensor)
            q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)
        one.step()
        many.step()
    compare(sharded, alone, **tolerance)
    for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
        for key, value in one.state[p].items():
            torch.testing.assert_close(whole(many.state[q][key]), value, **tolerance)
    sharded.cpu()  # FSDP2 swaps the weights' contents, which torch refuses while there is a weak reference to one


def in_backward() -> None:
    """FSDP2 calls the hooks when the averaged gradient is there."""
    after, during = (fully_shard(model(torch.float32)) for _ in range(2))
    one, many = (DiagonalTO(net.parameters(), lr=0.1) for net in (after, during))
    handle = release_gradients(during, many)
    for t in range(3):
        torch.manual_seed(10 * t + dist.get_rank())  # each process has its own batch
        x = torch.randn(8, 6)
        for net in (after, during):
            (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        one.step()
        one.zero_grad()
        assert all(p.grad is None for p in during.parameters())
    handle.remove()
    for p, q in zip(during.parameters(), after.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))
    assert all(float(state["step"]) == 3 for state in many.state.values())


def one_process_has_an_infinity() -> None:
    """All skip the step: the flag is that of the whole gradient."""
    net = fully_shard(model(torch.float32))
    optimizer = DiagonalTO(net.parameters(), skip_nonfinite=True)
    before = [whole(p).clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 0:
        next(net.parameters()).grad.to_local()[0, 0] = torch.inf
    optimizer.step()
    assert all(torch.equal(whole(p), q) for p, q in zip(net.parameters(), before, strict=True))
    assert optimizer.skipped_steps() == 1


def one_group_asks_for_all() -> None:
    """An infinity in another group, on one process, skips the step too; what that group remembers is not asked."""
    net = fully_shard(model(torch.float32))
    first, *others = net.parameters()
    groups = [{"params": [first], "skip_nonfinite": True}, {"params": others, "relative_alpha": True}]
    optimizer = DiagonalTO(groups)
    for step in range(2):
        before = [whole(p).clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        if step == 1 and dist.get_rank() == 0:
            others[1].grad.to_local()[0, 0] = torch.inf  # type: ignore[union-attr]
        optimizer.step()
    assert all(torch.equal(whole(p), q) for p, q in zip(net.parameters(), before, strict=True))
    assert optimizer.skipped_steps() == 1


def after_an_evaluation(folder: Path) -> None:
    """FSDP2 leaves the root's weights whole: they are saved, and replaced by loaded ones, all the same."""
    net = fully_shard(model(torch.float32))
    x = torch.randn(8, 6)
    optimizer = DiagonalTO(net.parameters(), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()

    def evaluated() -> Tensor:
        with torch.no_grad():
            return net(x).clone()

    saved = evaluated()
    assert not isinstance(next(net.parameters()), DTensor)
    save_state(net, optimizer, folder / "state")
    evaluated()
    weights = whole_weights(net, optimizer)
    everywhere = [weights]
    dist.broadcast_object_list(everywhere)
    for load in (
        lambda: load_state(net, optimizer, folder / "state"),
        lambda: load_weights(net, optimizer, everywhere[0]),
    ):
        net(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(evaluated(), saved)
        load()
        assert torch.equal(evaluated(), saved)


def refusals() -> None:
    """What shards cannot do says so."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    cases = [
        (DiagonalTO([columns], state_dtype=torch.int8), "int8 needs weights that are sharded by their first dimension"),
        (DiagonalTO([columns], grad_scale="factored"), "'factored' needs weights that are sharded by their first"),
        (FullTO([columns]), "FullTO needs whole tensors"),
    ]
    columns.grad = torch.ones_like(columns)
    for optimizer, message in cases:
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()


def columns_agree() -> None:
    """Weights that are sharded by another dimension lie scattered; their random bits are still the whole's."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    torch.manual_seed(0)
    for variant in (DiagonalTO, RankOneTO):
        whole_p, g = nn.Parameter(torch.randn(5, 7)), torch.randn(5, 7)
        p = nn.Parameter(distribute_tensor(whole_p.detach(), mesh, [Shard(1)]))
        options: dict[str, Any] = {"state_dtype": torch.bfloat16, "relative_alpha": True, "grad_scale": "rms"}
        alone, sharded = variant([whole_p], **options), variant([p], **options)
        for _ in range(3):
            whole_p.grad, p.grad = g, distribute_tensor(g, mesh, [Shard(1)])
            alone.step()
            sharded.step()
        torch.testing.assert_close(whole(p), whole_p, rtol=1e-6, atol=1e-7)


def main(rank: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    init_device_mesh("cpu", (PROCESSES,))
    few: dict[str, Any] = {"alpha": 0.5, "state_dtype": torch.bfloat16, "lr": 0.1}
    same_gradients(lambda params: DiagonalTO(params, **few), torch.bfloat16, rtol=0.0, atol=0.0)
    options: dict[str, Any] = {"relative_alpha": True, "grad_scale": "rms", "max_norm": 50.0, **few}
    same_gradients(lambda params: DiagonalTO(params, **options), torch.bfloat16, rtol=0.0, atol=0.0)
    same_gradients(lambda params: DiagonalTO(params, grad_scale="factored"), torch.float32, rtol=0.0, atol=0.0)
    same_gradients(lambda params: DiagonalTO(params, relative_alpha=True), torch.float32, rtol=1e-6, atol=1e-7)
    same_gradients(lambda params: RankOneTO(params, alpha=0.5), torch.float32, rtol=1e-6, atol=1e-7)
    in_backward()
    one_process_has_an_infinity()
    one_group_asks_for_all()
    after_an_evaluation(Path(folder))
    refusals()
    columns_agree()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_two_processes(tmp_path: Path) -> None:
    """All of it in one start of the processes, which takes most of the time."""
    mp.spawn(main, args=(str(tmp_path),), nprocs=PROCESSES)
