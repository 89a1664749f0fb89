"""Compare one step of several optimizers: milliseconds, bandwidth, memory, and whether each bar is met.

    python scripts/benchmarks/step.py

Writes step-cpu.json or step-<name of the GPU>.json beside this file. Within a case all methods take turns, one step
each per round in random order, so that a busy machine slows them alike. They share the gradients; each has its own
weights, because our steps remember sums over the weights, which hold only while nothing else writes to them. GB/s
counts the bytes that a step must move; the limit is `copy_` of as many weights, which an update in place exceeds on
CPUs that read what they are about to overwrite. Other work on the CPU slows the methods that use OpenMP (all but ours)
by a time slice per step: run it on an idle machine. `--table` prints the tables again.

`--quick` tries everything in seconds. To try the Triton kernels without a GPU, in a minute or two:

    TRITON_INTERPRET=1 python scripts/benchmarks/step.py --quick --device cpu
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import operator
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from to_finetune.files import write_json
from to_finetune.machine import file_word, machine
from to_finetune.optim import DiagonalTO, RankOneTO
from to_finetune.optim.kernels import fused

Shapes = Sequence[tuple[int, ...]]
HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WEIGHTS = {"cpu": 50_000_000, "cuda": 400_000_000}
ROUNDS = {"cpu": 25, "cuda": 40}
RARELY = 5  # bitsandbytes, fifty times as slow as the others on a CPU, is timed only in every fifth round
NEEDED = 150  # bytes of memory per weight: weights and state of all methods together
LLAMA_SCALES = ((1, 2), (1, 1), (2, 1), (4, 1), (8, 1), (16, 1))  # divisor of the hidden sizes, layers
BYTES = {"float32": 4, "bfloat16": 2, "int8": 33 / 32}
BUSY = 20_000_000  # cycles, some 10 ms: longer than any of the methods takes to issue a step
LR = 1e-6  # keeps the weights almost as they are; a step costs the same at any rate
OPTIONS: dict[str, Any] = {"alpha": 0.3, "relative_alpha": True, "weight_decay": 0.01, "decoupled_weight_decay": True}
RMS, RECOMMENDED = ({**OPTIONS, "grad_scale": scale} for scale in ("rms", "factored"))


@dataclass(frozen=True)
class Method:
    """An optimizer, and what its step reads and writes besides the weights."""

    build: Callable[..., Any]
    states: int  # state elements per weight, read and written
    gradient_reads: int = 1  # 2 if a sum over a whole block comes before its first update
    state_reads: int = 0  # state elements per weight in that sum
    state_bytes: float | None = None  # per element, if the optimizer has its own format
    ours: bool = False

    def bytes_per_weight(self, weight: str, state: str) -> float:
        states = (2 * self.states + self.state_reads) * (self.state_bytes or BYTES[state])
        return (2 + self.gradient_reads) * BYTES[weight] + states


class Copy:
    """The limit: read and write every weight once, tensor by tensor."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.pairs = [(torch.empty_like(p), p.detach()) for p in params]
        self.state: dict[Tensor, dict[str, Any]] = {}

    def step(self) -> None:
        for target, p in self.pairs:
            target.copy_(p)


def adamw8bit(params: Sequence[Tensor]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=LR)


