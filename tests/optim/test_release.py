"""`release_gradients`: the same trajectory as a step after backward, with one gradient in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from to_finetune.optim import DiagonalTO, TrainableOptimizer, release_gradients

from .helpers import OPTIMIZERS, flat


def model() -> nn.Module:
    """Four layers, the same ones each time; the second weight matrix is used twice."""
    torch.manual_seed(0)
    shared = nn.Linear(12, 12)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(12, 1))


def batches(count: int) -> Iterable[Tensor]:
    """Always the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """A regression on the sum."""
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def trained(name: str, steps: int, accumulation: int = 1, clip: float | None = None, **options: Any) -> nn.Module:
    """Step after backward."""
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters(), **options)
    for i, x in enumerate(batches(steps * accumulation), start=1):
        loss_of(net, x).backward()
        if i % accumulation == 0:
            for p in net.parameters():
                if clip is not None:
                    nn.utils.clip_grad_norm_([p], clip)
            optimizer.step()
            optimizer.zero_grad()
    return net


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "recommended": {"alpha": 0.3, "relative_alpha": True, "grad_scale": "factored", "decoupled_weight_decay": True},
    "theorem and int8": {"schedule": "theorem", "t0": 5.0, "state_dtype": "int8", "weight_decay": 0.1},
    "plain": {"fused": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_trajectory_is_that_of_a_step_after_backward(variant: str, name: str) -> None:
    """To the bit, the random rounding included; a call of step() afterwards changes nothing."""
    options = OPTIONS[name]
    if variant == "full":
        options = {k: v for k, v in options.items() if k not in ("state_dtype", "fused")}
    net = model()
    optimizer = OPTIMIZERS[variant](net.parameters(), lr=0.02, **options)
    with release_gradients(net, optimizer):
        for x in batches(6):
            loss_of(net, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(flat(list(net.parameters())), flat(list(trained(variant, 6, lr=0.02, **options).parameters())))
    assert optimizer.estimate_error().isfinite()
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}


def test_no_gradient_outlives_the_weights_step() -> None:
    """When a weight moves, its own gradient is the only one; after backward there is none."""
    net = model()
    optimizer = OPTIMIZERS["diagonal"](net.parameters())
    alive = []
    step = TrainableOptimizer.step_parameter

    def watched(self: TrainableOptimizer, group_index: int, index: int) -> None:
        alive.append([q.grad is not None for q in net.parameters()].count(True))
        step(self, group_index, index)

    with mock.patch.object(TrainableOptimizer, "step_parameter", watched), release_gradients(net, optimizer):
        loss_of(net, next(iter(batches(1)))).backward()
    assert max(alive) <= 2  # a layer's bias and weight come together
    assert len(alive) == len(list(net.parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_accumulated_gradients_step_once_with_the_last_pass(variant: str) -> None:
    """As backward, backward, step does; the gradient is kept in between."""
    net = model()
    optimizer = OPTIMIZERS[variant](net.parameters(), lr=0.02)
    with release_gradients(net, optimizer, accumulation_steps=3):
        for i, x in enumerate(batches(6), start=1):
            loss_of(net, x).backward()
            assert all((p.grad is None) == (i % 3 == 0) for p in net.parameters())
    expected = trained(variant, 2, accumulation=3, lr=0.02)
    assert torch.equal(flat(list(net.parameters())), flat(list(expected.parameters())))


@pytest.mark.parametrize("missed", [0, 1])
def test_a_weight_that_misses_a_pass_of_accumulation_is_refused(missed: int) -> None:
    """Its step would come later than the others', on gradients of two steps. One that misses all passes is idle."""
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    first, last, idle = net
    optimizer = OPTIMIZERS["diagonal"](net.parameters(), lr=0.02)
    x = torch.ones(1, 2)
    with release_gradients(net, optimizer, accumulation_steps=2):
        for parts in ([first, last], [first, last], [idle, first, last], [last, idle, first]):
            sum(part(x).sum() for part in parts).backward()
        assert [optimizer.state[part.weight]["step"] for part in net] == [2, 2, 1]
        for i in range(2):
            sum(part(x).sum() for part in ([first] if i == missed else [first, last])).backward()
        with pytest.raises(RuntimeError, match="accumulation_steps=2: 2 weights had a gradient in some of the passes"):
            (first(x) + last(x)).sum().backward()


def test_clipping_is_that_of_each_tensor_by_itself() -> None:
    """And differs from no clipping."""
    net = model()
    optimizer = OPTIMIZERS["diagonal"](net.parameters(), lr=0.02)
    with release_gradients(net, optimizer, clip_tensor_norm=0.1):
        for x in batches(4):
            loss_of(net, x).backward()
    expected = trained("diagonal", 4, clip=0.1, lr=0.02)
    assert torch.equal(flat(list(net.parameters())), flat(list(expected.parameters())))
    assert not torch.equal(flat(list(net.parameters())), flat(list(trained("diagonal", 4, lr=0.02).parameters())))


def test_groups_schedulers_and_frozen_weights_work_as_ever() -> None:
    """A rate changed between passes counts, each group has its own, a frozen weight stays."""
    nets = [model(), model()]
    optimizers, schedulers = [], []
    for net in nets:
        net[0].weight.requires_grad_(False)
        groups = [{"params": [net[0].bias, net[2].weight]}, {"params": [net[2].bias, *net[6].parameters()], "lr": 0.5}]
        optimizers.append(OPTIMIZERS["diagonal"](groups, lr=0.02))
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizers[-1], 0.5))
    handle = release_gradients(nets[0], optimizers[0])
    for x in batches(4):
        for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
            loss_of(net, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    ours, theirs = (flat(list(net.parameters())) for net in nets)
    assert torch.equal(ours, theirs)
    handle.remove()
    loss_of(nets[0], x).backward()
    assert nets[0][2].weight.grad is not None


def test_it_resumes_from_a_state_dict() -> None:
    """Groups and state are those of the load, though the hooks are older."""
    net, rest = model(), model()
    optimizer = OPTIMIZERS["rank_one"](net.parameters(), lr=0.02)
    with release_gradients(net, optimizer):
        for x in batches(3):
            loss_of(net, x).backward()
    resumed = OPTIMIZERS["rank_one"](rest.parameters(), lr=0.9)
    with release_gradients(rest, resumed):
        rest.load_state_dict(net.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for x in list(batches(5))[3:]:
            loss_of(rest, x).backward()
    assert torch.equal(flat(list(rest.parameters())), flat(list(trained("rank_one", 5, lr=0.02).parameters())))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "diagonal",
            {"max_norm": 1.0},
            "max_norm=1.0 does not go with release_gradients: it needs the gradients of all",
        ),
        ("diagonal", {"skip_nonfinite": True}, "skip_nonfinite=True does not go"),
        ("diagonal", {"scope": "group", "relative_alpha": True}, "Use scope='tensor'"),
        ("rank_one", {"scope": "group"}, "Use scope='tensor'"),
        ("full", {"scope": "group"}, "Use scope='tensor'"),
    ],
)
def test_what_needs_all_gradients_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    """With the reason, and before a hook is set."""
    net = model()
    with pytest.raises(ValueError, match=message):
        release_gradients(net, OPTIMIZERS[name](net.parameters(), **options))
    loss_of(net, next(iter(batches(1)))).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_bad_arguments_are_refused() -> None:
    """With the key and the value."""
    net = model()
    optimizer = OPTIMIZERS["diagonal"](net.parameters())
    with pytest.raises(ValueError, match="accumulation_steps=0 is not valid"):
        release_gradients(net, optimizer, accumulation_steps=0)
    with pytest.raises(ValueError, match=r"clip_tensor_norm=-1.0 is not valid"):
        release_gradients(net, optimizer, clip_tensor_norm=-1.0)
    with pytest.raises(ValueError, match="not the model's"):
        release_gradients(net, OPTIMIZERS["diagonal"]([Parameter(torch.ones(2))]))


def test_ddp_is_refused_at_the_start_and_at_a_step() -> None:
    """Also when the process group comes to be after the hooks."""
    net = model()
    optimizer = OPTIMIZERS["diagonal"](net.parameters())
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
        pytest.raises(RuntimeError, match="before DDP has averaged the gradients"),
    ):
        release_gradients(net, optimizer)
    release_gradients(net, optimizer)
    before = flat(list(net.parameters()))
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
        pytest.raises(RuntimeError, match="before DDP has averaged the gradients"),
    ):
        loss_of(net, next(iter(batches(1)))).backward()
    assert torch.equal(flat(list(net.parameters())), before)


def test_weights_added_later_are_not_forgotten() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = DiagonalTO(model[0].parameters())
    with release_gradients(model, optimizer):
        optimizer.add_param_group({"params": list(model[1].parameters())})
        with pytest.raises(RuntimeError, match="Parameters were added"):
            model(torch.ones(1, 3)).sum().backward()
