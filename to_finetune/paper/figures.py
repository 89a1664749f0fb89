"""The figures, each as SVG and PNG: loss curves of the cases, and measurements of what the theorems claim."""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from to_finetune.files import whole
from to_finetune.paper.statistics import Curve
from to_finetune.paper.tables import COMPARED, GROUPS, Results, label

INK, BACKGROUND = "#1b1f24", "#ffffff"  # the page replaces them by its own
COLOURS = {  # Okabe and Ito: safe for colour-blind eyes
    "adam": INK,
    "momentum": "#E69F00",
    "full_to": "#0072B2",
    "diagonal_to": "#D55E00",
    "rank_one_to": "#009E73",
    "sgd": "#CC79A7",
}
STYLE = {
    **dict.fromkeys(("font.size", "axes.labelsize", "figure.labelsize", "legend.fontsize"), 7.5),
    **{"axes.titlesize": 8, "axes.titlelocation": "left", "xtick.labelsize": 6.5, "ytick.labelsize": 6.5},
    **{"legend.frameon": False, "legend.handlelength": 2.2, "axes.linewidth": 0.6},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"axes.grid": True, "grid.color": "#8a8f98", "grid.alpha": 0.25, "grid.linewidth": 0.5},
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"figure.facecolor": BACKGROUND, "axes.facecolor": "none", "svg.hashsalt": "to_finetune"},
}
SHOWN = 0.97  # share of all points that the axes from 0 to 1 show
WIDTH = 7.2  # inches: two columns of a page
DOTS_PER_INCH = 200
GUIDE: dict[str, Any] = {"color": "#8a8f98", "linestyle": (0, (5, 3)), "linewidth": 1.2, "label": "slope −1"}
PROBLEMS = {"ridge_logistic": "ridge-logistic", "quadratic": "quadratic"}
QUANTITIES = {"error": "E ||w − w*||²", "variance": "E ||G − ∇F||²"}
BOUND = GUIDE | {"label": "the bound"}
FAR = 10.0  # times the bound
RATIOS = {"slope_ratio": "max ||A|| / bound", "offset_ratio": "max ||b|| / bound"}
BOUNDED = ("full_to", "diagonal_to", "rank_one_to")
CURVES = {f"figure{i}": group for i, group in enumerate(GROUPS, start=1)}

BEGIN = (
    "The training loss, the mean over the judging seeds and their range as a band, with the rates that won by area. "
    "The start is left out. A line ends where any seed diverged. Dashed, †: ours."
)
STANDARDISED = (
    "Steps and losses are both mapped to [0, 1], as in the paper: in each panel 0 is the lowest mean loss of any "
    "method and 1 the highest, but for the 3 % of all points above, which would flatten the rest; the next figure has "
    "them too."
)
PLAIN = "The losses themselves, on logarithmic axes, each panel's own."
RATES = (
    "The squared distance to the optimum and the squared error of the estimate G, means over {runs} runs. Both fall "
    "like 1/t under the theorem's schedules (solid); with constant β (dotted) the distance does, and the estimate's "
    "error does not. SGD, whose estimate is the mini-batch gradient, and Adam, whose estimate is its bias-corrected "
    "first moment, have no β to vary. The TOs take the paper's exact update, as we derived it."
)
BOUNDS = (
    "The largest norm of A and of b over all runs and steps, over the bound that we derived for the largest sum of α "
    "that the proposition allows (1, the end of the shaded part). Beyond it nothing is promised; a cross: more than "
    "ten times the bound, or an overflow. For RankOne TO we have no proof, its line is a measurement."
)


