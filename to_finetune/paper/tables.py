"""The tables as Markdown, LaTeX and JSON, with a row for every experiment, whether it has a result or not.

A result is what `contest.run`, `resnet.run` and `llm.run` return.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from to_finetune.files import write_whole
from to_finetune.paper.cases import CONVEX, FFN, STRONGLY_CONVEX
from to_finetune.paper.methods import METHODS
from to_finetune.paper.statistics import Comparison, compare, scores
from to_finetune.paper.tuning import CRITERIA

Results = Mapping[str, Mapping[str, Any]]  # by the case's name
DATASETS = {"smallnorb": "SmallNORB", "covtype": "CovType", "kdd": "KDD", "news20": "News20", "mnist": "MNIST"}
GROUPS = {  # rows by name, with their labels
    "strongly convex": {case.name: f"{DATASETS[case.dataset]}, λ = {case.l2:.3f}" for case in STRONGLY_CONVEX},
    "convex": {case.name: DATASETS[case.dataset] for case in CONVEX},
    "FFN": {case.name: f"{DATASETS[case.dataset]}, {case.hidden[0]} hidden units" for case in FFN},
    "ResNet": {"resnet18": "ResNet-18, CIFAR-10", "resnet50": "ResNet-50, CIFAR-10"},
    "LLM": {"llm": "Llama's selected subset, Alpaca"},
}
ROWS = {name: (group, label) for group, rows in GROUPS.items() for name, label in rows.items()}
TABLES = {"table2": ("strongly convex",), "table3": ("convex", "FFN", "ResNet"), "table6": ("LLM",)}
LOSSES = {
    "minimum": "the lowest training loss recorded after the start",
    "area": "the mean of the training losses recorded after the start, that is the area under the curve",
}
PAPERS = [name for name, method in METHODS.items() if not method.ours and name != "adam"]
COMPARED = [*PAPERS, *(f"{name}_ours" for name in PAPERS)]  # momentum_ours is only in the LLM's row
NOTE = (
    "Table numbers are ours: the paper's tables reached us without them. R = 100 (1 − L / L of Adam) in percent, above "
    "0 where the method is better than Adam; L is {loss}. Mean ± standard deviation over the seeds, paired: a seed "
    "gives all methods the same initial weights and batches. * p < 0.05, ** p < 0.01, *** p < 0.001 by the two-sided "
    "Wald test with Student's t, not corrected for the number of tests; none where |R| < 0.001. Bold: the best of a "
    "row, if above 0. † ours: {ours}; all others take the paper's exact update, as we derived it."
)
OURS = "with our guard (γ ≤ 1) and relative α"
REASONS = {
    "no data": "no data: SmallNORB was not at hand; with upstream's files in --data_dir it runs.",
    "not run": "not run: there is no result of this case yet.",
    "left out": "left out: the slope of Full TO, n × n, is too large for this n.",
}


class Cell(NamedTuple):
    text: str
    marks: str = ""
    best: bool = False
    verdict: str = ""


class Table(NamedTuple):
    """One criterion's cells, (heads - 1) in each row, by group and row label."""

    name: str
    title: str
    note: str
    heads: list[str]
    groups: dict[str, dict[str, list[Cell]]]


def label(method: str) -> str:
    """Return a method's label, such as Adam or Full TO; Full TO† if it is ours."""
    return METHODS[method.removesuffix("_ours")].label + "†" * method.endswith("_ours")


def write(results: Results, folder: Path) -> list[Path]:
    """Write every table into the folder; return the paths."""
    texts = {"rates.md": rates_markdown(results), "tables.json": json.dumps(everything(results), indent=1) + "\n"}
    for name in TABLES:
        tables = [make(results, name, criterion) for criterion in CRITERIA]
        texts[f"{name}.md"] = "\n".join(map(markdown, tables))
        texts[f"{name}.tex"] = "% needs \\usepackage{booktabs}\n" + "\n".join(map(latex, tables))
    for file, text in texts.items():
        write_whole(folder / file, text)
    return [folder / file for file in texts]


def make(results: Results, name: str, criterion: str) -> Table:
    """Build the table of this name, by this criterion."""
    columns = [method for method in COMPARED if method in METHODS or name == "table6"]
    groups = {
        group: {
            title + smaller(results.get(row)): cells(results.get(row), row, criterion, columns)
            for row, title in GROUPS[group].items()
        }
        for group in TABLES[name]
    }
    shown = {cell.text for rows in groups.values() for row in rows.values() for cell in row}
    reasons = [reason for text, reason in REASONS.items() if text in shown]
    ours = OURS + ", on gradients scaled to a root mean square of 1" * (name == "table6")
    title = f"Table {name.removeprefix('table')}, by {criterion}: {', '.join(TABLES[name])}"
    note = " ".join([NOTE.format(loss=LOSSES[criterion], ours=ours), *reasons])
    return Table(f"{name}-{criterion}", title, note, ["", "Adam's loss", *map(label, columns)], groups)


