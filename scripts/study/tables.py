"""The study's tables and figures, from the runs in results/.

    python scripts/study/tables.py

Writes results/tables.md, curves.svg and sensitivity.svg (and PNGs of both, to look at), and tables.md in results/again
and results/third.
"""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.ticker import NullLocator
from scipy.stats import ttest_rel
from study import AGAIN, ASIDE, CELLS, METHODS, ON_GPU, RESULTS, SEEDS, TUNING_SEED

from to_finetune.files import write_whole
from to_finetune.report.plot import COLOURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIRST = 0.2  # share of the steps whose mean loss shows the speed of the start
TRIALS = 5  # rates that must have been tried before a method counts as diverging
REFERENCE = "adamw"
DRAWN = ("adamw", "diagonal_to_factored", "momentum_factored", "rank_one_to_factored", "adafactor", "muon")
Run = dict[str, Any]


class Judged(NamedTuple):
    """A method in a cell: its runs on the other seeds at the rate that won on seed 0, and all of seed 0 by rate.

    If every rate diverged, `lr` is NaN and there are no runs on other seeds.
    """

    lr: float
    runs: list[Run]
    tuning: dict[float, Run]

    def mean(self, measure: str) -> float | None:
        """Return the mean over the runs; None if a seed, or every rate, diverged."""
        values = measured_all(self.runs, measure)
        return fmean(values) if values else None


def main() -> None:
    cells = write_tables(RESULTS)
    curves(cells)
    sensitivity(cells)
    for results in AGAIN:
        write_tables(results)
    print((RESULTS / "tables.md").read_text(encoding="utf-8"))


def write_tables(results: Path) -> dict[str, dict[str, Judged]]:
    """Write tables.md of the runs in a folder; return its cells that have the reference."""
    cells = {cell: judged(cell, results) for cell in [*CELLS, ON_GPU]}
    begun = [
        tried(cell, results) for cell, methods in cells.items() if REFERENCE not in methods and runs_of(cell, results)
    ]
    cells = {cell: methods for cell, methods in cells.items() if REFERENCE in methods}
    write_whole(results / "tables.md", "\n\n".join([*tables(cells), *begun]) + "\n")
    return cells


