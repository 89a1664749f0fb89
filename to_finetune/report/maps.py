"""The page's layer-by-layer views: the map of what trains, and how large the learned slopes are."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from to_finetune.layers import layer_list, layer_of
from to_finetune.report.charts import Box, Chart, Series, Tick, boxes, curves, number
from to_finetune.report.run import Slopes, TensorSlope
from to_finetune.report.subset_map import headline, in_words, labelled, layers_and_rows, row_label

ByModule = Mapping[str, Mapping[int | None, TensorSlope]]  # by row and layer, None outside of the layers
SCALINGS: dict[str | None, tuple[str, str]] = {  # by grad_scale: the unit of a gradient, and a note
    None: ("gradient", ""),
    "rms": (
        "rms(g)",
        "With grad_scale=rms the model is of each tensor's g / rms(g), and so A is in rms(g) per unit of weight.",
    ),
    "factored": (
        "scaled gradient",
        "With grad_scale=factored the model is of the scaled gradient, whose rows and columns weigh alike and whose "
        "rms is 1 (of embeddings and heads: g / rms(g)), and so A is in its units per unit of weight.",
    ),
}
FEW_LAYERS = 8  # up to this many, the cells have room for a number


class GridCell(NamedTuple):
    """A module in a layer; ``span`` is the number of columns it takes, all of them if it is outside of the layers."""

    state: str  # trained, partly, frozen, slope, none
    text: str
    title: str
    span: int = 1
    share: float = 0.0  # of the largest slope, 0 to 1


class GridRow(NamedTuple):
    label: str
    cells: list[GridCell]
    text: str  # at the right


@dataclass
class Grid:
    """Module types over decoder layers."""

    headline: str
    columns: int
    rows: list[GridRow]
    ticks: list[Tick]

    @property
    def states(self) -> set[str]:
        return {cell.state for row in self.rows for cell in row.cells}


def subset_grid(sizes: Mapping[str, int], trained: Collection[str]) -> Grid:
    """Build the grid of modules, each trained, partly trained or frozen; arguments as for `plot_subset`."""
    layers, rows = layers_and_rows(sizes, trained)
    drawn = []
    for row in rows:
        total = row.sum()
        cells = []
        for layer in [None] if None in row.cells else layers:
            cell = row.cells.get(layer)
            if cell is None:
                cells.append(GridCell("none", "", ""))
                continue
            weights = in_words(cell.trained or cell.total)
            if cell.state == "partly":
                weights = f"{in_words(cell.trained)} of {in_words(cell.total)}"
            where = _where(row.label, layer)
            span = max(len(layers), 1) if layer is None else 1
            text = weights if len(layers) <= FEW_LAYERS else ""
            cells.append(GridCell(cell.state, text, f"{where}: {weights}, {cell.state}", span))
        drawn.append(GridRow(row.label, cells, in_words(total.trained) if total.trained else ""))
    return Grid(headline(rows), max(len(layers), 1), drawn, _ticks(layers))


@dataclass
class SlopesView:
    """The slopes as the page shows them."""

    symbol: str  # of a slope's size
    what: str
    unit: str
    scaling: str  # a sentence on grad_scale, "" without one
    grid: Grid
    grid_unit: str
    is_bound: bool  # whether the grid's numbers are upper bounds, since u vᵀ sees one direction alone
    largest: str
    growth: list[Chart]
    spread: list[Chart]
    layers: list[tuple[str, str]]  # colour and name, for the legend
    table: list[tuple[str, TensorSlope]]
    step: int


def slopes_view(slopes: Slopes, sizes: Mapping[str, int]) -> SlopesView | None:
    """Build the view of the slopes; None if no tensor has one.

    Args:
        sizes: of all parameters of the model, from which its layers are found.
    """
    prefix, _ = layer_list(sizes or dict.fromkeys(slopes.tensors, 1))
    cells: dict[str, dict[int | None, list[TensorSlope]]] = {}
    for name, slope in slopes.tensors.items():
        label = row_label(name, prefix) + (".bias" if name.endswith(".bias") else "")
        cells.setdefault(label, {}).setdefault(layer_of(name, prefix), []).append(slope)
    if not cells or not slopes.steps:
        return None
    by_module = {label: {layer: _together(several) for layer, several in row.items()} for label, row in cells.items()}
    layers = sorted({layer for row in by_module.values() for layer in row if layer is not None})
    gradient, scaling = SCALINGS.get(slopes.grad_scale, SCALINGS[None])
    diagonal = slopes.form == "diagonal"
    grid, largest = _slope_grid(by_module, layers)
    return SlopesView(
        symbol="rms(a)" if diagonal else "‖u‖‖v‖",
        what="A = diag(a)" if diagonal else "the one singular value of A = u vᵀ",
        unit=f"{gradient} per unit of weight",
        scaling=scaling,
        grid=grid,
        grid_unit=gradient,
        is_bound=not diagonal,
        largest=number(float(f"{largest:.3g}")),
        growth=_growth(slopes.steps, by_module, layers),
        spread=_spread(by_module),
        layers=[(_colour(layer, layers), f"layer {layer}") for layer in (layers[:1] + layers[1:][-1:])],
        table=list(slopes.tensors.items()),
        step=slopes.steps[-1],
    )


def _together(several: Sequence[TensorSlope]) -> TensorSlope:
    """Combine the slopes of a layer's experts into one."""
    if len(several) == 1:
        return several[0]
    sizes = [_rms([one.sizes[i] for one in several]) for i in range(len(several[0].sizes))]
    return TensorSlope(sizes, _rms([one.weight for one in several]), [])


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))


