"""The HTML page of a run, or of several runs side by side: one self-contained file."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from to_finetune import __version__
from to_finetune.errors import UsageError
from to_finetune.files import write_whole
from to_finetune.pages import template
from to_finetune.report.charts import Chart, Series, curves
from to_finetune.report.maps import Grid, slopes_view, subset_grid
from to_finetune.report.plot import COLOURS, series
from to_finetune.report.run import RunData, read_runs
from to_finetune.runs import what_trains
from to_finetune.units import duration, format_size

# The same hues, light enough for a dark background.
DARK_COLOURS = ("#56ace6", "#f2894b", "#35c49b", "#e59fc7", "#f0bd52", "#a9dcf7")
MEASURED = {
    "allocated": "Measured is what torch gave out, without CUDA's own context.",
    "resident": "Measured is by how much the process grew, libraries and all.",
}


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write the page of one or several runs, the first of which is the baseline.

    Args:
        runs: folders that finetune.py has written.
        path: the HTML file.

    Raises:
        UsageError: without a run, for one that is named twice or cannot be read, and for a path that cannot be written.
    """
    if not runs:
        raise UsageError("There is no run to report on.")
    text = html(read_runs(runs))
    try:
        if path.is_dir():
            raise UsageError(f"output_file={str(path)!r} is a folder: give the name of an .html file.")
        write_whole(path, text)
    except OSError as error:
        raise UsageError(f"output_file={str(path)!r} cannot be written: {error.strerror}.") from None


def html(runs: Sequence[RunData]) -> str:
    """Render the page; the first run is the baseline of the others."""
    labels = _labels(runs)
    views = [_view(run, label, i) for i, (run, label) in enumerate(zip(runs, labels, strict=True))]
    loss, *others = _charts(runs, views)
    return template(Path(__file__).with_name("page.html"), breakable=_breakable).render(
        title=_title(runs),
        runs=views,
        several=len(runs) > 1,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        heads=[metric.title for metric in METRICS],
        results=_results(runs, views),
        differing=_differing(runs),
        subsets=_subsets(runs, views),
        loss=loss,
        charts=[chart for chart in others if chart],
        samples=_samples(runs, views),
        held_out_samples=any(run.held_out_samples for run in runs),
        memory_scale=max((m for run in runs for m in _all_bytes(run)), default=0),
        sample=next((run.slopes.sample for run in runs if run.slopes), None),
        version=__version__,
    )


class Metric(NamedTuple):
    """A column of the results."""

    key: str
    title: str
    form: Callable[[float], str]
    difference: Callable[[float, float], str]  # from a run's value and the baseline's
    best: Callable[[Iterable[float]], float] | None  # None if neither higher nor lower is better


def _minus(own: float, base: float) -> str:
    return f"{own - base:+.4f}".replace("-", "−")


def _count(own: float, base: float) -> str:
    return f"{own - base:+,.0f}".replace("-", "−") if own != base else ""


def _percent(own: float, base: float) -> str:
    return f"{100 * (own / base - 1):+.1f} %".replace("-", "−") if base else ""


METRICS = (
    Metric("eval_loss", "held-out loss", "{:.4f}".format, _minus, min),
    Metric("train_loss_mean", "training loss, mean", "{:.4f}".format, _minus, min),
    Metric("train_loss_first_fifth", "its first fifth", "{:.4f}".format, _minus, min),
    Metric("steps", "steps", "{:,.0f}".format, _count, None),
    Metric("train_seconds", "training time", duration, _percent, min),
    Metric("tokens_per_second", "tokens a second", "{:,.0f}".format, _percent, max),
)


