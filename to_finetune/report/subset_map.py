"""Which parameters train, by layer and module: as a picture, and as a table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from rich.table import Table
from rich.text import Text

from to_finetune.layers import layer_list, layer_of, module_of
from to_finetune.report.plot import COLOURS

LOOKS: dict[str, dict[str, Any]] = {
    "trained": {"facecolor": COLOURS[0], "edgecolor": "white"},
    "partly": {"facecolor": COLOURS[5], "edgecolor": "white", "hatch": "////"},
    "frozen": {"facecolor": "#e4e4e4", "edgecolor": "white"},
}
CHARACTERS = {"trained": "█", "partly": "▒", "frozen": "░"}


@dataclass
class Cell:
    """The weights of one module in one layer, or of a module outside of them."""

    trained: int = 0
    total: int = 0

    def add(self, weights: int, trains: bool) -> None:
        self.total += weights
        self.trained += weights if trains else 0

    @property
    def state(self) -> str:
        if self.trained == 0:
            return "frozen"
        return "trained" if self.trained == self.total else "partly"


@dataclass
class Row:
    """One module type: a cell for each layer that has it, or a single one under None outside of the layers."""

    label: str
    cells: dict[int | None, Cell] = field(default_factory=dict)

    def sum(self) -> Cell:
        return Cell(sum(c.trained for c in self.cells.values()), sum(c.total for c in self.cells.values()))


def plot_subset(
    sizes: Mapping[str, int], trained: Collection[str], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw a grid of module types over decoder layers, each cell trained, partly trained or frozen.

    Args:
        sizes: the number of weights of each of the model's parameters, by name, in the model's order.
        trained: the names of the parameters that train.
        path: the file to write, in the format of its suffix: .png, .svg or .pdf.
        title: shown above the picture, before the total.
    """
    layers, rows = layers_and_rows(sizes, trained)
    columns = max(len(layers), 1)
    width = min(max(0.15 * columns, 4.8), 12.0)
    figure = Figure(figsize=(width + 3.2, 0.3 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    positions = _positions(rows)
    for row, y in zip(rows, positions, strict=True):
        for layer, cell in row.cells.items():
            x, span = (0, columns) if layer is None else (layers.index(layer), 1)
            axes.add_patch(Rectangle((x, y - 0.5), span, 1, linewidth=1.0, **LOOKS[cell.state]))
            if columns <= 8:
                colour = "white" if cell.state == "trained" else "black" if cell.state == "partly" else "#777777"
                weights = in_words(cell.trained or cell.total)
                text = axes.text(x + span / 2, y, weights, ha="center", va="center", fontsize=7, color=colour)
                if cell.state == "partly":
                    text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})

    sums = [row.sum() for row in rows]
    axes.set(xlim=(0, columns), ylim=(positions[-1] + 0.5, -0.5), xlabel="layer")
    axes.set_yticks(positions, [_short(row.label, 40) for row in rows], fontsize=8)
    ticks = labelled(len(layers))
    axes.set_xticks([i + 0.5 for i in ticks], [str(layers[i]) for i in ticks], fontsize=8)
    right = axes.twinx()
    right.set(ylim=axes.get_ylim())
    right.set_yticks(positions, [_share(cell) for cell in sums], fontsize=8)
    for label, cell in zip(right.get_yticklabels(), sums, strict=True):
        label.set_color("#777777" if cell.state == "frozen" else "black")
    for side in (axes, right):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)

    states = {cell.state for row in rows for cell in row.cells.values()}
    shown = [Patch(label=state, **look) for state, look in LOOKS.items() if state in states]
    figure.legend(handles=shown, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    axes.set_title(f"{title}\n{headline(rows)}" if title else headline(rows), loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


def subset_table(sizes: Mapping[str, int], trained: Collection[str]) -> Table:
    """Draw the same for a terminal: one row per module type, one character per layer (█ trained, ▒ partly, ░ frozen).

    It fits into 80 columns: more than 40 layers wrap onto several lines, and so does the ruler above them.

    Args:
        sizes: the number of weights of each of the model's parameters, by name, in the model's order.
        trained: the names of the parameters that train.
    """
    layers, rows = layers_and_rows(sizes, trained)
    lines = -(-len(layers) // 40) or 1
    per_line = -(-len(layers) // lines // 10) * 10 if lines > 1 else max(len(layers), 1)
    parts = [layers[i : i + per_line] for i in range(0, len(layers), per_line)]
    title = headline(rows)
    table = Table(title=title, title_justify="left", header_style="bold", box=None, min_width=len(title))
    table.padding = (0, 2, 1 if lines > 1 else 0, 0)
    table.add_column("module", no_wrap=True)
    table.add_column(Text("\n".join(map(_ruler, parts))), no_wrap=True)
    table.add_column("trained", justify="right", no_wrap=True)
    for row in rows:
        bars = [_bar(row, part) for part in parts] if None not in row.cells else [_bar(row, [None])]
        total = row.sum()
        weights = in_words(total.trained) if total.trained else ""
        table.add_row(Text(_short(row.label, 26)), Text("\n").join(bars), weights, style="" if weights else "dim")
    return table


def _bar(row: Row, layers: Sequence[int | None]) -> Text:
    bar = Text()
    for layer in layers:
        cell = row.cells.get(layer)
        bar.append(CHARACTERS[cell.state] if cell else " ", "blue" if cell and cell.trained else "dim")
    return bar


def layers_and_rows(sizes: Mapping[str, int], trained: Collection[str]) -> tuple[list[int], list[Row]]:
    """Return the layers' numbers, and the rows in the model's order: before the layers, in them, after them."""
    unknown = set(trained) - sizes.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is said to train and is no parameter of the model.")
    prefix, layers = layer_list(sizes)
    rows: dict[str, Row] = {}
    for name, weights in sizes.items():
        layer = layer_of(name, prefix)
        label = row_label(name, prefix)
        cell = rows.setdefault(label, Row(label)).cells.setdefault(layer, Cell())
        cell.add(weights, name in trained)
    first = next((i for i, row in enumerate(rows.values()) if None not in row.cells), 0)
    ordered = list(rows.values())
    inside = [row for row in ordered if None not in row.cells]
    outside = [row for row in ordered if None in row.cells]
    return layers, outside[:first] + inside + outside[first:]


def row_label(name: str, prefix: str) -> str:
    """Return the module type; a layer's experts share one, and so does every other numbered list of the model."""
    module = module_of(name, prefix)
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return module
    if layer_of(name, prefix) is None:
        return ".".join(parts[: numbers[0]])
    return ".".join("*" if part.isdigit() else part for part in parts)


def _short(label: str, width: int) -> str:
    """Shorten a long name to its end, which tells it from its neighbours."""
    return label if len(label) <= width else "…" + label[1 - width :]


def _positions(rows: list[Row]) -> list[float]:
    """Return the height of each row, with a gap between the rows of the layers and the others."""
    positions = [0.0]
    for above, below in pairwise(rows):
        positions.append(positions[-1] + (1.0 if (None in above.cells) == (None in below.cells) else 1.35))
    return positions


def labelled(count: int) -> list[int]:
    """Return which of `count` layers to number: the first, the last and some between."""
    every = 1 if count <= 16 else 4 if count <= 40 else 10
    ticks = [i for i in range(0, count, every) if count - 1 - i >= every / 2]
    return [*ticks, count - 1] if count else []


def _ruler(layers: list[int]) -> str:
    """0····5····10···15··: the number of every fifth layer, above its character."""
    marks = [str(layer) if i + len(str(layer)) <= len(layers) else "" for i, layer in enumerate(layers) if i % 5 == 0]
    return "".join(mark.ljust(5, "·") for mark in marks)[: len(layers)]


def headline(rows: list[Row]) -> str:
    trained, total = (sum(getattr(row.sum(), key) for row in rows) for key in ("trained", "total"))
    return f"{in_words(trained)} of {in_words(total)} weights train ({100 * trained / total:.3g} %)"


def _share(cell: Cell) -> str:
    return f"{in_words(cell.trained)} of {in_words(cell.total)}" if cell.state == "partly" else in_words(cell.total)


def in_words(weights: int) -> str:
    """Format a number of weights as 1.23 B, 45.6 M, 789 k or 12."""
    for unit, letter in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if weights >= 0.9995 * unit:
            return f"{weights / unit:.{max(0, 3 - len(str(int(weights / unit + 1e-3))))}f}{letter}"
    return str(weights)
