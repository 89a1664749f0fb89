"""Tables, figures and the page of a folder of results."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from to_finetune.errors import UsageError
from to_finetune.paper import figures, page, tables, theory
from to_finetune.paper.cases import CONVEX, FFN, STRONGLY_CONVEX
from to_finetune.paper.contest import CRITERIA
from to_finetune.paper.methods import METHODS
from to_finetune.paper.tables import Cell, Table

RESULTS = ("kdd-convex", "resnet18", "llm")  # of the folder
STEPS = [0, 10, 20]
SEEDS = (1.0, 1.1, 1.3)  # what a seed multiplies all losses with


def curves(end: float, *spread: float) -> list[list[float | None]]:
    """From 9 over twice the end to the end, a curve a seed; `spread` is added to the seeds' ends in turn."""
    added = spread or (0.0, 0.0, 0.0)
    return [[9.0, 2 * end * seed, end * seed + more] for seed, more in zip(SEEDS, added, strict=True)]


def method(ends: dict[str, Any], **rates: Any) -> dict[str, Any]:
    winner = {"lr": 0.1, "schedule": "constant", **rates}
    return {
        **{"trials": 192, "diverged": 3, "lrs": [0.01, 0.1, 0.3, 1.0], "widened": 2},
        **{"winners": {"minimum": winner, "area": winner}, "curves": ends},
    }


def both(found: list[list[float | None]]) -> dict[str, Any]:
    return {"minimum": found, "area": found}


