"""`to-finetune evaluate`: held-out loss and perplexity, or lm-evaluation-harness's tasks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from to_finetune.errors import UsageError, at_least_one

if TYPE_CHECKING:
    from rich.console import RenderableType

    from to_finetune.training.evaluate import HeldOut

TAKES_FLAGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "to-finetune evaluate RUN_OR_MODEL [--compare] [options] [FLAGS_OF_A_RUN]"
    parser.description = (
        "The mean loss over the completions' tokens of held-out data, and its exponential, the perplexity. A run is "
        "evaluated on what it held out itself, in the way that it was trained; flags of finetune.py (--bf16, "
        "--dataset_config, ...) go over its config.yaml."
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, one of its checkpoints, or any model")
    parser.add_argument("--dataset_name", help="a file or a hub name (default: what the run held out)")
    parser.add_argument("--split", help="of --dataset_name (default: train of a file, test of a hub set)")
    parser.add_argument("--compare", action="store_true", help="evaluate the run's base as well")
    parser.add_argument("--batch_size", type=int, help="rows at a time (default: as the run did, else 8)")
    parser.add_argument("--max_length", type=int, help="cut rows to so many tokens (default: as the run did)")
    parser.add_argument(
        "--tasks", help="instead, tasks of lm-evaluation-harness: hellaswag,arc_easy (to-finetune[evaluate])"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="how the weights are held")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import datasets
    import transformers
    from rich.console import Console

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    at_least_one(batch_size=arguments.batch_size)
    if arguments.split is not None and arguments.dataset_name is None:
        raise UsageError(f"split={arguments.split!r} is of --dataset_name, which is not given.")
    with redirect_stdout(sys.stderr):  # keep the output of libraries out of stdout
        values, table = _tasks(arguments) if arguments.tasks is not None else _held_out(arguments)
    if arguments.json:
        print(json.dumps({"model": arguments.model, **values}, indent=2))
    else:
        Console().print(table)
    return 0


def _held_out(arguments: argparse.Namespace) -> tuple[dict[str, Any], RenderableType]:
    from to_finetune.training.evaluate import evaluate_held_out

    named = {
        "--per_device_eval_batch_size": arguments.batch_size,
        "--max_length": arguments.max_length,
        "--dtype": arguments.dtype,
    }
    flags = [f"{flag}={value}" for flag, value in named.items() if value is not None] + arguments.flags
    result = evaluate_held_out(arguments.model, arguments.dataset_name, arguments.split, flags, arguments.compare)
    values: dict[str, Any] = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "rows": result.rows,
        "tokens": result.tokens,
    }
    if result.base_loss is not None:
        values["base"] = {"loss": result.base_loss, "perplexity": math.exp(result.base_loss)}
        values["difference"] = {"loss": result.loss - result.base_loss}
    return values, held_out_table(result)


def held_out_table(result: HeldOut) -> RenderableType:
    """Return a table of loss and perplexity; with a base, also its row, the difference and the perplexities' ratio."""
    from rich.console import Group
    from rich.table import Table

    about = f"{result.rows:,} rows, {result.tokens:,} tokens with a loss"
    table = Table("")
    table.add_column("loss", justify="right")
    table.add_column("perplexity", justify="right")
    tuned = (f"{result.loss:.4f}", f"{result.perplexity:,.2f}")
    if result.base_loss is None:
        table.add_row("model", *tuned)
        return Group(about, table)
    table.add_row("base", f"{result.base_loss:.4f}", f"{math.exp(result.base_loss):,.2f}", style="dim")
    table.add_row("tuned", *tuned, style="bold", end_section=True)
    change = result.loss - result.base_loss
    table.add_row("change", f"{change:+.4f}", f"× {math.exp(change):.3f}")
    return Group(about, table)


def _tasks(arguments: argparse.Namespace) -> tuple[dict[str, Any], RenderableType]:
    import torch

    from to_finetune.model.opened import choose_device, open_model
    from to_finetune.training.evaluate import evaluate_tasks

    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    if not tasks:
        raise UsageError("tasks='' names none, for example --tasks hellaswag,arc_easy.")
    if arguments.dataset_name or arguments.flags:
        other = arguments.flags[0] if arguments.flags else "--dataset_name"
        raise UsageError(f"--tasks brings its own data and prompts: it does not go with {other}.")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    opened = open_model(arguments.model, choose_device(), dtype, with_base=arguments.compare)
    measure = partial(evaluate_tasks, opened, tasks, arguments.batch_size, arguments.max_length)
    if not arguments.compare:
        model = measure()
        return {"tasks": model}, task_table({"model": model})
    with opened.as_base():
        base = measure()
    tuned = measure()
    return {"tasks": tuned, "base": base}, task_table({"base": base, "tuned": tuned})


def task_table(measured: dict[str, dict[str, dict[str, float]]]) -> RenderableType:
    """Return a table with a row per metric and a column per model; for two models also their difference."""
    from rich.table import Table

    table = Table(title="lm-evaluation-harness", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for voice in measured:
        table.add_column(voice, justify="right")
    if len(measured) == 2:
        table.add_column("change", justify="right")
    models = list(measured.values())
    for task, metrics in models[-1].items():
        for metric, value in metrics.items():
            row = [f"{model[task][metric]:.4f}" for model in models]
            change = [f"{value - models[0][task][metric]:+.4f}"] if len(models) == 2 else []
            table.add_row(task, metric, *row, *change)
    return table
