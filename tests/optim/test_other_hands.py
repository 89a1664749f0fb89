"""State and groups in other hands: hooks, wrappers, and users who change them in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from to_finetune.optim import DiagonalTO
from to_finetune.optim.checkpoint import load_state, save_state

from .helpers import OPTIMIZERS, copies, make_weights, run, step
from .test_state import assert_same_bits


def in_the_order_of_names(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """What torch's documentation recommends for loading by the names of parameters."""
    adapted = copy.deepcopy(saved)
    for group, own in zip(adapted["param_groups"], optimizer.param_groups, strict=True):
        numbers = dict(zip(group["param_names"], group["params"], strict=True))
        group["params"] = [numbers[name] for name in own["param_names"]]
        group["param_names"] = list(own["param_names"])
    return adapted


@pytest.mark.parametrize("shapes", [[(3,), (3,)], [(3,), (5,)]], ids=["alike", "not alike"])
def test_a_hook_before_loading_is_obeyed(variant: str, shapes: list[tuple[int, ...]]) -> None:
    a, b = make_weights(shapes)
    optimizer = OPTIMIZERS[variant]([("a", a), ("b", b)])
    run(optimizer, [a, b], 2)
    other = OPTIMIZERS[variant]([("b", b), ("a", a)])
    other.register_load_state_dict_pre_hook(in_the_order_of_names)
    other.load_state_dict(optimizer.state_dict())
    assert_same_bits(other, [a, b], optimizer, [a, b])
    again = OPTIMIZERS[variant]([a, b])
    again.load_state_dict(optimizer.state_dict())
    assert not again._loaded, "what was loaded is held twice"
    assert not again._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_state_dict_post_hooks


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_hooks_after_loading_and_saving_are_obeyed(state_dtype: torch.dtype) -> None:
    (p,) = make_weights([(40,)], torch.float32)
    optimizer = DiagonalTO([p], state_dtype=state_dtype)
    run(optimizer, [p], 2)

    def forget(optimizer: torch.optim.Optimizer) -> None:
        optimizer.state[p]["b"].zero_()

    seen: dict[str, torch.dtype] = {}

    def drop(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        seen.update({name: x.dtype for name, x in saved["state"][0].items()})
        return {**saved, "state": {}}

    other = DiagonalTO([p], state_dtype=state_dtype)
    other.register_load_state_dict_post_hook(forget)
    other.load_state_dict(optimizer.state_dict())
    assert not other.state[p]["b"].any()
    assert torch.equal(other.state[p]["a"], optimizer.state[p]["a"])
    other.register_state_dict_post_hook(drop)
    assert other.state_dict()["state"] == {}
    saved_as = torch.int16 if state_dtype == torch.int8 else state_dtype
    assert seen == {"step": torch.float32, "a": saved_as, "b": saved_as}


@pytest.mark.parametrize("way", ["own groups", "past load_state_dict"])
@pytest.mark.parametrize("name", ["diagonal", "rank_one"])
def test_int8_state_is_known_for_what_it_is(name: str, way: str) -> None:
    """A checkpoint loaded with the groups' options of another; and as ZeroRedundancyOptimizer puts it into `state`."""
    (p,) = make_weights([(5, 40)], torch.float32)
    (q,) = copies([p])
    one = OPTIMIZERS[name]([p], state_dtype="int8")
    run(one, [p], 3)
    q.data.copy_(p)
    saved = copy.deepcopy(one.state_dict())
    if way == "own groups":
        two = OPTIMIZERS[name]([q], state_dtype="bfloat16")
        saved["param_groups"] = two.state_dict()["param_groups"]
        two.load_state_dict(saved)
    else:
        two = OPTIMIZERS[name]([q], state_dtype="int8")
        two.state[q] = saved["state"][0]
    run(one, [p], 2, seed=1)
    run(two, [q], 2, seed=1)
    assert_same_bits(two, [q], one, [p])


def test_state_of_ones_own_is_left_alone(variant: str) -> None:
    (p,) = make_weights([(3,)])
    optimizer = OPTIMIZERS[variant]([{"params": [p], "mask": torch.ones(3)}])
    optimizer.state[p]["note"] = "mine"
    run(optimizer, [p], 2)
    optimizer.param_groups[0]["mask"] = torch.zeros(3)
    run(optimizer, [p], 1)
    assert optimizer.state[p]["step"] == 3
    other = OPTIMIZERS[variant]([p])
    other.state[p]["note"] = "another"
    assert other.state_dict()["state"] == {0: {"note": "another"}}  # before its first step
    other.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["note"] == other.state[p]["note"] == "mine"


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("change", ["pruned", "grown", "appended", "removed", "copied groups"])
def test_groups_may_be_changed_in_place(variant: str, change: str, fused: bool | None) -> None:
    """As by those who prune and grow weights, moving the state along: what follows is as if it had begun so."""
    if variant == "full" and change in ("pruned", "grown"):
        pytest.skip("its matrix belongs to its weights")
    params = make_weights([(6, 2), (2,), (4,)], torch.float32)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = OPTIMIZERS[variant](groups, fused=fused)
    run(optimizer, params, 2)
    if change in ("pruned", "grown"):
        rows = [0, 2, 5] if change == "pruned" else [0, 1, 2, 3, 4, 5, 0, 1]
        state = {name: x[rows] if x.dim() else x for name, x in optimizer.state.pop(params[0]).items()}
        params[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(params[0].detach()[rows])
        optimizer.state[params[0]] = state
    elif change == "appended":
        params.insert(1, *make_weights([(7,)], torch.float32))
        optimizer.param_groups[0]["params"].append(params[1])
    elif change == "removed":
        optimizer.state.pop(optimizer.param_groups[1]["params"].pop(0))
        del params[1]
    else:
        optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]
    others = copies(params)
    first = len(optimizer.param_groups[0]["params"])
    fresh = OPTIMIZERS[variant]([{"params": others[:first]}, {"params": others[first:]}], fused=fused)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        run(optimizer, params, 1, seed)
        run(fresh, others, 1, seed)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("step_before", [False, True])
@pytest.mark.parametrize("change", ["reversed", "first removed", "appended"])
@pytest.mark.parametrize("name", ["diagonal", "rank_one"])
def test_a_changed_group_is_saved_by_its_own_names(name: str, change: str, step_before: bool, tmp_path: Path) -> None:
    """Also if all weights are of one size, by which nothing could tell them apart."""
    model = nn.ParameterDict({key: nn.Parameter(torch.randn(3)) for key in "abcd"})
    given = [model[key] for key in "abc"]
    optimizer = OPTIMIZERS[name](given)
    run(optimizer, given, 2)
    params = optimizer.param_groups[0]["params"]
    if change == "reversed":
        params.reverse()
    elif change == "appended":
        params.append(model["d"])
    else:
        del optimizer.state[params.pop(0)]
    if step_before:
        run(optimizer, params, 1)
    save_state(model, optimizer, tmp_path / "state")
    others = nn.ParameterDict({key: nn.Parameter(model[key].detach().clone()) for key in "abcd"})
    keys = [key for key in "dcba" if any(model[key] is p for p in params)]
    fresh = OPTIMIZERS[name]([others[key] for key in keys])
    load_state(others, fresh, tmp_path / "state")
    for key in keys:
        assert fresh.state[others[key]].keys() == {"step", *fresh.state_names}
        for kind, value in optimizer.state[model[key]].items():
            assert torch.equal(fresh.state[others[key]][kind], value)


def test_no_reference_keeps_torch_from_swapping_a_weight(variant: str) -> None:
    """As `model.to()` does under FSDP2, or whenever torch is told to swap."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = OPTIMIZERS[variant](model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p.dtype == torch.float64 for group in optimizer.param_groups for p in group["params"])


def test_skipping_may_be_switched_on_later(variant: str) -> None:
    (p,) = make_weights([(3,)])
    optimizer = OPTIMIZERS[variant]([p])
    run(optimizer, [p], 2)
    before = p.detach().clone()
    optimizer.param_groups[0]["skip_nonfinite"] = True
    step(optimizer, [p], [torch.full_like(p, torch.inf)])
    assert torch.equal(p, before)
    assert (optimizer.skipped_steps(), optimizer.state[p]["step"]) == (1, 2)


def test_tensors_without_memory(variant: str) -> None:
    """As in the tools that estimate a step's memory."""
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(4))
        optimizer = OPTIMIZERS[variant]([p])
        for _ in range(3):
            p.grad = torch.ones(4)
            optimizer.step()
    assert optimizer.state[p]["b"].shape == (4,)


@pytest.mark.parametrize("fused", [None, False])
def test_a_gradient_that_stands_for_minus_its_memory(variant: str, fused: bool | None) -> None:
    """As that of a single imaginary part, in autograd; in a first step and in one that follows."""
    (p,) = make_weights([(5,)], torch.float32)
    (q,) = copies([p])
    one, two = (OPTIMIZERS[variant]([x], fused=fused, lr=0.1) for x in (p, q))
    for t in range(4):
        g = torch.randn(5)
        p.grad, q.grad = g, g if t == 1 else torch._neg_view(-g)
        one.step()
        two.step()
    assert torch.equal(p, q)


def test_a_single_imaginary_part_moves_downhill() -> None:
    re, im = (nn.Parameter(torch.full((1,), x)) for x in (1.0, 2.0))
    (torch.complex(re, im).conj() * 1j).real.sum().backward()
    assert im.grad is not None
    assert im.grad.is_neg()
    DiagonalTO([re, im], lr=1.0, alpha=0.0, beta=1.0).step()
    assert (re.item(), im.item()) == (1.0, 1.0)