def make_result() -> dict[str, Any]:
    """Against Adam: Momentum is equal, Full better, Diagonal (2 of 3) and RankOne diverged, ours worse or not sure."""
    methods = {
        "adam": method(both(curves(1.0)), beta1=0.9, beta2=0.999),
        "momentum": method(both(curves(1.0)), beta=0.3),
        "full_to": method(both(curves(0.9, 0.001, 0.0, 0.0)), alpha=0.01, beta=0.3),
        "diagonal_to": method(both(curves(1.0)), alpha=0.0, beta=0.5),
        "rank_one_to": method(both([]), alpha=0.0, beta=0.5),
        "full_to_ours": method(both(curves(1.2, 0.001, 0.002, 0.0)), alpha=0.0, beta=0.5),
        "diagonal_to_ours": method(both(curves(0.9, 0.3, -0.4, 0.2)), alpha=0.1, beta=0.5),
        "rank_one_to_ours": method(both(curves(0.8)), alpha=0.1, beta=0.5),
    }
    methods["diagonal_to"]["curves"]["minimum"][1][2] = methods["diagonal_to"]["curves"]["minimum"][2][2] = None
    return {
        "case": {"name": "kdd-convex", "dataset": "kdd", "l2": 0.0, "hidden": []},
        "data": {"rows": 494021, "features": 118, "classes": 2, "note": "37 <columns> & more"},
        "protocol": {"name": "full", "epochs": {"kdd": 1}, "seeds": [1, 2, 3], "methods": list(methods)},
        "steps": STEPS,
        "methods": methods,
        "machine": {
            **{"processor": "a <fast> one", "cores": 2, "threads": 1, "gpu": None, "system": "Linux x86_64"},
            "versions": {"python": "3.11", "torch": "2.13"},
        },
        "seconds": 5400.0,
        "flags": " --data_dir DATA <script>alert(1)</script>",
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return make_result()


def make_resnet() -> dict[str, Any]:
    """Without Full TO, and all trials of RankOne TO diverged."""
    methods = make_result()["methods"]
    for name in ("full_to", "full_to_ours"):
        del methods[name]
    methods["rank_one_to"]["winners"] = {"minimum": None, "area": None}
    case = {"name": "resnet18", "dataset": "cifar10"}
    about = {key: make_result()[key] for key in ("machine", "seconds", "flags")}
    return {"case": case, "protocol": {"name": "full", "rows": 64}, "steps": STEPS, "methods": methods} | about


def make_llm() -> dict[str, Any]:
    """With Momentum of ours."""
    methods = make_resnet()["methods"]
    methods["momentum_ours"] = method(both(curves(0.8, 0.001, 0.0, 0.002)), alpha=0.0, beta=0.1)
    return {**make_resnet(), "case": {"name": "llm"}, "methods": methods}


@pytest.fixture(scope="module")
def proofs() -> dict[str, Any]:
    """`theory.run`'s result, very small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory, "QUICK", (2, 8, 2))
        about = {key: make_result()[key] for key in ("machine", "seconds", "flags")}
        return json.loads(json.dumps(theory.run(True) | about | {"protocol": {"name": "full"}}))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, proofs: dict[str, Any]) -> tuple[Path, list[Path]]:
    """A folder of results and what was written into it."""
    folder = tmp_path_factory.mktemp("results")
    results = {"kdd-convex": make_result(), "resnet18": make_resnet(), "llm": make_llm()}
    for name, content in {**results, "theory": proofs}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder, page.render(folder)


@pytest.fixture
def html(rendered: tuple[Path, list[Path]]) -> str:
    return (rendered[0] / "index.html").read_text()


def words(html: str) -> str:
    """What a reader sees, and the style."""
    return unescape(re.sub(r"<[^>]*>", "", html))


def row(table: Table, title: str) -> dict[str, Cell]:
    [cells] = [rows[title] for rows in table.groups.values() if title in rows]
    return dict(zip(table.heads[1:], cells, strict=True))


def test_every_experiment_is_a_row() -> None:
    names = [case.name for case in (*STRONGLY_CONVEX, *CONVEX, *FFN)]
    assert list(tables.ROWS) == [*names, "resnet18", "resnet50", "llm"]
    assert {group for groups in tables.TABLES.values() for group in groups} == set(tables.GROUPS)
    for name, groups in tables.TABLES.items():
        table = tables.make({}, name, "minimum")
        titles = [title for group in groups for title in tables.GROUPS[group].values()]
        assert [title for rows in table.groups.values() for title in rows] == titles
        for text, escaped in (
            (tables.markdown(table), str),
            (tables.latex(table), lambda x: x.translate(tables.LATEX)),
        ):
            assert all(escaped(title) in text for title in titles)
        for title in titles:
            expected = "no data" if title.startswith("SmallNORB") else "not run"
            assert {cell.text for cell in row(table, title).values()} == {expected}
        assert ("SmallNORB was not at hand" in table.note) == (name != "table6")


def test_cells(result: dict[str, Any]) -> None:
    cells = row(tables.make({"kdd-convex": result}, "table3", "minimum"), "KDD")
    assert cells == {
        "Adam's loss": Cell("1.133"),
        "Momentum": Cell("0 ± 0", verdict="no difference"),
        "Full TO": Cell("9.97 ± 0.06", "***", verdict="better"),
        "Diagonal TO": Cell("diverged 2 of 3"),
        "RankOne TO": Cell("all trials diverged"),
        "Full TO†": Cell("−20.1 ± 0.1", "***", verdict="worse"),
        "Diagonal TO†": Cell("7.0 ± 34.9", verdict="no difference"),
        "RankOne TO†": Cell("20.0 ± 0.0", "***", best=True, verdict="better"),
    }


def test_only_what_is_above_0_is_best(result: dict[str, Any]) -> None:
    for name in ("full_to", "diagonal_to_ours", "rank_one_to_ours"):
        result["methods"][name]["curves"] = both(curves(1.5))
    assert not any(cell.best for cell in tables.cells(result, "kdd-convex", "minimum", tables.COMPARED))


def test_where_adam_diverged_nothing_is_compared(result: dict[str, Any]) -> None:
    result["methods"]["adam"]["curves"]["area"][0][1:] = [None, None]
    adam, momentum, full, diagonal, *_ = tables.cells(result, "kdd-convex", "area", tables.PAPERS)
    assert [cell.text for cell in (adam, momentum, full, diagonal)] == [
        *("diverged", "Adam diverged", "Adam diverged", "diverged 2 of 3")
    ]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([12.345, 0.678], ["12.3", "0.7"]),
        ([-0.0123, 0.00456], ["−0.0123", "0.0046"]),
        ([0.3, 123.4], ["0", "123"]),
        ([0.00001, 0.0], ["0.0000", "0.0000"]),
        ([-2.5e7, 1e6], ["−2.5e7", "1.0e6"]),
        ([0.0], ["0"]),
    ],
)
def test_numbers(values: list[float], texts: list[str]) -> None:
    assert tables.numbers(values) == texts


def test_markdown_and_latex_have_marks_bold_and_ours(result: dict[str, Any]) -> None:
    table = tables.make({"kdd-convex": result}, "table3", "minimum")
    assert "| RankOne TO† |\n" in tables.markdown(table)
    assert "| KDD | 1.133 | 0 ± 0 | 9.97 ± 0.06\\*\\*\\* |" in tables.markdown(table)
    assert "| **20.0 ± 0.0**\\*\\*\\* |" in tables.markdown(table)
    assert r"RankOne TO$^\dagger$ \\" in tables.latex(table)
    assert r"KDD & 1.133 & 0 $\pm$ 0 & 9.97 $\pm$ 0.06$^{***}$ &" in tables.latex(table)
    assert r"\textbf{20.0 $\pm$ 0.0}$^{***}$ \\" in tables.latex(table)
    columns = [line.count("|") for line in tables.markdown(table).splitlines() if line.startswith("|")]
    assert len(set(columns)) == 1


def test_special_characters_are_escaped() -> None:
    table = Table("name", "50 % of #1", "a_b", ["", "{x} & y"], {"g~^\\": {"a|b": [Cell("$3*", "*")]}})
    latex = tables.latex(table)
    for text in (
        r"50 \% of \#1. a\_b",
        r"\{x\} \& y",
        r"g\textasciitilde{}\textasciicircum{}\textbackslash{}",
        r"\$3*$^{*}$",
    ):
        assert text in latex
    assert r"| a\|b | $3\*\* |" in tables.markdown(table)
    assert latex.isascii()


def test_the_real_tables_are_ascii_in_latex(result: dict[str, Any]) -> None:
    for name in tables.TABLES:
        assert tables.latex(tables.make({"kdd-convex": result}, name, "area")).isascii()


def test_reading_counts_cases(result: dict[str, Any]) -> None:
    results = {"kdd-convex": result, "kdd-ffn": result, "llm": page.checked(make_llm())}
    readings = {(one.method, one.criterion, one.against): one[3:] for one in tables.reading(results)}
    assert readings["momentum", "minimum", "adam"] == (3, 0, 3, 0, 0, None)
    assert readings["full_to", "minimum", "adam"] == (2, 2, 0, 0, 0, 0)
    assert readings["full_to_ours", "area", "adam"] == (2, 0, 0, 0, 0, 2)
    assert readings["rank_one_to", "area", "momentum"] == (3, 0, 0, 0, 1, 2)
    assert readings["rank_one_to_ours", "minimum", "adam"] == (3, 3, 0, 0, 0, 0)
    assert readings["momentum_ours", "minimum", "momentum"] == (1, 1, 0, 0, 0, None)
    assert readings["rank_one_to_ours", "minimum", "momentum"] == (3, 2, 1, 0, 0, 0)  # in llm against momentum_ours
    assert ("momentum", "minimum", "momentum") not in readings


def test_rates_have_a_line_for_each_choice(result: dict[str, Any]) -> None:
    result["methods"]["momentum"]["winners"] = {
        "minimum": {"lr": 1.0, "beta": 0.3, "schedule": "constant"},
        "area": {"lr": 0.316228, "beta": 0.3, "schedule": "exponential"},
    }
    lines = list(tables.rates({"kdd-convex": result}))
    assert lines[:3] == [
        ("KDD (convex)", "Adam", "both", "0.1", "–", "0.9, 0.999", "constant", "192", "3", "2"),
        ("KDD (convex)", "Momentum", "minimum", "1 (end)", "–", "0.3", "constant", "192", "3", "2"),
        ("KDD (convex)", "Momentum", "area", "0.3162", "–", "0.3", "exponential", "192", "3", "2"),
    ]
    assert len(lines) == len(METHODS) + 1


def plotted(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_loss_curves_are_means_with_a_band_and_without_the_start(result: dict[str, Any]) -> None:
    drawn = figures.draw({"kdd-convex": result}, None)
    assert list(drawn) == ["figure2", "figure2_losses"]
    [axes] = drawn["figure2_losses"].figure.axes
    lines = plotted(axes)
    assert lines["Adam"] == (STEPS[1:], pytest.approx([2 * 3.4 / 3, 3.4 / 3]))
    assert lines["Full TO†"][1] == pytest.approx([2.4 * 3.4 / 3, 1.2 * 3.4 / 3 + 0.001])
    assert lines["Diagonal TO"] == ([10], pytest.approx([2 * 3.4 / 3]))  # two seeds have diverged at 20
    assert lines["RankOne TO"] == ([], [])
    assert axes.get_yscale() == "log"
    low, high = axes.collections[0].get_paths()[0].get_extents().get_points()
    assert ([*low], [*high]) == (pytest.approx([10, 1.0]), pytest.approx([20, 2.6]))
    styles = {line.get_label(): (line.get_color(), line.is_dashed()) for line in axes.lines}
    assert styles["Full TO"] == (figures.COLOURS["full_to"], False)
    assert styles["Full TO†"] == (figures.COLOURS["full_to"], True)


def test_standardised_curves_reach_from_0_to_1(result: dict[str, Any]) -> None:
    [axes] = figures.draw({"kdd-convex": result}, None)["figure2"].figure.axes
    lines = plotted(axes)
    losses = [loss for _, ys in lines.values() for loss in ys]
    assert lines["Adam"][0] == [0.5, 1.0]
    assert min(losses) == lines["RankOne TO†"][1][-1] == 0
    assert max(losses) == 1
    assert lines["Adam"][1][0] == pytest.approx((2 * 3.4 - 0.8 * 3.4) / (2.4 * 3.4 - 0.8 * 3.4))


def test_one_outlier_does_not_flatten_a_standardised_panel() -> None:
    steps = list(range(21))
    flat = [[2.0, *(1 - step / 40 for step in steps[1:])]]
    spike = [[2.0, 1e6, *flat[0][2:]]]
    bands = {"adam": figures.band(steps, flat), "momentum": figures.band(steps, spike)}
    losses = figures._standardised(bands)["adam"].mean
    assert (losses[-1], losses[0]) == (0, pytest.approx(1, abs=0.1))


def test_a_case_in_which_all_diverged_is_an_empty_panel(result: dict[str, Any]) -> None:
    for found in result["methods"].values():
        found["curves"] = both([[9.0, None, None]])
    for one in figures.draw({"kdd-convex": result}, None).values():
        assert all(line == ([], []) for line in plotted(one.figure.axes[0]).values())


def test_a_panel_for_each_case_with_a_result(result: dict[str, Any]) -> None:
    results = {case.name: result for case in STRONGLY_CONVEX[1:8]}
    panels = figures.draw(results, None)["figure1"].figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        tables.ROWS[case.name][1] for case in STRONGLY_CONVEX[1:8]
    ]


def test_theory_is_drawn_with_a_guide_of_slope_minus_1(proofs: dict[str, Any]) -> None:
    drawn = figures.draw({}, proofs)
    assert list(drawn) == ["figure6", "figure7"]
    error = drawn["figure6"].figure.axes[0]
    curve = proofs["problems"]["ridge_logistic"]["methods"]["full_to"]["theorem"]
    full = next(line for line in error.lines if line.get_label() == "Full TO")
    assert (list(full.get_xdata()), list(full.get_ydata())) == (curve["steps"], curve["error"])
    (x1, x2), (y1, y2) = plotted(error)["slope −1"]
    assert x1 * y1 == pytest.approx(x2 * y2)
    assert sum(line.get_linestyle() == ":" for line in error.lines) == 4  # constant beta


def test_ratios_far_above_the_bound_are_crosses(proofs: dict[str, Any]) -> None:
    found = proofs["proposition_2"]["ridge_logistic"]
    found = {**found, "full_to": {**found["full_to"], "slope_ratio": [0.1, 0.5, 1e20, None]}}
    axes = figures.bounds({"ridge_logistic": found}).axes[0]
    lines = [line for line in axes.lines if line.get_color() == figures.COLOURS["full_to"]]
    assert [(line.get_marker(), len(line.get_xdata())) for line in lines] == [("o", 2), ("x", 2)]
    assert list(lines[0].get_ydata()) == [0.1, 0.5]


def test_everything_is_written(rendered: tuple[Path, list[Path]]) -> None:
    folder, written = rendered
    pictures = [*(f"figure{i}{form}" for i in (2, 4, 5) for form in ("", "_losses")), "figure6", "figure7"]
    assert {path.name for path in written} == {
        *("table2.md", "table2.tex", "table3.md", "table3.tex", "table6.md", "table6.tex", "rates.md", "tables.json"),
        *(f"{name}.{ending}" for name in pictures for ending in ("svg", "png")),
        "index.html",
    }
    assert {path.name for path in folder.iterdir()} - {path.name for path in written} == {
        f"{name}.json" for name in (*RESULTS, "theory")
    }


def test_pictures_are_the_same_every_time(tmp_path: Path, result: dict[str, Any]) -> None:
    contents = []
    for _ in range(2):
        drawn = figures.draw({"kdd-convex": result}, None)
        paths = figures.write({"figure2": drawn["figure2"].figure}, tmp_path)
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert [content[:5] for content in contents[0]] == [b"<?xml", b"\x89PNG\r"]
    assert b"<metadata>" not in contents[0][0]


def test_tables_json_has_every_number(rendered: tuple[Path, list[Path]]) -> None:
    found = json.loads((rendered[0] / "tables.json").read_text(), parse_constant=pytest.fail)
    assert found["rows"]["smallnorb-convex"] == {"group": "convex", "label": "SmallNORB", "missing": "no data"}
    full = found["rows"]["kdd-convex"]["criteria"]["minimum"]["full_to"]
    assert full["losses"] == pytest.approx([0.901, 0.99, 1.17])
    assert set(full) == {"losses", "against_adam", "against_momentum"}
    assert {"mean", "sd", "p_normal", "p_t", "r", "diverged"} <= set(full["against_adam"])
    assert "against_momentum_ours" in found["rows"]["llm"]["criteria"]["area"]["diagonal_to_ours"]
    assert len(found["reading"]) == len(CRITERIA) * (8 + 7)  # of 8 methods, of which one is the reference
    lines = {line["case"] for line in found["rates"]}
    assert lines == {f"{tables.ROWS[name][1]} ({tables.ROWS[name][0]})" for name in RESULTS}


def test_the_page_has_all_tables(rendered: tuple[Path, list[Path]], html: str) -> None:
    text = words(html)
    results = {name: page.checked(json.loads((rendered[0] / f"{name}.json").read_text())) for name in RESULTS}
    for name in tables.TABLES:
        for criterion in CRITERIA:
            table = tables.make(results, name, criterion)
            assert table.title in text
            assert table.note in text
            for rows in table.groups.values():
                for title, cells in rows.items():
                    assert title in text
                    assert all(cell.text + cell.marks in text for cell in cells)
    assert html.count("<svg") == 8
    assert "4 results, 6.0 hours: a <fast> one, cores: 2, threads: 1; Linux x86_64; python 3.11, torch 2.13" in text
    assert "A trial, not a result" not in text


def test_the_page_stands_alone(html: str) -> None:
    resources = re.findall(r'(?:src|href|url\()\s*=?\s*["\']?([^"\')>\s]+)', re.sub(r'<a href="https[^>]*>', "", html))
    assert resources
    assert all(target.startswith("#") for target in resources)
    assert "<link" not in html
    assert "@import" not in html


def test_the_page_escapes_what_it_is_given(html: str) -> None:
    assert "to-finetune reproduce kdd-convex resnet18 llm theory --data_dir DATA <script>" in words(html)
    assert "<script" not in html
    assert "37 &lt;columns&gt; &amp; more" in html
    assert "a &lt;fast&gt; one" in html


def test_inline_pictures_take_the_pages_colours_and_have_ids_of_their_own(html: str) -> None:
    assert figures.INK not in html.split("<svg", 1)[1]
    assert "currentColor" in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_a_trial_says_so(result: dict[str, Any]) -> None:
    result["protocol"]["name"] = "quick"
    assert "A trial, not a result" in page.html({"kdd-ffn": result}, None, [])


def test_a_case_of_a_reduced_protocol_says_so(result: dict[str, Any]) -> None:
    result["protocol"]["name"] = "reduced"
    assert "KDD, reduced" in tables.make({"kdd-convex": result}, "table3", "minimum").groups["convex"]


def test_without_results_there_is_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "tables.json").write_text("{}")
    with pytest.raises(UsageError, match="no results"):
        page.render(tmp_path)


def test_theory_alone_makes_a_page(proofs: dict[str, Any]) -> None:
    html = page.html({}, proofs, [])
    assert "0 of 27 cases have a" in html
    slope = proofs["problems"]["quadratic"]["projected"]["adam"]["theorem"]["error_slope"]
    assert f"{slope:.3f} ± ".replace("-", "−") in html


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    content = deepcopy(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return content


@pytest.mark.parametrize("kind", ["cut", "list", "no adam", "no curves", "lengths", "method", "bytes", "no machine"])
def test_a_damaged_result_is_named(kind: str, tmp_path: Path, result: dict[str, Any]) -> None:
    path = tmp_path / "kdd-convex.json"
    contents: dict[str, Any] = {
        "list": [],
        "no adam": without(result, "methods", "adam"),
        "no curves": without(result, "methods", "full_to", "curves", "area"),
        "lengths": {**result, "steps": [0, 1]},
        "no machine": without(result, "machine"),
        "method": {**result, "methods": {**result["methods"], "sgd": result["methods"]["adam"]}},
    }
    if kind == "bytes":
        path.write_bytes(b"\xff\xfe")
    else:
        path.write_text(json.dumps(result)[:500] if kind == "cut" else json.dumps(contents[kind]))
    with pytest.raises(UsageError, match=r"kdd-convex\.json is damaged"):
        page.render(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "keys", [("problems",), ("proposition_2", "quadratic"), ("problems", "quadratic", "projected")]
)
def test_a_damaged_theory_is_named(keys: tuple[str, ...], tmp_path: Path, proofs: dict[str, Any]) -> None:
    (tmp_path / "theory.json").write_text(json.dumps(without(proofs, *keys)))
    with pytest.raises(UsageError, match=r"theory\.json is damaged"):
        page.render(tmp_path)