def _slope_grid(by_module: ByModule, layers: Sequence[int]) -> tuple[Grid, float]:
    """Return the grid of how much of the gradient each slope accounts for, and the largest of these values."""
    weighed = {
        (label, layer): slope.sizes[-1] * slope.weight
        for label, row in by_module.items()
        for layer, slope in row.items()
    }
    largest = max((x for x in weighed.values() if math.isfinite(x)), default=0.0)
    rows = []
    for label, row in by_module.items():
        cells = []
        for layer in [None] if None in row else layers:
            x = weighed.get((label, layer), math.nan)
            if not math.isfinite(x):
                cells.append(GridCell("none", "", ""))
                continue
            span = max(len(layers), 1) if layer is None else 1
            text = f"{x:#.2g}".rstrip(".") if len(layers) <= FEW_LAYERS else ""
            cells.append(
                GridCell("slope", text, f"{_where(label, layer)}: {x:.3g}", span, x / largest if largest else 0.0)
            )
        rows.append(GridRow(label, cells, ""))
    return Grid("", max(len(layers), 1), rows, _ticks(layers)), largest


def _growth(steps: Sequence[int], by_module: ByModule, layers: Sequence[int]) -> list[Chart]:
    """Draw one chart per module, with one line per layer."""
    charts = []
    for label, row in by_module.items():
        lines = [
            Series(label if layer is None else f"layer {layer}", _colour(layer, layers), steps, slope.sizes)
            for layer, slope in row.items()
        ]
        charts.append(curves(label, "", lines, from_zero=True, x_label="", labels=(2, 4)))
    return [chart for chart in charts if chart]


def _spread(by_module: ByModule) -> list[Chart]:
    """Draw one chart per module, with one box per layer."""
    charts = []
    for label, row in by_module.items():
        spread = [
            Box(f"{_where(label, layer)}: {_in_words(slope.quantiles)}", layer or 0, slope.quantiles)
            for layer, slope in row.items()
        ]
        charts.append(boxes(label, spread, ticks=None not in row))
    return [chart for chart in charts if chart]


def _where(label: str, layer: int | None) -> str:
    return label if layer is None else f"layer {layer} {label}"


def _in_words(quantiles: Sequence[float]) -> str:
    if not quantiles:
        return ""
    low, five, _, median, _, ninety_five, high = (f"{q:.3g}" for q in quantiles)
    return f"median {median}, 90 % within {five} to {ninety_five}, extremes {low} and {high}"


def _colour(layer: int | None, layers: Sequence[int]) -> str:
    """Interpolate between the first layer's colour and the last one's."""
    if layer is None or len(layers) < 2:
        return "var(--deep)"
    share = 100 * layers.index(layer) / (len(layers) - 1)
    return f"color-mix(in oklab, var(--deep) {share:.0f}%, var(--shallow))"


def _ticks(layers: Sequence[int]) -> list[Tick]:
    return [Tick(100 * (i + 0.5) / len(layers), str(layers[i])) for i in labelled(len(layers))]
