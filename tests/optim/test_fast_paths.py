"""Every fast path equals the plain one, states included, for any mix of tensors, gradients, formats and options.

The fused kernels are run as C++ on the CPU and as Triton in its interpreter; with `DiagonalTO` they equal the rules bit
for bit, with `RankOneTO`, whose blocks are sums, to a few units in the last place.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from to_finetune.optim import TrainableOptimizer
from to_finetune.optim.kernels import fused
from to_finetune.optim.state import encode, random16, random_bits, state_key

from .helpers import OPTIMIZERS, copies, make_weights, random_gradients, step

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no guard": {"alpha": 1e-4, "gamma_max": None},
    "relative alpha": {"relative_alpha": True, "alpha": 0.5},
    "relative alpha, no guard": {"relative_alpha": True, "alpha": 0.05, "gamma_max": None},
    "one block": {"scope": "group", "relative_alpha": True, "alpha": 0.5},
    "a guard below beta": {"beta": 0.5, "gamma_max": 0.3},
    "no slope": {"alpha": 0.0},
    "theorem": {"schedule": "theorem", "t0": 2.0, "beta": 1.5},
    "exponential": {"schedule": "exponential", "alpha_decay": 0.8, "lr_decay": 0.7},
    "coupled decay, rms": {"weight_decay": 0.2, "grad_scale": "rms", "maximize": True},
    "decoupled decay": {"weight_decay": 0.2, "decoupled_weight_decay": True, "max_norm": 3.0},
    "recommended": {"alpha": 0.3, "relative_alpha": True, "grad_scale": "factored", "decoupled_weight_decay": True},
    "factored": {"alpha": 0.3, "relative_alpha": True, "grad_scale": "factored", "state_dtype": torch.int8},
    "tensor lr": {"lr": torch.tensor(0.1), "weight_decay": 0.2, "decoupled_weight_decay": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "int8 state": {"state_dtype": torch.int8, "relative_alpha": True, "grad_scale": "rms"},
    "skip": {"skip_nonfinite": True},
    "capturable": {"capturable": True, "schedule": "theorem", "lr": torch.tensor(0.1)},
}
SIZES = [(1,), (31,), (4097,), (40, 33), (64, 96)]  # less than a block of 32, a tile that is cut, a full one


def odd_weights(dtype: torch.dtype) -> list[Parameter]:
    """Of every shape: a matrix, a vector, one element, 0-dim, empty, strided, all zero."""
    params = make_weights([(3, 4), (5,), (1, 1), (), (0,), (6, 4), (2, 3)], dtype)
    params[5] = Parameter(params[5].detach().t()[:, ::2])
    params[6].data.zero_()
    assert not params[5].is_contiguous()
    return params


EXACT = {"rtol": 1e-10, "atol": 1e-12}
BITS = {"rtol": 0.0, "atol": 0.0}
ULPS = {"rtol": 2e-6, "atol": 1e-6}  # eight units in the last place of numbers about one, after 20 steps
ONE_ROUNDING = {"rtol": 2**-7, "atol": 1e-4}  # of bfloat16: a last bit may go either way as it is stored
ROUNDING = {torch.float64: EXACT, torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: ONE_ROUNDING}


def decoded(optimizer: TrainableOptimizer, p: Tensor) -> dict[str, Tensor]:
    """The state, compared as it is stored."""
    return {name: value.double() for name, value in optimizer.state[p].items()}


def assert_same_trajectory(
    name: str,
    path: str,
    params: list[Parameter],
    options: dict[str, Any],
    tolerance: dict[str, float] | None = None,
    steps: int = 6,
) -> None:
    """Weights and every state after each step with random, missing and zero gradients and a changing lr."""
    twins = copies(params)
    fast = OPTIMIZERS[name](params, **{path: True}, **options)
    loop = OPTIMIZERS[name](twins, foreach=False, fused=False, **options)
    for t in range(steps):
        grads = random_gradients(params)
        grads[t % len(grads)] = None
        grads[(t + 1) % len(grads)] = torch.zeros_like(params[(t + 1) % len(grads)])
        if t % 2:  # a new rate, as a scheduler sets it
            for group in (*fast.param_groups, *loop.param_groups):
                group["lr"] = group["lr"] * 0.9
        step(fast, params, grads)
        step(loop, twins, grads)
        for p, q in zip(params, twins, strict=True):
            bounds = tolerance or ROUNDING[p.dtype]
            torch.testing.assert_close(p, q, **bounds)
            assert fast.state[p].keys() == loop.state[q].keys()
            torch.testing.assert_close(decoded(fast, p), decoded(loop, q), **bounds)
        torch.testing.assert_close(fast.estimate_error(), loop.estimate_error(), rtol=1e-2, atol=0.0, check_dtype=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_foreach_equals_the_loop(name: str) -> None:
    """In float64."""
    tolerance = ONE_ROUNDING if name in ("bfloat16 state", "int8 state") else None
    assert_same_trajectory("diagonal", "foreach", odd_weights(torch.float64), OPTIONS[name], tolerance)


def test_foreach_takes_weights_of_several_dtypes_and_counts() -> None:
    """Each is computed in its own dtype and at the rates of its own step, to the rounding of that dtype."""
    params = [*odd_weights(torch.bfloat16), *odd_weights(torch.float32), *odd_weights(torch.float64)]
    assert_same_trajectory("diagonal", "foreach", params, OPTIONS["theorem"])


def test_foreach_is_momentum_bit_for_bit_without_slope() -> None:
    """As the loop is."""
    assert_same_trajectory("diagonal", "foreach", odd_weights(torch.float32), {"alpha": 0.0}, BITS)


def cpu() -> ModuleType:
    """The C++ kernels."""
    from to_finetune.optim.kernels import cpu

    cpu.library()
    return cpu


def triton() -> ModuleType:
    """The Triton kernels, in the interpreter."""
    pytest.importorskip("triton")
    from to_finetune.optim.kernels import gpu
    from to_finetune.optim.kernels.gpu import step

    if type(step._update).__name__ != "InterpretedFunction":
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    SHIPPED.setdefault("tiles", (step.ROWS, step.TILES))
    step.ROWS, step.TILES = 64, 8  # the interpreter takes as long for a small tile as for a large one
    return gpu


SHIPPED: dict[str, tuple[int, int]] = {}


@pytest.fixture(params=[pytest.param(cpu, marks=needs_compiler), triton], ids=["cpp", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[mock.MagicMock]:
    """Both sets of kernels, for CPU tensors; says how often they were called."""
    module = request.param()
    calls = mock.MagicMock(wraps=module, spec=module)
    with mock.patch.object(fused, "kernels_for", return_value=calls):
        yield calls


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_fused_equals_the_rules(variant: str, name: str, kernels: mock.MagicMock) -> None:
    """In float32, over all sizes."""
    few_bits = {"bfloat16 state": ONE_ROUNDING, "int8 state": {"rtol": 0.0, "atol": 2.0}}  # a code may go either way
    tolerance = BITS if variant == "diagonal" else few_bits.get(name, ULPS)
    steps = 20 if kernels._mock_wraps is cpu() or name == "coupled decay, rms" else 3  # the interpreter is slow
    assert_same_trajectory(variant, "fused", make_weights(SIZES, torch.float32), OPTIONS[name], tolerance, steps)
    called = [function for function, *_ in kernels.method_calls]
    assert sum(function in ("update", "measure_and_update") for function in called) >= steps
    are_factored = OPTIONS[name].get("grad_scale") == "factored"
    assert ("equalize" if hasattr(kernels, "equalize") else "scale") in called or not are_factored


@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_the_tiles_that_a_gpu_gets_equal_the_rules(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = triton()
    for name, number in zip(("ROWS", "TILES"), SHIPPED["tiles"], strict=True):
        monkeypatch.setattr(gpu.step, name, number)
    tolerance = BITS if variant == "diagonal" else {"rtol": 0.0, "atol": 2.0}
    weights = make_weights([(31,), (700,), (17_000,)], torch.float32)  # the last one takes two chunks
    with mock.patch.object(fused, "kernels_for", return_value=gpu):
        assert_same_trajectory(variant, "fused", weights, OPTIONS["int8 state"], tolerance, 2)


@pytest.mark.parametrize("last_bits", [-2, 0, 2])
def test_int8_codes_are_the_same_however_a_gpu_rounds_roots(last_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of squares and their neighbours, of blocks of all magnitudes, and of infinities; b becomes the gradient."""
    gpu = triton()
    from triton.runtime.interpreter import InterpreterBuilder

    def root(y: Any) -> Any:
        found = np.sqrt(y)
        for _ in range(abs(last_bits)):
            found = np.where(y > 0, np.nextafter(found, np.copysign(np.float32(np.inf), last_bits)), found)
        return found

    monkeypatch.setattr(InterpreterBuilder, "create_sqrt", lambda self, x: self.unary_op(x, root))
    squares = (torch.arange(127 * 32).view(127, 32) % 128).float().square()
    squares[:, 0] = 127.0**2  # so that a code is the root
    below = torch.randint(-3, 1, squares.shape, dtype=torch.int32) * (squares > 1)
    near = (squares.view(torch.int32) + below).view(torch.float32)
    scaled = torch.randn(512, 32) * torch.logspace(-46, 38, 512, dtype=torch.float64)[:, None]
    edges = 127.0**2 * 2.0 ** torch.arange(-140, 112, dtype=torch.float64)  # where the exponent changes
    peaks = torch.stack([edges.float(), torch.nextafter(edges.float(), torch.tensor(torch.inf))]).flatten()
    odd = torch.zeros(4, 32)
    odd[1, 3], odd[2, 4], odd[3, 5] = torch.inf, torch.nan, 3.4e38
    x = torch.cat([squares, near, scaled.float(), peaks[:, None] * torch.rand(len(peaks), 32), odd]).flatten()
    x[(len(squares) * 2 + len(scaled)) * 32 :: 32][: len(peaks)] = peaks
    w = Parameter(torch.zeros_like(x))
    optimizer = OPTIMIZERS["diagonal"]([w], lr=0.0, alpha=0.0, beta=1.0, fused=True, state_dtype=torch.int8)
    with mock.patch.object(fused, "kernels_for", return_value=gpu):
        step(optimizer, [w], [x])
    codes, exponents = encode(x, random16(random_bits(x, state_key(0, 0, 0)), 2))
    assert torch.equal(optimizer.state[w]["b_exponent"], exponents)
    assert torch.equal(optimizer.state[w]["b"], codes)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_fused_bfloat16_weights_equal_the_rules(
    variant: str, state_dtype: torch.dtype, kernels: mock.MagicMock
) -> None:
    """With every format of state; two bfloat16 share a word in memory, so sizes are odd as well as even."""
    tolerance = BITS if variant == "diagonal" else ONE_ROUNDING | ({"atol": 2.0} if state_dtype == torch.int8 else {})
    options = {"state_dtype": state_dtype, "weight_decay": 0.1, "grad_scale": "rms", "relative_alpha": True}
    steps = 20 if kernels._mock_wraps is cpu() else 3
    assert_same_trajectory(variant, "fused", make_weights(SIZES, torch.bfloat16), options, tolerance, steps)
    assert sum(name in ("update", "measure_and_update") for name, *_ in kernels.method_calls) >= steps


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_fused_takes_ten_million_weights(variant: str) -> None:
    """Of one tensor, in many chunks, over 20 steps; weights and state are compared at the end."""
    options = {"relative_alpha": True, "grad_scale": "rms", "weight_decay": 0.1}
    p = Parameter(torch.randn(10_000_001))
    (q,) = copies([p])
    fast, loop = OPTIMIZERS[variant]([p], fused=True, **options), OPTIMIZERS[variant]([q], fused=False, **options)
    gradient = torch.randn_like(p)
    for t in range(20):
        p.grad = q.grad = gradient.roll(t)
        fast.step()
        loop.step()
    tolerance = BITS if variant == "diagonal" else ULPS
    torch.testing.assert_close(p, q, **tolerance)
    torch.testing.assert_close(decoded(fast, p), decoded(loop, q), **tolerance)


