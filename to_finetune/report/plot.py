"""The loss curves of one run or of several, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: safe for colour-blind eyes


def plot_losses(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw training loss (line) and held-out loss (dots, dashed) over the steps.

    Args:
        histories: for each run's label, the Trainer's ``state.log_history``.
        path: the file to write, in the format of its suffix: .png, .svg or .pdf.
        title: shown above the picture.
    """
    figure, axes = new_axes(4.2)
    for i, (label, history) in enumerate(histories.items()):
        colour = COLOURS[i % len(COLOURS)]
        steps, losses = series(history, "loss")
        alone: dict[str, Any] = {"marker": "o"} if len(steps) == 1 else {}  # a single point makes no line
        axes.plot(steps, losses, color=colour, linewidth=1.6, label=label, **alone)
        steps, losses = series(history, "eval_loss")
        if steps:
            final = f"{label}, held out (ends at {losses[-1]:.3f})"
            axes.plot(steps, losses, "o--", color=colour, markersize=5, linewidth=1.0, alpha=0.8, label=final)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def new_axes(height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of this height in inches; a notebook's own figures and backend are left alone."""
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the rows of a Trainer's log that have `key`."""
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]
