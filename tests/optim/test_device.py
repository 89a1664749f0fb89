"""Nothing waits for the device: steps skipped on it, CUDA graphs, and the user's own torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .helpers import OPTIMIZERS, copies, flat, make_weights, random_gradients, step
from .test_fast_paths import kernels  # noqa: F401 (a fixture)

SHAPES = [(40, 33), (5,), ()]
PATHS: dict[str, dict[str, Any]] = {
    "fused": {},
    "fused with first pass": {"grad_scale": "rms", "relative_alpha": True},
    "plain": {"fused": False},
    "int8": {"state_dtype": torch.int8},
    "one block": {"scope": "group", "relative_alpha": True},
}


def options_of(variant: str, name: str, **more: Any) -> dict[str, Any]:
    """Full has no fused path and no int8."""
    lacks = ("fused", "state_dtype") if variant == "full" else ()
    return {k: v for k, v in PATHS[name].items() if k not in lacks} | more


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PATHS)
def test_a_step_with_a_non_finite_gradient_changes_nothing(
    variant: str, name: str, dtype: torch.dtype, bad: float
) -> None:
    """In any tensor of any group: no weight, no state, no count but that of skipped steps; then the run goes on."""
    groups = [make_weights(SHAPES, dtype), make_weights([(7, 3)], dtype)]
    twins = [copies(params) for params in groups]
    options = options_of(variant, name, skip_nonfinite=True, schedule="theorem", max_norm=100.0, weight_decay=0.1)
    optimizer, untroubled = (
        OPTIMIZERS[variant]([{"params": params} for params in both], **options) for both in (groups, twins)
    )
    params, others = [p for ps in groups for p in ps], [p for ps in twins for p in ps]
    for t in range(5):
        grads = random_gradients(params)
        if t in (0, 3):
            grads[3 if t else 0].view(-1)[2] = bad
            if variant == "full" and t == 0:
                continue  # its history begins with a step
            step(optimizer, params, grads)
            continue
        step(optimizer, params, grads)
        step(untroubled, others, grads)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        ours, theirs = dict(optimizer.state[p]), dict(untroubled.state[q])
        assert float(ours.pop("skipped")) == (1 if variant == "full" else 2)
        assert float(theirs.pop("skipped")) == 0
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert optimizer.skipped_steps() == (1 if variant == "full" else 2)
    assert untroubled.skipped_steps() == 0


def test_without_the_guard_a_non_finite_gradient_is_not_hidden(variant: str) -> None:
    """It reaches the weights, and nothing is counted."""
    params = make_weights(SHAPES, torch.float32)
    optimizer = OPTIMIZERS[variant](params)
    grads = random_gradients(params)
    grads[0][0, 0] = torch.nan
    step(optimizer, params, grads)
    assert params[0].isnan().any()
    assert optimizer.skipped_steps() == 0


class NoWaiting(TorchDispatchMode):
    """Fails at what makes the host wait for a device: reading a value."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.split("::")[1] not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "dtype", "more"),
    [*((name, torch.float32, {}) for name in PATHS), ("plain", torch.bfloat16, {"max_norm": 3.0})],
)
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_a_capturable_step_reads_no_value_and_keeps_its_addresses(
    variant: str,
    name: str,
    dtype: torch.dtype,
    more: dict[str, Any],
    kernels: Any,  # noqa: F811
) -> None:
    """On the plain path and up to the kernels' launch, and moves the weights as any other."""
    params = make_weights(SHAPES, dtype)
    twins = copies(params)
    options = options_of(variant, name, schedule="theorem", t0=3.0, weight_decay=0.1, **more)
    captured = OPTIMIZERS[variant](params, lr=torch.tensor(0.1), capturable=True, **options)
    plain = OPTIMIZERS[variant](twins, lr=0.1, **options)
    addresses: list[int] = []
    for t in range(3):
        grads = random_gradients(params)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if t == 0:
            captured.step()
            addresses = [x.data_ptr() for p in params for x in captured.state[p].values()]
        else:
            with NoWaiting():
                captured.step()
        step(plain, twins, grads)
    assert addresses == [x.data_ptr() for p in params for x in captured.state[p].values()]
    few_bits = dtype == torch.bfloat16 or "state_dtype" in options
    tolerance = {"rtol": 0.0, "atol": 2e-2} if few_bits else {"rtol": 1e-5, "atol": 1e-6}
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        assert captured.state[p]["step"] == 3


def test_full_is_not_capturable() -> None:
    """And says why."""
    with pytest.raises(ValueError, match="capturable=True is not valid: the memory of FullTO grows"):
        OPTIMIZERS["full"](make_weights(), capturable=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # raised inside torch
@pytest.mark.parametrize("compiled", ["step", "loop"])
def test_the_users_torch_compile_works_and_compiles_once(variant: str, compiled: str) -> None:
    """Of ``optimizer.step`` or of a whole training step: the same weights, and no new graph from the third step on."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin.load_state_dict(net.state_dict())

    def training_step(model: nn.Module, take_step: Callable[[], Any], x: Tensor) -> None:
        for p in model.parameters():
            p.grad = None
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        take_step()

    ours, theirs = (OPTIMIZERS[variant](m.parameters(), lr=0.02, schedule="theorem") for m in (net, twin))
    whole = torch.compile(training_step) if compiled == "loop" else training_step
    one = torch.compile(ours.step) if compiled == "step" else ours.step
    graphs = []
    for _ in range(5):
        x = torch.randn(16, 6)
        whole(net, one, x)
        training_step(twin, theirs.step, x)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.testing.assert_close(flat(list(net.parameters())), flat(list(twin.parameters())), rtol=1e-5, atol=1e-6)
    assert graphs[2] == graphs[-1]
    torch.compiler.reset()


def test_skipped_steps_are_saved_and_loaded(variant: str) -> None:
    """So the count is that of the whole run."""
    params = make_weights(SHAPES, torch.float32)
    optimizer = OPTIMIZERS[variant](params, skip_nonfinite=True)
    step(optimizer, params, random_gradients(params))
    step(optimizer, params, [torch.full_like(p, torch.nan) for p in params])
    fresh = OPTIMIZERS[variant]([Parameter(p.detach().clone()) for p in params], skip_nonfinite=True)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped_steps() == 1


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", ["diagonal", "rank_one"])
def test_one_group_that_skips_makes_all_skip(kind: str, fused: bool | None) -> None:
    """Also for an infinity in a group that does not ask, and measures its weights alone."""
    params = [Parameter(torch.randn(40)) for _ in range(3)]
    groups = [{"params": params[:1], "skip_nonfinite": True}, {"params": params[1:], "relative_alpha": True}]
    optimizer = OPTIMIZERS[kind](groups, fused=fused)
    for bad in (False, True, False):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones(40)
        if bad:
            params[2].grad[0] = torch.inf  # type: ignore[index]
        optimizer.step()
        assert all(torch.equal(p, q) == bad for p, q in zip(params, before, strict=True))
    assert optimizer.skipped_steps() == 1