def smaller(result: Mapping[str, Any] | None) -> str:
    """Return the suffix to the label of a case that was run in a reduced protocol."""
    return ", reduced" if result and result["protocol"]["name"] == "reduced" else ""


def cells(result: Mapping[str, Any] | None, row: str, criterion: str, columns: Sequence[str]) -> list[Cell]:
    """Return a row: Adam's mean loss, then R of the methods in the columns."""
    if result is None:
        return [Cell(missing(row))] * (1 + len(columns))
    losses = by_seed(result, criterion)
    found = {name: compare(losses[name], losses["adam"]) for name in columns if name in losses}
    best = max((one.mean for one in found.values() if one.mean is not None), default=0.0)
    adam = [loss for loss in losses["adam"] if loss is not None]
    first = f"{fmean(adam):#.4g}".rstrip(".") if len(adam) == len(losses["adam"]) > 0 else "diverged"
    return [Cell(first), *(r_cell(found.get(name), best) for name in columns)]


def missing(row: str) -> str:
    return "no data" if row.startswith("smallnorb") else "not run"


def r_cell(found: Comparison | None, best: float) -> Cell:
    if found is None:
        return Cell("left out")
    if found.mean is None:
        of_seeds = f"diverged {found.diverged} of {found.seeds}" if found.diverged else "Adam diverged"
        return Cell(of_seeds if found.seeds else "all trials diverged")
    text = " ± ".join(numbers([found.mean] if found.sd is None else [found.mean, found.sd]))
    return Cell(text, found.marks, found.mean == best > 0, found.verdict)


def numbers(values: Sequence[float]) -> list[str]:
    """Format percentages with as many decimals as give the largest three digits, but four at most."""
    size = max(map(abs, values))
    decimals = min(max(2 - floor(log10(size)), 0), 4) if size else 0
    texts = (f"{value:.1e}" if size >= 1e6 else f"{value:.{decimals}f}" for value in values)
    return [text.replace("e+0", "e").replace("-", "−") for text in texts]


def by_seed(result: Mapping[str, Any], criterion: str) -> dict[str, list[float | None]]:
    """Return each method's losses over the seeds, by the criterion that its rates were chosen for."""
    return {name: scores(found["curves"][criterion], criterion) for name, found in result["methods"].items()}


class Reading(NamedTuple):
    """The number of cases in which a method is significantly better than `against`, and so on.

    without_slope: the tuning chose alpha = 0. Such a case is momentum, tuned over fewer values of beta and lr than
    Momentum itself, and says nothing about the slope, so it is counted only here.
    """

    method: str
    criterion: str
    against: str
    cases: int
    better: int
    no_difference: int
    worse: int
    no_loss: int
    without_slope: int | None


def reading(results: Results) -> list[Reading]:
    """Count the verdicts for each method, criterion and reference over all finished cases that have the method."""
    return [
        _count(finished, method, criterion, against)
        for criterion in CRITERIA
        for against in ("adam", "momentum")
        for method in COMPARED
        if method != against and (finished := [one for one in results.values() if method in one["methods"]])
    ]


def _count(results: Sequence[Mapping[str, Any]], method: str, criterion: str, against: str) -> Reading:
    verdicts: Counter[str] = Counter()
    for result in results:
        losses = by_seed(result, criterion)
        winner = result["methods"][method]["winners"][criterion] or {}
        no_slope = "momentum" not in method and winner.get("alpha") == 0
        compared = compare(losses[method], losses[reference(losses, method, against)])
        verdicts["without slope" if no_slope else compared.verdict] += 1
    return Reading(
        method,
        criterion,
        against,
        cases=len(results),
        better=verdicts["better"],
        no_difference=verdicts["no difference"],
        worse=verdicts["worse"],
        no_loss=verdicts["no loss"],
        without_slope=None if "momentum" in method else verdicts["without slope"],
    )


def reference(methods: Collection[str], method: str, against: str) -> str:
    """Return what a method is compared with: `against`, or for ours its "_ours" variant if there is one."""
    same = f"{against}_ours"
    return same if method.endswith("_ours") and method != same and same in methods else against


RATE_HEADS = ("case", "method", "chosen by", "lr", "alpha", "beta", "schedule", "trials", "diverged", "widened")
RATES_NOTE = (
    "The rates that won on the tuning seed. trials: of which the best was taken, equally many for each method of a "
    "case before lr's grid was widened; where the protocol has `screened`, only the most promising were trained to the "
    "end. widened: the values of lr tried beyond the grid, since the best stood at its end; (end): it still does. "
    "diverged: how many trials did. For Adam, beta is beta1, beta2. alpha = 0 is momentum: no slope is learned. † ours."
)