DIAGONAL, RANK_ONE = "Diagonal TO", "RankOne TO"
DIAGONAL_RMS, RANK_ONE_RMS = f"{DIAGONAL}, rms and relative alpha", f"{RANK_ONE}, rms and relative alpha"
DIAGONAL_BEST = f"{DIAGONAL}, recommended"
ADAMW, FOREACH, SGD, BNB, COPY = "AdamW fused", "AdamW foreach", "SGD momentum fused", "bitsandbytes AdamW8bit", "copy_"
METHODS = {
    DIAGONAL: Method(partial(DiagonalTO, lr=LR), 2, ours=True),
    DIAGONAL_RMS: Method(partial(DiagonalTO, lr=LR, **RMS), 2, gradient_reads=2, ours=True),
    DIAGONAL_BEST: Method(partial(DiagonalTO, lr=LR, **RECOMMENDED), 2, gradient_reads=7, ours=True),  # 2 are writes
    RANK_ONE: Method(partial(RankOneTO, lr=LR), 3, gradient_reads=2, state_reads=1, ours=True),
    RANK_ONE_RMS: Method(partial(RankOneTO, lr=LR, **RMS), 3, gradient_reads=2, state_reads=1, ours=True),
    ADAMW: Method(partial(torch.optim.AdamW, lr=LR, fused=True), 2),
    FOREACH: Method(partial(torch.optim.AdamW, lr=LR, foreach=True), 2),
    SGD: Method(partial(torch.optim.SGD, lr=LR, momentum=0.9, fused=True), 1),
    BNB: Method(adamw8bit, 2, state_bytes=1 + 4 / 256),  # a code, and a float32 for 256 of them
    COPY: Method(Copy, 0, gradient_reads=0),
}
TITLES = {"llama-7b": "Llama-7B's shapes", "lora": "LoRA set", "big": "one tensor"}
OURS = [name for name, method in METHODS.items() if method.ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, help="timed steps of each method, at least 2")
    parser.add_argument("--warm-up", type=int, default=2, help="steps between the first one and those")
    parser.add_argument("--quick", action="store_true", help="a million weights, three rounds")
    parser.add_argument("--output", type=Path, help="the JSON file; --quick leaves it in a temporary folder")
    parser.add_argument("--table", action="store_true", help="print the tables of the results that are there")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else ROUNDS[options.device])
    options.warm_up = 0 if options.quick else options.warm_up
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results = Path(gettempdir()) if options.quick else HERE
    output = options.output or results / f"step-{file_word(name)}.json"
    if not options.table:
        torch.set_num_threads(options.threads)
        write_json(output, measure_all(options), indent=1)
    found = json.loads(output.read_text())
    print(summary(found), tables(found), sep="\n\n")


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    device = torch.device(options.device)
    if INTERPRETED:
        from to_finetune.optim.kernels import gpu

        fused.kernels_for = lambda device_type: gpu  # type: ignore[assignment]
    about, kernels = machine(), fused.kernels_for(device.type)
    used = {key: getattr(options, key) for key in ("device", "threads", "rounds", "warm_up", "quick")}
    used |= {"kernels": kernels.__name__ if kernels else None, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    used["load_average_before"] = os.getloadavg()[0]
    cases: list[dict[str, Any]] = []
    for case, shapes in case_shapes(device, options.quick).items():
        for dtype in (torch.float32, torch.bfloat16):
            weight = str(dtype).removeprefix("torch.")
            print(f"{case}, {weight}: {sum(map(prod, shapes)):,} weights in {len(shapes)} tensors", flush=True)
            contestants = [Contestant(method, weight) for method in METHODS]
            contestants += [Contestant(method, "int8") for method in OURS]
            compete(contestants, shapes, dtype, device, options)
            cases += summaries(case, shapes, weight, contestants)
    small = [Contestant(method, "float32") for method in (DIAGONAL, RANK_ONE, ADAMW, FOREACH)]
    shapes = [(1,)] * (4 if INTERPRETED else 448)
    compete(small, shapes, torch.float32, device, options)
    return {
        "machine": about,
        "options": used,
        "seconds": round(time.perf_counter() - began),
        "cases": cases,
        "host_overhead": {"tensors": len(shapes), "methods": {one.method: one.times() for one in small}},
        "bars": bars(cases, device.type == "cuda"),
    }


def case_shapes(device: torch.device, quick: bool) -> dict[str, Shapes]:
    """Return the shapes of each case's tensors, as many as fit into memory."""
    if INTERPRETED and quick:
        return {"four small tensors": [(100, 100)] * 4}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = min(1_000_000 if quick else WEIGHTS[device.type], memory // NEEDED)
    llamas = [linears(divisor, norms=2) * layers for divisor, layers in LLAMA_SCALES]
    llama = next((shapes for shapes in llamas if sum(map(prod, shapes)) <= 1.02 * largest), llamas[-1])
    adapted = linears(16 if quick else 1) * 32
    lora = [shape for outputs, inputs in adapted for shape in ((16, inputs), (outputs, 16))]
    return {"llama-7b": llama, "lora": lora, "big": [(largest,)]}


def linears(divisor: int, norms: int = 0) -> list[tuple[int, ...]]:
    """Return the shapes of one layer of Llama-7B, with its sizes divided by `divisor`."""
    h, m = 4096 // divisor, 11008 // divisor
    return [(h, h)] * 4 + [(m, h)] * 2 + [(h, m)] + [(h,)] * norms


@dataclass
class Contestant:
    """A method with its own weights, and the measurements of its steps."""

    method: str
    state_dtype: str
    optimizer: Any = None
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    state_bytes: int = 0
    error: str | None = None

    def build(self, base: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        params = [w.clone().requires_grad_() for w in base]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        method = METHODS[self.method]
        self.optimizer = method.build(params, **({"state_dtype": self.state_dtype} if method.ours else {}))

    def timed_step(self, device: torch.device) -> None:
        """Time a step. On a GPU, `ms` is the time between two device events, and `host_ms` the time to issue it.

        `device_ms` is that of a second step, issued while the GPU is busy: without the wait for the first launch.
        """
        if device.type == "cuda":
            ms, host_ms = self._step_between_events()
            torch.cuda._sleep(BUSY)
            self.device_ms.append(self._step_between_events()[0])
        else:
            ms = host_ms = self._step_on_host()
        self.ms.append(ms)
        self.host_ms.append(host_ms)

    def _step_between_events(self) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        host_ms = self._step_on_host()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), host_ms

    def _step_on_host(self) -> float:
        began = time.perf_counter()
        self.optimizer.step()
        return 1e3 * (time.perf_counter() - began)

    def measure_memory(self, device: torch.device) -> None:
        """Measure a step's peak memory above the level before, and the bytes of state without the 0-dim counts."""
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.optimizer.step()
            self.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            with suppress(OSError, AttributeError):  # not supported on this system
                ctypes.CDLL(None).malloc_trim(0)  # freed memory counts as used until it is given back
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
                before = process_memory("VmRSS")
                self.optimizer.step()
                self.peak_mib = max(0, process_memory("VmHWM") - before) / 2**20
        state = [x for of_weight in self.optimizer.state.values() for x in of_weight.values()]
        tensors = {x.data_ptr(): x for x in state if isinstance(x, Tensor) and x.dim() > 0}
        self.state_bytes = sum(x.numel() * x.element_size() for x in tensors.values())

    def times(self) -> dict[str, float]:
        q1, ms, q3 = statistics.quantiles(self.ms, n=4, method="inclusive")
        times = {"ms": ms, "q1": q1, "q3": q3, "host_ms": statistics.median(self.host_ms)}
        return times | ({"device_ms": statistics.median(self.device_ms)} if self.device_ms else {})


def process_memory(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def compete(
    contestants: Sequence[Contestant],
    shapes: Shapes,
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    """Time all contestants in turns, then measure their memory and free their weights and state."""
    torch.manual_seed(0)
    draw = random.Random(0)
    base, grads = ([torch.randn(s, device=device).mul_(x).to(dtype) for s in shapes] for x in (0.02, 0.001))
    for one in contestants:
        try:
            one.build(base, grads)
            one.optimizer.step()  # creates the state
        except Exception as error:
            if one.method != BNB:
                raise
            one.optimizer, one.error = None, f"{type(error).__name__}: {error}"
    del base
    able = [one for one in contestants if one.error is None]
    gc.collect()
    for turn in range(options.warm_up + options.rounds):
        rarely = device.type == "cpu" and options.rounds > 2 * RARELY and turn % RARELY
        present = [one for one in able if not (rarely and one.method == BNB)]
        for one in draw.sample(present, len(present)):
            one.timed_step(device)
        if turn + 1 == options.warm_up:
            for one in able:
                one.ms, one.host_ms, one.device_ms = [], [], []
    for one in able:
        one.measure_memory(device)
        one.optimizer = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summaries(case: str, shapes: Shapes, weight: str, contestants: Sequence[Contestant]) -> Iterator[dict[str, Any]]:
    """Yield one summary per state dtype; ratios are to the AdamW and the copy of the same rounds."""
    weights = sum(map(prod, shapes))
    median = {one.method: statistics.median(one.ms) for one in contestants if one.state_dtype == weight and one.ms}
    copied = METHODS[COPY].bytes_per_weight(weight, weight) / median[COPY]
    for state in (weight, "int8"):
        methods: dict[str, Any] = {}
        for one in (one for one in contestants if one.state_dtype == state):
            if one.error is not None:
                methods[one.method] = {"error": one.error}
                continue
            times, size = one.times(), METHODS[one.method].bytes_per_weight(weight, state)
            figures = times | {
                "bytes_per_weight": size,
                "gb_per_s": size * weights / times["ms"] / 1e6,
                "to_adamw_fused": times["ms"] / median[ADAMW],
                "of_copy": size / times["ms"] / copied,
                "state_bytes_per_weight": one.state_bytes / weights,
                "peak_extra_mib": one.peak_mib,
            }
            methods[one.method] = {key: x if x is None else round(x, 4) for key, x in figures.items()}
        about = {"case": case, "tensors": len(shapes), "weights": weights}
        yield {**about, "weight_dtype": weight, "state_dtype": state, "methods": methods}


def bars(cases: Sequence[dict[str, Any]], gpu: bool) -> list[dict[str, Any]]:
    """Compare the steps with the bars that they are held to; `met` is null if a figure is missing."""
    at = {(case["case"], case["weight_dtype"], case["state_dtype"]): case["methods"] for case in cases}
    full = [key for key in at if key[1] == key[2]]
    compare = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
    found: list[dict[str, Any]] = []

    def bar(text: str, value: float | None, relation: str, limit: float) -> None:
        met = None if value is None else compare[relation](value, limit)
        found.append({"bar": f"{text} {relation}", "value": value, "limit": limit, "met": met})

    for method, limit in ((DIAGONAL, 1.0), (DIAGONAL_RMS, 1.15), (RANK_ONE, 1.6)):
        for key in full:
            bar(f"{method}, {key[0]}, {key[1]}: time / {ADAMW}", at[key][method]["to_adamw_fused"], "<=", limit)
    for case, weight, state in full:
        text, ms = f"{DIAGONAL}, {case}, {weight}, int8 state: time /", at[case, weight, "int8"][DIAGONAL]["ms"]
        if gpu and weight == "float32":
            bar(f"{text} float32 state", round(ms / at[case, weight, state][DIAGONAL]["ms"], 4), "<=", 0.6)
        other = at[case, weight, state][BNB].get("ms")
        bar(f"{text} {BNB}", other and round(ms / other, 4), "<=", 1.0)
    for method in (DIAGONAL, RANK_ONE):
        for key in (key for key in full if key[0] != "lora"):
            share = at[key][method]["of_copy"]
            bar(f"{method}, {key[0]}, {key[1]}: share of {COPY}'s GB/s", share, ">=", 0.85 if gpu else 0.75)
    for key, methods in at.items():
        peaks = [methods[method]["peak_extra_mib"] for method in OURS]
        text = f"Largest of ours, {key[0]}, {key[1]}, {key[2]} state: MiB of a step"
        bar(text, None if None in peaks else max(peaks), "<=", 64.0)
    for method, states in ((DIAGONAL, 2), (RANK_ONE, 3)):
        for dtype, relation, each in (("float32", "=", 4.0), ("bfloat16", "=", 2.0), ("int8", "<=", 1.05)):
            worst = max(methods[method]["state_bytes_per_weight"] for key, methods in at.items() if key[2] == dtype)
            bar(f"{method}, {dtype} state: bytes a weight, worst case", worst, relation, round(states * each, 2))
    return found


def summary(results: dict[str, Any]) -> str:
    """Return Markdown: times relative to the fused AdamW's, as in the README."""
    cases = sorted(results["cases"], key=lambda case: case["weight_dtype"] != "float32")
    full = [case for case in cases if case["state_dtype"] == case["weight_dtype"]]
    int8 = [case["methods"] for case in cases if case["state_dtype"] == "int8"]
    rows = {method: [case["methods"][method].get("to_adamw_fused") for case in full] for method in METHODS}
    rows[f"{DIAGONAL}, int8 state"] = [methods[DIAGONAL]["to_adamw_fused"] for methods in int8]
    lines = [
        f"| | {' | '.join(TITLES[case['case']] for case in full)} |",
        "|---" * (len(full) + 1) + "|",
        f"| | {' | '.join(case['weight_dtype'] for case in full)} |",
    ]
    for name, ratios in rows.items():
        cells = ["" if x is None else f"{x:.1f}" if x >= 10 else f"{x:.2f}" for x in ratios]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ms = [f"{case['methods'][ADAMW]['ms']:.1f}" for case in full]
    return "\n".join([*lines, f"| *{ADAMW}, ms* | {' | '.join(ms)} |"])


def tables(results: dict[str, Any]) -> str:
    """Return Markdown: every method of every case, the overhead of many tensors, and the bars."""
    lines = ["| case | weights, state | method | ms (quartiles) | host ms | device ms | × AdamW fused | GB/s "]
    lines[0] += "| of copy_ | state bytes a weight | MiB of a step |"
    lines.append("|---" * 11 + "|")
    for case in results["cases"]:
        for method, x in case["methods"].items():
            head = f"| {case['case']} | {case['weight_dtype']}, {case['state_dtype']} | {method} |"
            if "error" in x:
                lines.append(f"{head} {x['error'].splitlines()[0]} | | | | | | | |")
                continue
            peak = "" if x["peak_extra_mib"] is None else f"{x['peak_extra_mib']:.1f}"
            on_device = f"{x['device_ms']:.2f}" if "device_ms" in x else ""
            lines.append(
                f"{head} {x['ms']:.2f} ({x['q1']:.2f}–{x['q3']:.2f}) | {x['host_ms']:.2f} | {on_device} "
                f"| {x['to_adamw_fused']:.2f} | {x['gb_per_s']:.1f} | {x['of_copy']:.0%} "
                f"| {x['state_bytes_per_weight']:.3f} | {peak} |"
            )
    overhead = results["host_overhead"]
    lines += ["", f"| {overhead['tensors']} one-element tensors | ms a step | host ms |", "|---|---|---|"]
    lines += [f"| {method} | {x['ms']:.3f} | {x['host_ms']:.3f} |" for method, x in overhead["methods"].items()]
    lines += ["", "| bar | limit | measured | |", "|---|---|---|---|"]
    words = {True: "met", False: "**not met**", None: "not measured"}
    for x in results["bars"]:
        measured = "" if x["value"] is None else f"{x['value']:.3f}"
        lines.append(f"| {x['bar']} | {x['limit']:g} | {measured} | {words[x['met']]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
