"""Render plans for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table
from rich.text import Text

from to_finetune.optim import TrainableOptimizer
from to_finetune.planning.fit import Proposal
from to_finetune.planning.memory import Plan
from to_finetune.planning.settings import Settings
from to_finetune.planning.speed import UTILISATION, Speed
from to_finetune.units import duration, format_size


def plan_table(plan: Plan) -> Table:
    """Tabulate the parts of each GPU's memory, and their sum."""
    settings, work = plan.settings, plan.settings.work
    table = Table(title=f"Memory of each {_unit(plan)}, planned", title_justify="left", header_style="bold")
    table.add_column("part", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("of")
    frozen = plan.total_weights - plan.trained_weights
    base = f"{frozen:,} weights, {work.quantization or work.loaded_dtype}"
    alone = settings.processes == 1 and not settings.is_sharded
    rows = {
        "frozen weights": (plan.frozen, base),
        "trained weights": (plan.trained, f"{plan.trained_weights:,} weights, {_share(plan)}"),
        "gradients": (plan.gradients, "of the trained weights"),
        "optimizer state": (plan.state, _state(settings)),
        "activations": (plan.activations, _activations(plan)),
        "buffers": (plan.buffers, "the model's" if alone else f"{settings.layout}, {settings.processes} processes"),
        "CUDA context": (plan.context, "assumed"),
    }
    for name, (count, what) in rows.items():
        if count:
            table.add_row(name, format_size(count), what)
    table.add_section()
    table.add_row("at the peak", format_size(plan.total), "", style="bold")
    if plan.host:
        table.add_row("in the CPU's memory", format_size(plan.host), "for each process", style="dim")
    table.add_row("on disk", format_size(plan.saved), "the trained weights", style="dim")
    return table


def plan_line(plan: Plan) -> Text:
    """Summarise the same in one line."""
    shown = {name: size for name, size in plan.parts().items() if size > 0.005 * plan.total}
    if (rest := plan.total - sum(shown.values())) > 0:
        shown["rest"] = rest
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in shown.items())
    work = plan.settings.work
    text = Text("Memory of each ").append(_unit(plan)).append(", planned: ").append(format_size(plan.total), "bold")
    return text.append(f", if every row has {work.length} tokens ({parts})")


def verdict(plan: Plan, budget: int) -> Text:
    """Say whether the plan fits, and by how much."""
    room = budget - plan.total
    if plan.fits(budget):
        return Text.assemble(("fits", "bold green"), f" in {format_size(budget)}: {format_size(room)} to spare")
    return Text.assemble(("does not fit", "bold red"), f" in {format_size(budget)}: {format_size(-room)} too much")


def proposals_text(proposals: Sequence[Proposal]) -> Text:
    """List each proposal's memory and share of trained weights, and its flags, one per line to copy."""
    if not proposals:
        return Text("Nothing that a plan knows of would fit.")
    text = Text("What would:")
    for proposal in proposals:
        of = f"\n  {format_size(proposal.plan.total)}, {_share(proposal.plan)} of the weights trained, with"
        text.append(of)
        for change in proposal.changes:
            text.append(f"\n    {change}", "bold")
    return text


def speed_text(speed: Speed, plan: Plan, gpu: str) -> Text:
    """State the estimate in a sentence, with its assumptions."""
    settings = plan.settings
    text = Text(f"{settings.processes} x {gpu}: {speed.tokens_per_second:,.0f} tokens/s")
    if speed.seconds is not None:
        text.append(f"; {settings.max_steps:,} steps of {settings.tokens_per_step:,} tokens take ")
        text.append(duration(speed.seconds), "bold")
        if speed.cost is not None:
            text.append(" and cost ").append(f"{speed.cost:,.2f}", "bold")
    else:
        text.append("; with --max_steps or --rows also the time")
    assumed = f"at {UTILISATION:.0%} of what the data sheet says, padding included"
    return text.append(f" ({assumed})", "dim")


def _unit(plan: Plan) -> str:
    return "process" if plan.settings.work.device == "cpu" else "GPU"


def _share(plan: Plan) -> str:
    return f"{100 * plan.trained_weights / plan.total_weights:.3g} %"


def _state(settings: Settings) -> str:
    dtype = settings.optimizer_options.get("state_dtype") or torch.float32
    ours = issubclass(settings.optimizer, TrainableOptimizer)
    return settings.optimizer.__name__ + (f", {str(dtype).removeprefix('torch.')}" if ours else "")


def _activations(plan: Plan) -> str:
    work = plan.settings.work
    checkpointing = "with" if work.checkpointing else "without"
    joined = " in one row" if work.joined else ""
    return f"{work.rows} x {work.length} tokens{joined}, {checkpointing} gradient checkpointing"