@needs_compiler
def test_fused_does_not_depend_on_the_number_of_threads() -> None:
    """RankOne's sums too, to the bit."""
    params = [Parameter(torch.randn(500_001)), Parameter(torch.randn(3, 100_000))]
    others = copies(params)
    one, many = OPTIMIZERS["rank_one"](params, fused=True), OPTIMIZERS["rank_one"](others, fused=True)
    for _ in range(3):
        grads = random_gradients(params)
        torch.set_num_threads(1)
        step(one, params, grads)
        torch.set_num_threads(3)
        step(many, others, grads)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_what_the_kernels_do_not_know_goes_the_plain_way(variant: str) -> None:
    """Weights of float64, strided ones and others side by side, each to its own rounding, and strided gradients."""
    params = [*odd_weights(torch.float64), *odd_weights(torch.float32), *odd_weights(torch.bfloat16)]
    assert_same_trajectory(variant, "fused", params, OPTIONS["recommended"])
    (p,) = make_weights([(6, 4)], torch.float32)
    (q,) = copies([p])
    fast, loop = OPTIMIZERS[variant]([p], fused=True), OPTIMIZERS[variant]([q], fused=False)
    for _ in range(3):
        p.grad = q.grad = torch.randn(4, 6).t()
        fast.step()
        loop.step()
    torch.testing.assert_close(p, q, **ULPS)


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_sums_that_a_step_leaves_for_the_next_are_dropped_when_what_they_are_over_changes(variant: str) -> None:
    """Or the state, in place, or to new memory: the next step equals one that knows nothing."""
    options = {"relative_alpha": True, "alpha": 0.5}
    (p,) = make_weights([(50, 40)], torch.float32)
    (q,) = copies([p])
    fast, loop = OPTIMIZERS[variant]([p], fused=True, **options), OPTIMIZERS[variant]([q], fused=False, **options)

    def scale_in_place(x: Tensor) -> None:
        x.mul_(3.0)

    def replace_memory(x: Tensor) -> None:
        x.data = x.data * 0.2

    def reset_state(x: Tensor) -> None:
        name = "b" if variant == "diagonal" else "u"
        (fast if x is p else loop).state[x][name].zero_()

    for change in (None, scale_in_place, None, replace_memory, scale_in_place, reset_state):
        with torch.no_grad():
            for x in (p, q):
                if change:
                    change(x)
        (grad,) = random_gradients([p])
        step(fast, [p], [grad])
        step(loop, [q], [grad])
        torch.testing.assert_close(p, q, **ULPS)


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_the_first_pass_reads_the_weights_only_when_it_must(variant: str) -> None:
    """Their sums come from the step before; a plain Diagonal step has no first pass at all."""
    calls = mock.MagicMock(wraps=cpu(), spec=cpu())
    with mock.patch.object(fused, "kernels_for", return_value=calls):
        params = make_weights([(50, 40), (7,)], torch.float32)
        options = {"relative_alpha": True, "grad_scale": "rms"}
        optimizer = OPTIMIZERS[variant](params, **options)
        for _ in range(3):
            step(optimizer, params, random_gradients(params))
        assert [call.args[3] is None for call in calls.measure_and_update.call_args_list] == [True, False, False]
        optimizer = OPTIMIZERS[variant](params, **options, skip_nonfinite=True)
        for _ in range(3):
            step(optimizer, params, random_gradients(params))
        assert [call.args[1] for call in calls.reduce.call_args_list] == [True, False, False]
        calls.reset_mock()
        step(OPTIMIZERS["diagonal"](params), params, random_gradients(params))
        assert [name for name, *_ in calls.method_calls] == ["update"]