def rates(results: Results) -> Iterator[tuple[str, ...]]:
    """Yield the cells of `RATE_HEADS` for each case, method and criterion; one row if both criteria chose the same."""
    for row, (group, title) in ROWS.items():
        for method, found in results.get(row, {"methods": {}})["methods"].items():
            winners = found["winners"]
            agree = winners["minimum"] == winners["area"]
            for criterion, winner in {"both": winners["minimum"]}.items() if agree else winners.items():
                counts = (str(found[name]) for name in ("trials", "diverged", "widened"))
                yield f"{title} ({group})", label(method), criterion, *_rates(winner or {}, found["lrs"]), *counts


def _rates(winner: Mapping[str, Any], lrs: Sequence[float]) -> Iterator[str]:
    """Yield lr, alpha, beta (both of Adam's) and schedule, a dash for those that the method does not have."""
    if winner.get("lr") in (min(lrs), max(lrs)):
        winner = {**winner, "lr": f"{winner['lr']:.4g} (end)"}
    for names in (("lr",), ("alpha",), ("beta", "beta1", "beta2"), ("schedule",)):
        values = [winner[name] for name in names if name in winner]
        yield ", ".join(value if isinstance(value, str) else f"{value:.4g}" for value in values) or "–"


def rates_markdown(results: Results) -> str:
    rows = map(_markdown_row, rates(results))
    return "\n".join([RATES_NOTE, "", _markdown_row(RATE_HEADS), "|---" * len(RATE_HEADS) + "|", *rows, ""])


def everything(results: Results) -> dict[str, Any]:
    """Return all numbers of the tables, for programs; R is in percent."""
    rows = {
        row: {"group": group, "label": title, "criteria": {name: _numbers(results[row], name) for name in CRITERIA}}
        if row in results
        else {"group": group, "label": title, "missing": missing(row)}
        for row, (group, title) in ROWS.items()
    }
    counts = [one._asdict() for one in reading(results)]
    return {
        "rows": rows,
        "reading": counts,
        "rates": [dict(zip(RATE_HEADS, one, strict=True)) for one in rates(results)],
    }


def _numbers(result: Mapping[str, Any], criterion: str) -> dict[str, Any]:
    losses = by_seed(result, criterion)
    numbers: dict[str, Any] = {name: {"losses": own} for name, own in losses.items()}
    for name, own in losses.items():
        others = {reference(losses, name, against) for against in ("adam", "momentum")} - {name}
        numbers[name] |= {f"against_{other}": compare(own, losses[other])._asdict() for other in sorted(others)}
    return numbers


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**", "", _markdown_row(table.heads), "|---" + "|---:" * (len(table.heads) - 1) + "|"]
    for group, rows in table.groups.items():
        lines.append(f"| *{_markdown(group)}* |" + " |" * (len(table.heads) - 1))
        lines += [_markdown_row([title, *found]) for title, found in rows.items()]
    return "\n".join([*lines, "", _markdown(table.note), ""])


def _markdown_row(row: Sequence[str | Cell]) -> str:
    texts = [
        _markdown(one)
        if isinstance(one, str)
        else "**" * one.best + _markdown(one.text) + "**" * one.best + _markdown(one.marks)
        for one in row
    ]
    return f"| {' | '.join(texts)} |"


def _markdown(text: str) -> str:
    return text.replace("*", "\\*").replace("|", "\\|").replace("_", "\\_")


LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"α": r"$\alpha$", "γ": r"$\gamma$", "λ": r"$\lambda$", "≤": r"$\le$", "×": r"$\times$"},
        **{"−": "$-$", "±": r"$\pm$", "†": r"$^\dagger$", "–": "--", "<": "$<$", ">": "$>$"},
    }
)


def latex(table: Table) -> str:
    columns = len(table.heads)
    lines = [r"\begin{table*}", r"\centering\scriptsize\setlength{\tabcolsep}{3pt}"]
    lines += [
        rf"\caption{{{f'{table.title}. {table.note}'.translate(LATEX)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
        r"\toprule",
    ]
    lines += [_latex_row(table.heads)]
    for group, rows in table.groups.items():
        lines += [r"\midrule", rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{group.translate(LATEX)}}}}} \\"]
        lines += [_latex_row([title, *found]) for title, found in rows.items()]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def _latex_row(row: Sequence[str | Cell]) -> str:
    texts = []
    for one in row:
        text = (one if isinstance(one, str) else one.text).translate(LATEX)
        if isinstance(one, Cell):
            text = (rf"\textbf{{{text}}}" if one.best else text) + (f"$^{{{one.marks}}}$" if one.marks else "")
        texts.append(text)
    return " & ".join(texts) + r" \\"
