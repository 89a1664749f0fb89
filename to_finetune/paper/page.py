"""The page of a folder of results: a self-contained `index.html`, beside the tables and the figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from to_finetune import runs
from to_finetune.errors import UsageError
from to_finetune.files import write_whole
from to_finetune.pages import template
from to_finetune.paper import figures, tables
from to_finetune.paper.tables import COMPARED, DATASETS, ROWS
from to_finetune.paper.tuning import CRITERIA

Result = dict[str, Any]


def render(folder: Path) -> list[Path]:
    """Write the tables, figures and page of the results in the folder; return their paths.

    Raises:
        UsageError: for a damaged result, and if there is none.
    """
    results = {name: result for name in ROWS if (result := read(folder / f"{name}.json", checked))}
    theory = read(folder / "theory.json", checked_theory)
    if not results and not theory:
        raise UsageError(f"{folder} has no results to draw.")
    drawn = figures.draw(results, theory)
    written = tables.write(results, folder)
    written += figures.write({name: one.figure for name, one in drawn.items()}, folder)
    pictures = [(inline(folder / f"{name}.svg"), one.title, one.caption) for name, one in drawn.items()]
    page = folder / "index.html"
    write_whole(page, html(results, theory, pictures))
    return [*written, page]


def read(path: Path, check: Callable[[Any], Result]) -> Result | None:
    """Read a result through `check`; return None if there is none.

    Raises:
        UsageError: for a damaged one.
    """
    try:
        return runs.read(path, check)
    except UsageError as error:
        raise UsageError(f"{error} Delete it and reproduce {path.stem} again.") from None


def checked(result: Any) -> Result:
    """Return a case's result, with Momentum after Adam, if it has all that the tables and figures need."""
    methods = {name: result["methods"][name] for name in ("adam", "momentum", *result["methods"])}
    for name, found in methods.items():
        if name not in ("adam", *COMPARED):
            raise ValueError(f"the method {name} is not known")
        lengths = {len(curve) for criterion in CRITERIA for curve in found["curves"][criterion]}
        if lengths - {len(result["steps"])}:
            raise ValueError(f"{name} has curves of {lengths} losses for {len(result['steps'])} steps")
        counts = [found[key] for key in ("trials", "diverged", "widened")]
        if not all(isinstance(count, int) for count in counts) or set(found["winners"]) != set(CRITERIA):
            raise ValueError(f"{name} has no numbers of trials, or no winners")
    return {**described(result), "methods": methods}


def described(result: Any) -> Result:
    """Return the result if it says how and on which machine it was made."""
    if not isinstance(result["flags"] + result["protocol"]["name"] + result["machine"]["processor"], str):
        raise TypeError("it does not say how it was made")
    return {**result, "seconds": float(result["seconds"])}


def checked_theory(theory: Any) -> Result:
    """Return the theory's result if it has all that the figures and the page need."""
    slopes(theory)
    for problem in theory["problems"]:
        found = theory["proposition_2"][problem]
        if any(len(found[method]["slope_ratio"]) != len(found["factor"]) for method in figures.BOUNDED):
            raise ValueError("Proposition 2 has ratios of other factors")
    return described(theory)


def inline(path: Path) -> Markup:
    """Return an SVG to inline in a page, with the page's colours and width, and with unique ids."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', f' role="img" aria-label="{path.stem}"', svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{path.stem}-", svg)
    return Markup(svg.replace(figures.INK, "currentColor").replace(figures.BACKGROUND, "none"))


def html(
    results: Mapping[str, Result],
    theory: Result | None,
    pictures: Sequence[tuple[Markup, str, str]],
) -> str:
    everything = [*results.values(), *([theory] if theory else [])]
    return template(Path(__file__).with_name("page.html")).render(
        trial=any(result["protocol"]["name"] == "quick" for result in everything),
        finished=len(results),
        planned=len(ROWS),
        readings=glance(results),
        tables=[[tables.make(results, name, criterion) for criterion in CRITERIA] for name in tables.TABLES],
        pictures=pictures,
        theory=theory,
        slopes=slopes(theory) if theory else [],
        rate_heads=tables.RATE_HEADS,
        rates=list(tables.rates(results)),
        rates_note=tables.RATES_NOTE,
        datasets=datasets(results.values()),
        protocols=protocols(results),
        machines=machines(everything),
        commands=commands(results, theory),
    )


def glance(results: Mapping[str, Result]) -> dict[str, dict[str, list[tables.Reading]]]:
    """Group the readings by the reference's and the method's label, one for each criterion."""
    found: dict[str, dict[str, list[tables.Reading]]] = {}
    for one in tables.reading(results):
        found.setdefault(tables.label(one.against), {}).setdefault(tables.label(one.method), []).append(one)
    return found


def slopes(theory: Result) -> list[list[str]]:
    """Return a row per problem, projection and method: the slopes of error and variance, the theorem's form first."""
    rows = []
    for problem, parts in theory["problems"].items():
        for part in ("methods", "projected"):
            for method in figures.COLOURS:
                forms = parts[part][method]
                count = forms["theorem"].get("projections_per_run")
                cells = [
                    _with_error(forms[form], quantity) if form in forms else "–"
                    for form in ("theorem", "constant_beta")
                    for quantity in figures.QUANTITIES
                ]
                name = figures.theory_label(method)
                rows.append([figures.PROBLEMS[problem], name, "no" if count is None else f"{count:.1f}", *cells])
    return rows


def _with_error(curve: Mapping[str, Any], quantity: str) -> str:
    slope, error = curve[f"{quantity}_slope"], curve[f"{quantity}_slope_se"]
    return f"{slope:.3f} ± {error:.3f}".replace("-", "−")


def datasets(results: Iterable[Result]) -> list[list[str]]:
    """List the data sets of the convex cases and small networks: name, rows, inputs, classes, how they were made."""
    found = {result["case"]["dataset"]: result["data"] for result in results if "data" in result}
    sizes = ("rows", "features", "classes")
    return [[DATASETS[name], *(f"{data[size]:,}" for size in sizes), data["note"]] for name, data in found.items()]


def commands(results: Mapping[str, Result], theory: Result | None) -> list[str]:
    """Return the commands that made the results, one for each set of flags."""
    names: dict[str, list[str]] = {}
    for name, result in {**results, **({"theory": theory} if theory else {})}.items():
        names.setdefault(result["flags"], []).append(name)
    return [f"to-finetune reproduce {' '.join(of_flags)}{flags}" for flags, of_flags in names.items()]


def protocols(results: Mapping[str, Result]) -> list[tuple[str, str]]:
    """Describe each protocol in words, with the groups of the cases that share it."""
    cases: dict[str, list[str]] = {}
    for name, result in results.items():
        parts = {key: value for key, value in result["protocol"].items() if key not in ("methods", "options")}
        text = "; ".join(f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in parts.items())
        cases.setdefault(text, []).append(ROWS[name][0])
    return [(", ".join(dict.fromkeys(groups)), text) for text, groups in cases.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def machines(results: Iterable[Result]) -> list[tuple[str, int, float]]:
    """Describe each machine in words, with the number of its results and the hours that they took."""
    found: dict[str, list[float]] = {}
    for result in results:
        found.setdefault(_in_words(result["machine"]), []).append(result["seconds"])
    return [(words, len(seconds), sum(seconds) / 3600) for words, seconds in found.items()]


def _in_words(machine: Mapping[str, Any]) -> str:
    processor = f"{machine['processor']}, cores: {machine['cores']}, threads: {machine['threads']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "; ".join(filter(None, (processor, machine["gpu"], machine["system"], versions)))