class Band(NamedTuple):
    """Losses over the seeds, from the first evaluation after the start to the last at which no seed has diverged."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


class Drawn(NamedTuple):
    figure: Figure
    title: str
    caption: str


def draw(results: Results, theory: Mapping[str, Any] | None) -> dict[str, Drawn]:
    """Draw every figure that there are results for."""
    drawn = {}
    with rc_context(STYLE):
        for name, group in CURVES.items():
            cases = {title: results[row] for row, title in GROUPS[group].items() if row in results}
            if cases:
                title = f"Figure {name.removeprefix('figure')}: {group}, "
                scaled, plain = loss_curves(cases, standardised=True), loss_curves(cases, standardised=False)
                drawn[name] = Drawn(scaled, title + "scaled to [0, 1]", f"{BEGIN} {STANDARDISED}")
                drawn[f"{name}_losses"] = Drawn(plain, title + "losses", f"{BEGIN} {PLAIN}")
        if theory:
            caption = RATES.format(runs=theory["settings"]["runs"])
            drawn["figure6"] = Drawn(rates_over_time(theory), "Figure 6: theory, the rates", caption)
            drawn["figure7"] = Drawn(bounds(theory["proposition_2"]), "Figure 7: theory, Proposition 2", BOUNDS)
    return drawn


def write(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Save each as SVG and PNG, without metadata of when and by what it was made; return the paths."""
    written = []
    traceless = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "png": {"Software": None}}
    for name, figure in figures.items():
        for ending, metadata in traceless.items():
            path = folder / f"{name}.{ending}"
            with whole(path) as beside, rc_context(STYLE):
                figure.savefig(beside, format=ending, dpi=DOTS_PER_INCH, metadata=metadata)
            figure.set_layout_engine("none")  # keep the layout of the first save
            written.append(path)
    return written