def _title(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        return f"{runs[0].optimizer} on {runs[0].model}"
    return f"{len(runs)} runs side by side"


def _breakable(name: str) -> Markup:
    """Let a narrow column break a name after each dot and underscore."""
    return Markup(str(escape(name)).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _labels(runs: Sequence[RunData]) -> list[str]:
    """Return the folders' names, or as much of their paths as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _view(run: RunData, label: str, index: int) -> dict[str, Any]:
    """Collect what the template shows of a single run."""
    sizes = run.parameters.sizes if run.parameters else {}
    return {
        "label": label,
        "name": f"{run.optimizer} on {run.model}",
        "colour": f"var(--c{index % len(COLOURS)})",
        "dashed": index >= len(COLOURS),
        "status": run.record["status"],
        "sentence": _sentence(run),
        "metrics": [(m.title, _shown(m, run.measured(m.key))) for m in METRICS],
        "facts": _facts(run),
        "command": _command(run),
        "settings": _settings(run),
        "slopes": slopes_view(run.slopes, sizes) if run.slopes else None,
        "relative_alpha": bool(run.options.get("relative_alpha")),
        "no_slopes": _why_no_slopes(run),
        "memory": _memory(run),
        "proofs": _proofs(run.record["proofs"]),
    }


def _shown(metric: Metric, value: float | None) -> str:
    return "–" if value is None else metric.form(value)


def _sentence(run: RunData) -> str:
    """Explain the run's status; empty if there is nothing to explain."""
    status, record = run.record["status"], run.record
    if status == "failed":
        return str(record.get("error", "The run failed."))
    if status == "interrupted":
        return f"Stopped by a signal; {record.get('checkpoint') or 'no checkpoint'} is where it can go on from."
    if status == "running":
        return "The run goes on, or was ended from outside: its record says no more."
    return ""


def _facts(run: RunData) -> list[tuple[str, str]]:
    """Return the lines of the run's header, as far as they are known."""
    config, record = run.config, run.record
    options = ", ".join(f"{key} {value}" for key, value in run.options.items())
    rate = f"learning rate {config['learning_rate']:g}" if isinstance(config.get("learning_rate"), float) else ""
    names = ("processor", "cores", "threads", "gpu", "system")
    machine = {name: record[name] for name in names if record.get(name) is not None}
    for unit in ("cores", "threads"):
        if unit in machine:
            machine[unit] = f"{machine[unit]} {unit if machine[unit] != 1 else unit[:-1]}"
    if processes := record["results"].get("processes"):
        machine["processes"] = f"{processes:g} process{'es' if processes > 1 else ''}"
    facts = {
        "optimizer": ", ".join(filter(None, (run.optimizer, rate, options or config.get("optim_args")))),
        "model": " at ".join(filter(None, (config.get("model_name_or_path"), config.get("model_revision")))),
        "trained": _trained(run),
        "data": _data(config),
        "folder": str(run.folder.resolve()),
        "begun": str(record.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        "machine": ", ".join(map(str, machine.values())),
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return [(name, text) for name, text in facts.items() if text]


def _trained(run: RunData) -> str:
    how = "; ".join(f"{key} {_plain(value)}" for key, value in what_trains(run.config).items())
    if run.parameters is None:
        return how
    sizes, trained = run.parameters.sizes, run.parameters.trained
    weights, total = sum(sizes[name] for name in trained), sum(sizes.values())
    text = f"{weights:,} of {total:,} weights ({100 * weights / total:.3g} %) in {len(trained)} tensors"
    return f"{text}; {how}" if how else text


def _data(config: dict[str, Any]) -> str:
    names = config.get("dataset_name") or []
    parts = [
        " and ".join(map(str, names)) if isinstance(names, list) else str(names),
        str(config.get("dataset_train_split", "")),
        _held_out(config),
    ]
    return ", ".join(filter(None, parts))


def _held_out(config: dict[str, Any]) -> str:
    """Describe what a run was evaluated on, with the precedence that `load_data` has."""
    name, split, size = (config.get(key) for key in ("eval_dataset_name", "dataset_test_split", "val_set_size"))
    if name or split:
        return f"held out: {', '.join(map(str, filter(None, (name, split))))}"
    if not size:
        return ""
    return f"{size:g} rows held out" if size >= 1 else f"{100 * size:g} % held out"


def _command(run: RunData) -> str:
    """Return the command as typed, as far as known, one flag per line; a single process gets the launcher in front."""
    words = shlex.split(run.record["command"])
    alone = run.record["results"].get("processes", 1) == 1 and words[0].endswith("finetune.py")
    lines = [["accelerate", "launch"] if alone else []]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(map(shlex.join, lines))


def _settings(run: RunData) -> dict[str, str]:
    """Flatten config.yaml to one text per setting."""
    flat = {}
    for key, value in run.config.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": _plain(one) for name, one in value.items()})
        else:
            flat[key] = _plain(value)
    return flat


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differing(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Return the settings in which the runs differ, except their folder."""
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = {
        key: [one.get(key, "–" if key.startswith("optim_args.") else "default") for one in settings]
        for key in keys
        if key != "output_dir"
    }
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


class Cell(NamedTuple):
    text: str
    difference: str
    best: bool


def _results(runs: Sequence[RunData], views: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Cell]]]:
    """Return one row per run and one cell per metric; the best values of the finished runs are marked."""
    table: list[list[Cell]] = [[] for _ in runs]
    for metric in METRICS:
        values = [run.measured(metric.key) for run in runs]
        ended = [v for v, run in zip(values, runs, strict=True) if v is not None and run.record["status"] == "done"]
        best = metric.best(ended) if metric.best and len(set(ended)) > 1 else None
        for i, (cells, value) in enumerate(zip(table, values, strict=True)):
            base = values[0] if i else None
            difference = metric.difference(value, base) if value is not None and base is not None else ""
            wins = value is not None and value == best and runs[i].record["status"] == "done"
            cells.append(Cell(_shown(metric, value), difference, wins))
    return list(zip(views, table, strict=True))


def _charts(runs: Sequence[RunData], views: Sequence[dict[str, Any]]) -> list[Chart | None]:
    """Chart the losses, then the other logged quantities."""

    def of(key: str, what: str = "", dots: bool = False, colour: str | None = None) -> list[Series]:
        return [
            Series(f"{view['label']}{what}", colour or view["colour"], *series(run.history, key), dots, view["dashed"])
            for run, view in zip(runs, views, strict=True)
        ]

    held_out = of("eval_loss", ", held out", dots=True, colour="var(--c1)" if len(runs) == 1 else None)
    return [
        curves("Loss", "nats a token", [*of("loss", ", training"), *held_out], labels=(6, 6)),
        curves("Estimation error", "‖G − g‖ / ‖g‖", of("estimate_error"), from_zero=True),
        curves("Gradient norm", "‖g‖", of("grad_norm"), log=True),
        curves("Learning rate", "", of("learning_rate"), from_zero=True),
        curves("Throughput", "tokens a second", of("tokens_per_second"), from_zero=True),
    ]


def _subsets(runs: Sequence[RunData], views: Sequence[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], Grid]]:
    """Return the distinct maps of what trains, each with the runs that share it."""
    found: list[tuple[list[dict[str, Any]], Grid]] = []
    for run, view in zip(runs, views, strict=True):
        if run.parameters is None:
            continue
        grid = subset_grid(run.parameters.sizes, run.parameters.trained)
        same = next((those for those, other in found if other == grid), None)
        if same is None:
            found.append(([view], grid))
        else:
            same.append(view)
    return found


def _why_no_slopes(run: RunData) -> str:
    """Explain why a run shows no slopes; empty for optimizers that learn none."""
    optim = run.config.get("optim")
    if run.slopes or optim not in ("diagonal_to", "rank_one_to", "full_to"):
        return ""
    if run.options.get("alpha") == 0:
        return "alpha is 0: the slope stays zero, and the optimizer is momentum."
    if optim == "full_to":
        return "Full TO's slope is a matrix for each tensor, of which no summary is taken."
    return "No slopes were recorded: the run has no slopes.json."


def _all_bytes(run: RunData) -> list[int]:
    memory = run.record["memory"]
    return [sum(memory["planned"].values()), memory["measured"]]


def _memory(run: RunData) -> dict[str, Any] | None:
    """Return the planned parts and the measured memory, in bytes and in words; None without either."""
    memory = run.record["memory"]
    planned, measured = memory["planned"], memory["measured"]
    parts = [(name, count) for name, count in planned.items() if count > 0]
    if not parts and not measured:
        return None
    of_what = MEASURED.get(str(memory.get("kind")), "") if measured else ""
    return {
        "parts": [(name.replace("_", " "), count, format_size(count)) for name, count in parts],
        "planned": sum(planned.values()),
        "planned_text": format_size(sum(planned.values())),
        "measured": measured,
        "measured_text": format_size(measured),
        "notes": [note for note in (memory.get("not_planned"), of_what) if note],
    }


def _proofs(proofs: dict[str, Any]) -> list[tuple[bool, str]]:
    """Put each proof into words, with whether it is as it should be."""
    words: dict[str, Callable[[Any], str]] = {
        "live_optimizer": "The live optimizer is {}, the one that was asked for.".format,
        "trained_tensors": "It holds exactly the {:,} tensors that were to train.".format,
        "sharded_tensors": "{:,} of them lie in pieces on several processes, and each piece is known.".format,
        "moved_after_first_step": "{:,} tensors moved in the first step.".format,
        "frozen_tensors_unmoved": "No bit of the {:,} frozen tensors changed.".format,
        "never_moved": lambda names: (
            f"{len(names)} of the trained tensors never moved: {shorten(', '.join(names), 300)}."
            if names
            else "Every trained tensor has moved."
        ),
        "saved_bytes_read_back": "The {:,} bytes that were saved read back bit for bit.".format,
    }
    shown = []
    for name, value in proofs.items():
        if name == "frozen_tensors_unmoved" and value == 0:
            continue
        text = words[name](value) if name in words else f"{name.replace('_', ' ')}: {value}"
        shown.append((not (name == "never_moved" and value), text))
    return shown


def _samples(runs: Sequence[RunData], views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each prompt with the base's answer and each run's."""
    prompts: dict[str, dict[str, Any]] = {}
    for run, view in zip(runs, views, strict=True):
        for sample in run.samples:
            shown = prompts.setdefault(
                sample.prompt,
                {"prompt": sample.prompt, "reference": sample.reference, "before": sample.before, "after": []},
            )
            if sample.after is not None:
                shown["after"].append((view, sample.after))
    return list(prompts.values())
