"""The GPU kernels: that they compile for real GPUs without one at hand and, where there is one, are right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from .helpers import OPTIMIZERS
from .test_fast_paths import OPTIONS, SIZES, ULPS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from to_finetune.optim.kernels.gpu import factored, programs, step, sums

def compile(kernel, pointers, **options):
    source = ASTSource(
        fn=kernel,
        signature=pointers | dict.fromkeys(options, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in options.items()},
    )
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    warps = step.WARPS if "TILES" in options else programs.MANY_WARPS
    built = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})
    ptx = built.asm["ptx"]
    wide = len(re.findall(r"ld\\.global[.\\w]*\\.v[24]", ptx))
    fused = ptx.count("fma.rn.f32") - 4 * ptx.count("rcp.approx.ftz.f32")  # those of a division are meant
    print(kernel.__name__, wide, fused, len(built.asm["cubin"]))

batch = {"table": "*i64", "scalars": "*fp32", "chunks": "*i32", "partial": "*fp64", "skip": "*i1"}
for kernel in (step._reduce, step._update):
    for rank_one, weight, state in ((False, 0, 0), (True, 0, 0), (True, 1, 1), (False, 1, 2)):
        formats = dict(WEIGHT=weight, GRADIENT=weight, STATE=state)
        at_once = step.AT_ONCE if kernel is step._reduce else 1
        tiles = dict(ROWS=step.ROWS * at_once, TILES=step.TILES // at_once)
        more = dict(WEIGHTS_TOO=True, ALIGNED=True, **tiles)
        compile(kernel, batch, HAS_SKIP=True, RANK_ONE=rank_one, **formats, **more)
combined = {"partial": "*fp64", "begin": "*i64", "sums": "*fp64", "table": "*i64", "scalars": "*fp32", "held": "*fp64"}
for rank_one in (False, True):
    more = dict(FINISH=True, HELD=True, RMS=True, RELATIVE=True, COMBINED=sums.COMBINED)
    compile(sums._combine, combined, RANK_ONE=rank_one, **more)
pieces = {"table": "*i64", "programs": "*i32"}
for gradient, factor in ((0, "*fp32"), (1, "*bf16")):
    more = dict(GRADIENT=gradient, ALIGNED=True, HIGH=factored.HIGH, WIDE=factored.WIDE)
    compile(factored._scale, pieces | {"factors": factor}, **more)
    found = pieces | {"places": "*i64", "found": "*fp64"}
    compile(factored._square, found, TALL=factored.TALL, **more)
added = dict(GRADIENT=0, ALIGNED=True, HIGH=factored.HIGH, WIDE=factored.WIDE, TALL=factored.TALL, ADDED=factored.ADDED)
for of_columns in (False, True):
    compile(factored._combine_squares, found | {"sums": "*fp64"}, OF_COLUMNS=of_columns, **added)
"""


@pytest.mark.parametrize("capability", [80, 90])  # A100, H100
def test_the_kernels_compile_for_gpus(capability: int) -> None:
    """To machine code that loads several weights at a time and contracts no product with a sum."""
    pytest.importorskip("triton", minversion="3.4")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 16
    for name, wide, fused, size in lines:
        # None where the compiler does not know the addresses to be aligned.
        assert int(wide) >= 2 or name.startswith("_combine")
        assert int(fused) == 0
        assert int(size) > 0


def on(device: str, dtype: torch.dtype, sizes: Sequence[tuple[int, ...]]) -> list[Parameter]:
    """The same weights on any device."""
    generator = torch.Generator().manual_seed(3)
    return [Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def train(
    device: str, variant: str, dtype: torch.dtype, sizes: Sequence[tuple[int, ...]], **options: Any
) -> list[Tensor]:
    """Weights and state, on the CPU, after some steps with the same gradients everywhere."""
    params = on(device, dtype, sizes)
    optimizer = OPTIMIZERS[variant](params, **options)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        optimizer.step()
    state = [value for p in params for key, value in optimizer.state[p].items() if key not in ("step", "skipped")]
    return [x.detach().cpu() for x in (*params, *state)]


@needs_gpu
@pytest.mark.parametrize("sizes", [[*SIZES, (300, 1000)], [(64, 96), (48, 1024)]], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_a_gpu_gives_the_weights_of_the_cpu(
    variant: str, name: str, dtype: torch.dtype, sizes: Sequence[tuple[int, ...]]
) -> None:
    """Diagonal bit for bit."""
    few_bits = dtype == torch.bfloat16 or "state_dtype" in OPTIONS[name]
    loose = {"rtol": 2**-7, "atol": 2.0} if few_bits else ULPS
    bounds = {"rtol": 0.0, "atol": 0.0} if variant == "diagonal" else loose
    ours, theirs = (train(device, variant, dtype, sizes, **OPTIONS[name]) for device in ("cuda", "cpu"))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y.double(), **bounds)


@needs_gpu
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_a_step_on_a_gpu_never_waits_for_it(variant: str) -> None:
    """Also when it may be skipped; but for the first one, which makes the state."""
    params = [Parameter(torch.randn(30, 40, device="cuda"))]
    optimizer = OPTIMIZERS[variant](params, skip_nonfinite=True, relative_alpha=True, grad_scale="factored")
    for t in range(3):
        params[0].grad = torch.randn_like(params[0])
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"relative_alpha": True, "grad_scale": "factored", "state_dtype": torch.int8}])
@pytest.mark.parametrize("variant", ["diagonal", "rank_one"])
def test_a_cuda_graph_replays_the_step(variant: str, options: dict[str, Any]) -> None:
    """With counts, a schedule, and an lr that changes between replays."""
    graphed, plain = ([Parameter(torch.ones(50, 100, device="cuda"))] for _ in range(2))
    lr = torch.tensor(0.1, device="cuda")
    schedule: dict[str, Any] = {"schedule": "theorem", "t0": 3.0}
    captured = OPTIMIZERS[variant](graphed, lr=lr, capturable=True, **schedule, **options)
    other = OPTIMIZERS[variant](plain, lr=0.1, **schedule, **options)
    graphed[0].grad = torch.randn(50, 100, device="cuda")
    plain[0].grad = graphed[0].grad.clone()  # before "factored" scales it in place
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for rate in (0.1, 0.05, 0.02):
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        graphed[0].grad.copy_(torch.randn(50, 100, device="cuda"))
        plain[0].grad.copy_(graphed[0].grad)
        graph.replay()
        other.step()
        torch.testing.assert_close(graphed[0], plain[0], **ULPS)