def runs_of(cell: str, results: Path) -> dict[str, list[Run]]:
    """Read the runs of a cell, by method."""
    path = results / f"{cell.replace('/', '-')}.jsonl"
    by_method: dict[str, list[Run]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else ():
        run = json.loads(line)
        by_method[run["method"]].append(run)
    return by_method


def judged(cell: str, results: Path) -> dict[str, Judged]:
    """Return the methods of a cell whose runs are complete."""
    by_method, found = runs_of(cell, results), {}
    for method in METHODS:
        tuning = {run["lr"]: run for run in by_method[method] if run["seed"] == TUNING_SEED}
        finished = {lr: run["alpaca"] for lr, run in tuning.items() if run["alpaca"] is not None}
        judging = [run for run in by_method[method] if run["seed"] in SEEDS]
        if METHODS[method].lr is None and judging:
            lr = judging[0]["lr"]
        elif finished:
            lr = min(finished, key=lambda lr: finished[lr])
        else:
            if len(tuning) >= TRIALS:
                found[method] = Judged(math.nan, [], tuning)
            continue
        runs = [run for run in judging if run["lr"] == lr]
        if len(runs) == len(SEEDS):
            runs.sort(key=lambda run: run["seed"])
            found[method] = Judged(lr, runs, dict(sorted(tuning.items())))
    return found


def measured(run: Run, measure: str) -> float | None:
    """Return the held-out loss on "alpaca" or "user", the mean training loss ("train") or that of the "first" steps."""
    if run["alpaca"] is None or measure in ("alpaca", "user"):
        return run[measure] if run["alpaca"] is not None else None
    losses = run["curve"]
    return fmean(losses if measure == "train" else losses[: round(FIRST * len(losses))])


def measured_all(runs: list[Run], measure: str) -> list[float]:
    """Return what `measured` returns for each run; an empty list if one diverged."""
    values = [value for run in runs if (value := measured(run, measure)) is not None]
    return values if len(values) == len(runs) else []


def tables(cells: dict[str, dict[str, Judged]]) -> list[str]:
    """Return Markdown: held-out losses against AdamW's, then a table of each cell, which includes `ASIDE`."""
    methods = [method for method in METHODS if any(method in found for found in cells.values())]
    summary = [
        "| held-out loss | " + " | ".join(cell.replace("/", "<br>") for cell in cells) + " |",
        "|---|" + "---:|" * len(cells),
    ]
    for method in methods:
        if method not in ASIDE:
            row = " | ".join(against(found, method) for found in cells.values())
            summary.append(f"| {METHODS[method].title} | {row} |")
    parts = ["\n".join(summary)]
    for cell, found in cells.items():
        rows = [
            f"**{cell}**\n",
            "| method | lr | held out | user-oriented | training, mean | first fifth | at lr / 3 | at 3 lr | ms a step "
            "| state, bytes a weight |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for method, one in found.items():
            losses = [spread(one.runs, measure) for measure in ("alpaca", "user", "train", "first")]
            near = [nearby(one, factor) for factor in (1 / 3, 3.0)]
            times = [run["seconds_a_step"] for run in one.runs if run["seconds_a_step"]]
            ms = f"{1e3 * fmean(times):.0f}" if times else ""
            lr = f"{one.lr:.2g}" if one.runs else f"all {len(one.tuning)}"
            cells_ = [METHODS[method].title, lr, *losses, *near, ms]
            runs = one.runs or list(one.tuning.values())
            rows.append(f"| {' | '.join(cells_)} | {runs[0]['state_bytes_a_weight']} |")
        parts.append("\n".join(rows))
    return parts


def tried(cell: str, results: Path) -> str:
    """Tabulate a cell without the reference: each tuned method's best run of seed 0, and the untuned method's mean."""
    rows = [
        f"**{cell}**, not judged: the best of seed 0, and the mean of the untuned method's seeds\n",
        "| method | rates tried | lr | held out | user-oriented | training, mean | first fifth | ms a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by_method = runs_of(cell, results)
    for name in (name for name in METHODS if name in by_method):
        runs = by_method[name]
        if METHODS[name].lr is not None:
            finished = [run for run in runs if run["seed"] == TUNING_SEED and run["alpaca"] is not None]
            if not finished:
                rows.append(f"| {METHODS[name].title} | {len(runs)} | | diverged | | | | |")
                continue
            runs = [min(finished, key=lambda run: run["alpaca"])]
        means = [
            fmean(measured(run, what) or math.inf for run in runs) for what in ("alpaca", "user", "train", "first")
        ]
        losses, ms = " | ".join(f"{x:.3f}" for x in means), 1e3 * fmean(run["seconds_a_step"] for run in runs)
        rates = len({run["lr"] for run in by_method[name]})
        rows.append(f"| {METHODS[name].title} | {rates} | {runs[0]['lr']:.2g} | {losses} | {ms:.0f} |")
    return "\n".join(rows)


def against(found: dict[str, Judged], method: str) -> str:
    """Return AdamW's loss, or how far a method's is from it in percent, with stars for the paired t-test over seeds."""
    if method not in found:
        return ""
    mean, reference = found[method].mean("alpaca"), found[REFERENCE].mean("alpaca")
    if mean is None or reference is None:
        return "diverged"
    if method == REFERENCE:
        return f"{mean:.3f}"
    pairs = [[run["alpaca"] for run in found[name].runs] for name in (method, REFERENCE)]
    p = float(ttest_rel(*pairs).pvalue)
    stars = next((marks for limit, marks in ((0.001, r"\*\*\*"), (0.01, r"\*\*"), (0.05, r"\*")) if p < limit), "")
    return f"{100 * (mean / reference - 1):+.2f}{stars}"


def spread(runs: list[Run], measure: str) -> str:
    values = measured_all(runs, measure)
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if values else "diverged"


def nearby(one: Judged, factor: float) -> str:
    """Return how much higher the held-out loss of seed 0 is at `factor` times the best rate."""
    lr = next((lr for lr in one.tuning if abs(lr / (factor * one.lr) - 1) < 0.02), None)
    if lr is None:
        return ""
    loss = one.tuning[lr]["alpaca"]
    return "diverged" if loss is None else f"{loss - one.tuning[one.lr]['alpaca']:+.3f}"


def panels(cells: dict[str, dict[str, Judged]]) -> tuple[Any, list[Any]]:
    rows = -(-len(cells) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.5 * rows + 0.4), layout="constrained", squeeze=False)
    flat = [ax for row in axes for ax in row]
    for ax, cell in zip(flat, cells, strict=False):
        ax.set_title(cell, loc="left", fontsize=9)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
    for ax in flat[len(cells) :]:
        ax.set_visible(False)
    return figure, flat


def curves(cells: dict[str, dict[str, Judged]]) -> None:
    """Draw training losses, smoothed over ten steps: the mean over the seeds, their range as a band."""
    figure, axes = panels(cells)
    for ax, found in zip(axes, cells.values(), strict=False):
        for method, colour in zip(DRAWN, COLOURS, strict=True):
            if method in found and found[method].mean("alpaca") is not None:
                lines = [smoothed(run["curve"]) for run in found[method].runs]
                steps = range(10, 10 + len(lines[0]))
                ax.plot(steps, [fmean(at) for at in zip(*lines, strict=True)], color=colour, linewidth=1.3)
                low, high = ([f(at) for at in zip(*lines, strict=True)] for f in (min, max))
                ax.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    finish(figure, cells, "step", "training loss, mean of ten steps", "curves")


def smoothed(losses: list[float], width: int = 10) -> list[float]:
    return [fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


def sensitivity(cells: dict[str, dict[str, Judged]]) -> None:
    """Draw the held-out loss of seed 0 over the rate, in units of each method's best rate."""
    figure, axes = panels(cells)
    for ax, found in zip(axes, cells.values(), strict=False):
        losses = [run["alpaca"] for one in found.values() for run in one.tuning.values() if run["alpaca"] is not None]
        best, room = min(losses), min(0.1 * min(losses), max(losses) - min(losses))
        for method, colour in zip(DRAWN, COLOURS, strict=True):
            if method in found and found[method].runs:
                one = found[method]
                points = [(lr / one.lr, run["alpaca"]) for lr, run in one.tuning.items() if run["alpaca"] is not None]
                ax.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.2, markersize=3)
        ax.set(xscale="log", xlim=(0.2, 5), ylim=(best - 0.05 * room, best + 1.05 * room))
        ax.set_xticks([1 / 3, 1, 3], ["1/3", "1", "3"])
        ax.xaxis.set_minor_locator(NullLocator())
    finish(figure, cells, "rate / the method's best rate", "held-out loss, seed 0", "sensitivity")


def finish(figure: Any, cells: dict[str, dict[str, Judged]], x: str, y: str, name: str) -> None:
    there = [method for method in DRAWN if any(method in found for found in cells.values())]
    handles = [plt.Line2D([], [], color=COLOURS[DRAWN.index(m)], label=METHODS[m].title) for m in there]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(there), frameon=False, fontsize=8)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    figure.savefig(RESULTS / f"{name}.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
