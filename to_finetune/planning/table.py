"""A plan in print, and sizes as people write them."""

from __future__ import annotations

import re

from rich.table import Table

from to_finetune.errors import UsageError
from to_finetune.planning.memory import Plan

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """``24GB`` (10^9 bytes each) or ``24GiB`` (2^30) as bytes.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)B", text.strip().upper())
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is not a size: a number and a unit, such as 24GB or 80GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def gigabytes(count: float) -> str:
    """Bytes in units of 10^9."""
    return f"{count / 1e9:.2f} GB"


def plan_table(plan: Plan) -> Table:
    """One row a part of the memory of each GPU, and the sum."""
    settings, work = plan.settings, plan.settings.work
    on_gpu = work.device != "cpu"
    table = Table(title=f"Memory of each {'GPU' if on_gpu else 'process'}", title_justify="left", header_style="bold")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    table.add_column("of")
    frozen = plan.total_weights - plan.trained_weights
    base = f"{frozen:,} weights, {work.quantization or work.loaded_dtype}"
    state_dtype = str(settings.optimizer_options.get("state_dtype") or "").removeprefix("torch.")
    rows = {
        "frozen weights": (plan.frozen, base),
        "trained weights": (plan.trained, f"{plan.trained_weights:,} weights"),
        "gradients": (plan.gradients, "of the trained weights"),
        "optimizer state": (plan.state, f"{settings.optimizer.__name__} {state_dtype}".strip()),
        "activations": (plan.activations, _activations(plan)),
        "buffers": (plan.buffers, f"{settings.layout}, {settings.processes} process(es)"),
        "CUDA context": (plan.context, "assumed"),
    }
    for name, (count, what) in rows.items():
        if count:
            table.add_row(name, gigabytes(count), what)
    table.add_section()
    table.add_row("at the peak", gigabytes(plan.total), "", style="bold")
    if plan.host:
        table.add_row("in the CPU's memory", gigabytes(plan.host), "for each process", style="dim")
    return table


def _activations(plan: Plan) -> str:
    work = plan.settings.work
    checkpointing = "with" if work.checkpointing else "without"
    return f"{work.rows} x {work.length} tokens, {checkpointing} gradient checkpointing"