@needs_compiler
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_one_call_for_both_passes_equals_two(variant: str) -> None:
    """For tensors that stay in the cache and for one that does not, to the bit, diagnostics included."""
    params = [*make_weights(SIZES, torch.float32), Parameter(torch.randn(300_001))]
    twins = copies(params)
    options = {"relative_alpha": True, "grad_scale": "rms", "weight_decay": 0.1, "maximize": True}
    one, two = OPTIMIZERS[variant](params, **options), OPTIMIZERS[variant](twins, **options, skip_nonfinite=True)
    for _ in range(4):
        grads = random_gradients(params)
        step(one, params, grads)
        step(two, twins, grads)
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
        torch.testing.assert_close(one.estimate_error(), two.estimate_error())
        torch.testing.assert_close(one.gradient_peak(), two.gradient_peak())


def test_without_a_compiler_one_warning_and_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, and the name of what is missing."""
    from to_finetune.optim.kernels import cpu

    monkeypatch.setenv("CXX", "no-such-compiler")
    for cache in (cpu.library, fused.kernels_for):
        cache.cache_clear()
    params = make_weights([(5, 4)], torch.float32)
    twins = copies(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            grads = random_gradients(params)
            step(OPTIMIZERS["diagonal"](params), params, grads)
            step(OPTIMIZERS["diagonal"](twins, fused=False), twins, grads)
    (warning,) = caught
    assert re.search(r"no-such-compiler.*install g\+\+", str(warning.message))
    assert torch.equal(params[0], twins[0])
    for cache in (cpu.library, fused.kernels_for):
        cache.cache_clear()


@needs_compiler
def test_a_compiler_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """And leaves nothing behind in the cache."""
    from to_finetune.optim.kernels import cpu

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", ("--no-such-flag",))
    with pytest.raises(cpu.CompilerError, match="no-such-flag"):
        cpu._compiled("g++")
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_the_compiled_kernels_are_kept_for_the_next_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """In the user's cache; a folder that cannot be written to is no obstacle."""
    from to_finetune.optim.kernels import cpu

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu._compiled("g++")
    made = first.stat().st_mtime_ns
    assert first.parent == tmp_path / "to_finetune"
    assert cpu._compiled("g++") == first
    assert first.stat().st_mtime_ns == made
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu._compiled("g++").is_file()


@needs_compiler
def test_kernels_that_do_not_load_are_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """As where machines with other libraries share a home; what does not load then either is a CompilerError."""
    from to_finetune.optim.kernels import cpu

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "g++")
    kept = cpu._compiled("g++")
    kept.write_bytes(b"of another system")
    cpu.library.cache_clear()
    assert cpu.library().update
    assert kept.read_bytes().startswith(b"\x7fELF")
    monkeypatch.setattr(cpu, "_compiled", lambda compiler: tmp_path / "none.so")
    cpu.library.cache_clear()
    with pytest.raises(cpu.CompilerError, match=r"cannot be loaded: .*none\.so"):
        cpu.library()
    cpu.library.cache_clear()