def loss_curves(cases: Results, standardised: bool) -> Figure:
    """Draw one panel per case."""
    columns = 4 if len(cases) > 4 else min(len(cases), 2)
    rows = ceil(len(cases) / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + rows * (1.5 if columns == 4 else 2.4)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(cases) :]:
        axes.remove()
    for axes, (title, result) in zip(panels, cases.items(), strict=False):
        bands = {name: band(result["steps"], found["curves"]["area"]) for name, found in result["methods"].items()}
        _panel(axes, _standardised(bands) if standardised else bands)
        axes.set_title(title)
        if standardised:
            axes.set(xlim=(0, 1.02), ylim=(-0.05, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        else:
            axes.set_yscale("log")
            _plain_numbers(axes)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.set_xlim(left=0)
    methods = {name for result in cases.values() for name in result["methods"]}
    lines = [Line2D([], [], **_line(name)) for name in ("adam", *COMPARED) if name in methods]
    figure.legend(handles=lines, loc="outside upper center", ncols=ceil(len(lines) / 2))
    figure.supxlabel("step / last step" if standardised else "step")
    figure.supylabel("training loss, from 0 to 1" if standardised else "training loss")
    return figure


def band(steps: Sequence[int], curves: Sequence[Curve]) -> Band:
    """Summarise the losses at the steps over the seeds, one curve each."""
    found = Band([], [], [], [])
    for step, losses in list(zip(steps, zip(*curves, strict=True), strict=False))[1:]:
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            break
        for values, value in zip(found, (step, fmean(known), min(known), max(known)), strict=True):
            values.append(value)
    return found


def _standardised(bands: Mapping[str, Band]) -> dict[str, Band]:
    """Divide steps by the last one, and scale losses so that all but the highest means lie between 0 and 1."""
    means = sorted(loss for one in bands.values() for loss in one.mean)
    if not means:  # all methods diverged
        return dict(bands)
    last = max(step for one in bands.values() for step in one.steps)
    low = means[0]
    span = (means[int(len(means) * SHOWN)] - low) or 1.0
    return {
        name: Band(
            [step / last for step in one.steps], *([(loss - low) / span for loss in losses] for losses in one[1:])
        )
        for name, one in bands.items()
    }


def _panel(axes: Axes, bands: Mapping[str, Band]) -> None:
    for name, one in bands.items():
        line = _line(name)
        axes.plot(one.steps, one.mean, **line)
        axes.fill_between(one.steps, one.low, one.high, color=line["color"], alpha=0.12, linewidth=0)


def _line(method: str) -> dict[str, Any]:
    """Style a method's line so that equal lines stay visible: later ones are thinner, or dashed into others' gaps."""
    base = method.removesuffix("_ours")
    i = list(COLOURS).index(base)
    style = (2 * i, (3, 3)) if method != base else "-"
    width = 1.3 if method != base else (1.5, 2.4, 1.9, 1.3, 0.7)[i]
    return {"color": COLOURS[base], "linestyle": style, "linewidth": width, "label": label(method)}


def _plain_numbers(axes: Axes) -> None:
    """Label a logarithmic y axis with a few plain numbers, whatever its range."""
    low, high = axes.get_ylim()
    few_decades = (1, 2, 5) if high / low < 150 else (1,)
    axes.yaxis.set_major_locator(MaxNLocator(4) if high / low < 4 else LogLocator(subs=few_decades))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def rates_over_time(theory: Mapping[str, Any]) -> Figure:
    """Draw the error and the variance over the steps, one row per problem."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    grid = figure.subplots(len(theory["problems"]), 2, squeeze=False, sharex=True)
    for row, (problem, parts) in zip(grid, theory["problems"].items(), strict=True):
        for axes, (quantity, title) in zip(row, QUANTITIES.items(), strict=True):
            for method in COLOURS:
                for form, curve in parts["methods"][method].items():
                    line = _theory_line(method) | ({"linestyle": ":"} if form == "constant_beta" else {})
                    axes.plot(curve["steps"], curve[quantity], **line)
            _guide(axes, parts["methods"]["full_to"]["theorem"], quantity)
            axes.set(xscale="log", yscale="log")
            axes.minorticks_off()
            axes.set_title(f"{PROBLEMS[problem]}: {title}")
    for axes in grid[-1]:
        axes.set_xlabel("step t")
    lines = [Line2D([], [], **_theory_line(name)) for name in COLOURS]
    lines += [Line2D([], [], color=INK, linestyle=":", label="the same with constant β"), Line2D([], [], **GUIDE)]
    figure.legend(handles=lines, loc="outside upper center", ncols=4)
    return figure


def _theory_line(method: str) -> dict[str, Any]:
    return _line(method) if method != "sgd" else {"color": COLOURS["sgd"], "linewidth": 1.1, "label": "SGD"}


def theory_label(method: str) -> str:
    return str(_theory_line(method)["label"])


def _guide(axes: Axes, curve: Mapping[str, Any], quantity: str) -> None:
    """Draw a line of slope -1 below the curve, over its last two decades."""
    end, value = curve["steps"][-1], curve[quantity][-1] / 4
    axes.plot([end / 100, end], [100 * value, value], **GUIDE)


def bounds(proposition: Mapping[str, Any]) -> Figure:
    """Draw the ratios of A and of b over the factor on alpha, one row per problem."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    grid = figure.subplots(len(proposition), 2, squeeze=False, sharex=True)
    for row, (problem, found) in zip(grid, proposition.items(), strict=True):
        for axes, (ratio, title) in zip(row, RATIOS.items(), strict=True):
            axes.axvspan(min(found["factor"]) / 2, 1, color=GUIDE["color"], alpha=0.15, linewidth=0)
            axes.axhline(1, **BOUND)
            for method, aside in zip(BOUNDED, (0.85, 1, 1.18), strict=True):
                _ratio_line(axes, found["factor"], found[method][ratio], _line(method), aside)
            axes.set(xscale="log", yscale="log", xlim=(min(found["factor"]) / 2, 2 * max(found["factor"])))
            axes.set_ylim(top=2 * FAR)
            axes.minorticks_off()
            axes.set_title(f"{PROBLEMS[problem]}: {title}")
    for axes in grid[-1]:
        axes.set_xlabel("sum of α, over the largest that the proposition allows")
    lines = [Line2D([], [], marker="o", markersize=3.5, **_line(method)) for method in BOUNDED]
    figure.legend(handles=[*lines, Line2D([], [], **BOUND)], loc="outside upper center", ncols=4)
    return figure


def _ratio_line(
    axes: Axes, factors: Sequence[float], ratios: Sequence[float | None], line: Mapping[str, Any], aside: float
) -> None:
    """Draw points, and crosses at the top for those far above the bound, moved a little aside for each method."""
    near = [(factor, ratio) for factor, ratio in zip(factors, ratios, strict=True) if ratio is not None and ratio < FAR]
    axes.plot(*zip(*near, strict=True), marker="o", markersize=3.5, **line)
    far = [factor * aside for factor in factors if factor not in dict(near)]
    axes.plot(far, [FAR] * len(far), "x", color=line["color"], markersize=5)
