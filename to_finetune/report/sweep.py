"""The results of a sweep: as a table, in sentences, and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table
from rich.text import Text

from to_finetune.report.plot import COLOURS, new_axes
from to_finetune.training.search import range_ends
from to_finetune.training.sweep import Sweep, Trial

LOSSES = {"eval_loss": "held-out loss", "train_loss_mean": "mean training loss"}
LOOKS: Mapping[str, dict[str, Any]] = {
    "trial": {"marker": "o", "color": COLOURS[0]},
    "off the scale": {"marker": "^", "color": COLOURS[0]},
    "no loss": {"marker": "x", "color": COLOURS[1]},
}


def words_of(values: Mapping[str, Any]) -> str:
    """Format values like ``learning_rate=0.00432  alpha=0.3``."""
    return "  ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def sweep_table(sweep: Sweep) -> Table:
    """Tabulate the trials, best first."""
    table = Table(title="Trials, the best first", title_justify="left", title_style="bold", header_style="bold")
    for name in ("", *sweep.search, LOSSES[sweep.objective], "first fifth", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("run")
    for trial in sweep.ranking:
        is_best = trial is sweep.best
        table.add_row(
            "★" if is_best else "",
            *(_short(trial.values[key]) for key in sweep.search),
            trial.status if trial.loss is None else f"{trial.loss:.4f}",
            *("" if number is None else f"{number:.{digits}f}" for number, digits in _numbers(trial)),
            trial.folder,
            style="bold green" if is_best else "red" if trial.loss is None else "",
        )
    return table


def _numbers(trial: Trial) -> tuple[tuple[float | None, int], ...]:
    return (trial.first_fifth, 4), (trial.seconds, 0)


def findings(sweep: Sweep) -> list[Text]:
    """Say what else the trials show: how much the rate matters, where to search next, how certain the result is."""
    best = sweep.best
    if best is None:
        return [Text("No trial has a loss.", style="bold red")]
    found = []
    if sweep.objective != "eval_loss":
        found.append(
            _warning("Judged by the training loss: give --val_set_size or --eval_dataset_name to hold data out.")
        )
    third, triple = sweep.loss_at(1 / 3), sweep.loss_at(3)
    if list(sweep.search) == ["learning_rate"] and len(sweep.trials) > 1:
        found.append(
            Text.assemble(
                ("Sensitivity: ", "bold"),
                f"{best.loss:.4f} at the best rate, {_or_unknown(third)} at a third of it, {_or_unknown(triple)} at "
                "three times it (interpolated between trials, not measured).",
            )
        )
    elif "learning_rate" in sweep.search and len(sweep.search) > 1:
        found.append(
            Text.assemble(
                ("Sensitivity: ", "bold"),
                "not known, the trials differ in more than the rate; sweep it alone at the best of the others.",
            )
        )
    for key, text in sweep.edges().items():
        value = _short(best.values[key])
        beyond = f"search {key}={text} next" if text else "finetune.py takes nothing as far beyond it"
        found.append(_warning(f"The best {key}, {value}, is at an end of its range: {beyond}."))
    mean, deviation = sweep.judgement()
    if mean is not None:
        spread = "" if deviation is None else f" ± {deviation:.4f}"
        seeds = ", ".join(str(trial.values["seed"]) for trial in sweep.judged)
        found.append(
            Text.assemble(("Judged: ", "bold"), f"{LOSSES[sweep.objective]} {mean:.4f}{spread} over the seeds {seeds}.")
        )
    failed = [trial.folder for trial in (*sweep.trials, *sweep.judged) if trial.status == "failed"]
    if failed:
        found.append(_warning(f"Failed: {', '.join(failed)}, see log.txt there. The same command tries them again."))
    return found


def _warning(sentence: str) -> Text:
    return Text.assemble(("Note: ", "bold yellow"), sentence)


def _or_unknown(loss: float | None) -> str:
    if loss is None:
        return "unknown (not tried)"
    return "diverges" if loss == math.inf else f"{loss:.4f}"


def plot_sweep(sweep: Sweep, path: str | os.PathLike[str]) -> None:
    """Draw the objective against the learning rate, or against the first searched setting if the rate was not.

    The next searched range, if any, sets the colour. A loss far above most is drawn at the upper edge.

    Args:
        sweep: with at least one trial.
        path: the file to write, in the format of its suffix: .png, .svg or .pdf.
    """
    key = "learning_rate" if "learning_rate" in sweep.search else next(iter(sweep.search))
    figure, axes = new_axes(4.4)
    _set_scale(axes, sweep, key)
    best = sweep.best
    top = _top([trial.loss for trial in sweep.trials if trial.loss is not None])
    shown = [(_x(t, key), t.loss) for t in sweep.trials if t.loss is not None and t.loss <= top]
    if len(sweep.search) == 1 and shown:
        axes.plot(*zip(*sorted(shown), strict=True), color=COLOURS[0], linewidth=1.2, alpha=0.6)
    if best is not None and key == "learning_rate":
        rate = best.values[key]
        around = "1/3 to 3 times the best rate"
        axes.axvspan(rate / 3, rate * 3, color=COLOURS[4], alpha=0.12, linewidth=0, label=around)
    _draw_trials(axes, sweep, key, top)
    if best is not None and best.loss is not None:
        label = f"best: {words_of(best.values).replace('  ', ', ')}"
        axes.scatter([_x(best, key)], [best.loss], marker="*", s=190, color=COLOURS[4], zorder=4, label=label)
    axes.set(xlabel=key.replace("_", " "), ylabel=f"{LOSSES[sweep.objective]} (nats a token)")
    count = f"{len(sweep.trials)} of {sweep.planned} trials"
    axes.set_title(count if best is None else f"{count}, the best {best.loss:.4f}", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_trials(axes: Axes, sweep: Sweep, key: str, top: float) -> None:
    other = next((k for k in sweep.search if k != key and range_ends(sweep.search[k])), None)
    colours: dict[str, Any] = {"cmap": "viridis", "norm": LogNorm(*_ends(sweep.search[other]))} if other else {}
    for look, is_it in (
        ("trial", lambda t: t.loss is not None and t.loss <= top),
        ("off the scale", lambda t: t.loss is not None and t.loss > top),
        ("no loss", lambda t: t.loss is None),
    ):
        trials = [trial for trial in sweep.trials if is_it(trial)]
        if not trials:
            continue
        heights = [trial.loss if look == "trial" and trial.loss is not None else 1.0 for trial in trials]
        hue = {"c": [t.values[other] for t in trials], **colours} if other else {"color": LOOKS[look]["color"]}
        drawn = axes.scatter(
            [_x(trial, key) for trial in trials],
            heights,
            transform=axes.transData if look == "trial" else axes.get_xaxis_transform(),
            clip_on=False,
            zorder=3,
            label=look,
            marker=LOOKS[look]["marker"],
            s=38,
            **hue,
        )
        if other and look == "trial":
            axes.figure.colorbar(drawn, ax=axes, label=other.replace("_", " "), format=_plain)


def _top(losses: list[float]) -> float:
    """Return the highest loss to draw to scale; one far above most would flatten the others."""
    if not losses:
        return math.inf
    ordered = sorted(losses)
    return max(ordered[len(ordered) // 2], ordered[0] + 6 * (ordered[len(ordered) // 2] - ordered[0]))


def _x(trial: Trial, key: str) -> Any:
    value = trial.values[key]
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _set_scale(axes: Axes, sweep: Sweep, key: str) -> None:
    """Give a range a logarithmic axis that covers it with a small margin, with plainly written numbers."""
    if range_ends(sweep.search[key]) is None:
        return
    low, high = _ends(sweep.search[key])
    values = [trial.values[key] for trial in sweep.trials]
    low, high = min([low, *values]), max([high, *values])
    margin = (high / low) ** 0.03
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low > 20 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _ends(text: str) -> tuple[float, float]:
    ends = range_ends(text)
    assert ends is not None
    return ends


def _plain(value: float, position: float | None = None) -> str:
    return f"{value:g}"
