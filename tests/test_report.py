"""The page of a run and of several side by side: its numbers, its drawings, what a run writes for it, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from to_finetune.cli import main
from to_finetune.errors import RunError
from to_finetune.model import load_finetuned
from to_finetune.optim import DiagonalTO, RankOneTO, TrainableOptimizer
from to_finetune.optim import slopes as slopes_module
from to_finetune.optim.sharding import Member, cut
from to_finetune.optim.slopes import QUANTILES, SAMPLE, _sample, slopes
from to_finetune.optim.state import read
from to_finetune.report.charts import Box, Series, boxes, curves, number
from to_finetune.report.maps import slopes_view, subset_grid
from to_finetune.report.page import _data, write_report
from to_finetune.report.run import Slopes, TensorSlope, read_run
from to_finetune.training.callbacks import StopOnNonFinite
from to_finetune.training.traces import NEW_TOKENS, SampleAnswers, SlopeTrace, _prompts, write_parameters

from .helpers import Run, assert_same_bits

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
OPENED_BY_THE_WAY = {"path"}  # SVG's, closed in themselves


class Page(HTMLParser):
    """What a reader sees of a page, and whether every element is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.classes: list[str] = []
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []  # of which element
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.classes += [value or "" for name, value in attrs if name == "class"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID | OPENED_BY_THE_WAY:
            self.wrong.append(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open and self.open[-1] not in ("style", "script"):
            self.texts.append((self.open[-1], data.strip()))

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts)

    def tiles(self) -> dict[str, str]:
        """The numbers of the head, by their names."""
        found = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span></div>', self.source)
        return {name: value for value, name in found}

    def rows(self) -> dict[str, list[str]]:
        """Each table's rows, by their first cell without its mark."""
        rows = {}
        for row in re.findall(r"<tr>(.*?)</tr>", self.source, flags=re.DOTALL):
            cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
            first, *others = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in cells]
            rows[first] = others
        return rows


def history() -> list[dict[str, Any]]:
    rows = [
        {"step": 10, "loss": 4.0, "grad_norm": 1.0, "learning_rate": 0.008, "estimate_error": 0.9},
        {"step": 20, "loss": 3.0, "grad_norm": 2.0, "learning_rate": 0.004, "estimate_error": 0.8},
        {"step": 30, "loss": 2.0, "grad_norm": 3.0, "learning_rate": 0.0, "estimate_error": 0.7},
    ]
    speeds = (100.0, 4000.0, 2000.0)
    return [{**row, "tokens_per_second": y} for row, y in zip(rows, speeds, strict=True)] + [
        {"step": 30, "eval_loss": 2.5}
    ]


def made(folder: Path, config: dict[str, Any] | None = None, **record: Any) -> Path:
    """A run's folder, made by hand: a model of two layers, the second of which trains."""
    folder.mkdir(parents=True)
    values = {
        "status": "done",
        "command": f"scripts/finetune.py --optim diagonal_to --output_dir {folder}",
        "started": "2026-01-02T03:04:05+00:00",
        "processor": "Some Processor",
        "cores": 4,
        "threads": 1,
        "gpu": None,
        "system": "Linux x86_64",
        "versions": {"torch": "2.13.0"},
        "results": {
            "steps": 30,
            "train_loss_mean": 3.0,
            "train_loss_first_fifth": 4.0,
            "eval_loss": 2.5,
            "train_seconds": 65.4,
            "processes": 1,
        },
        "proofs": {
            "live_optimizer": "DiagonalTO",
            "trained_tensors": 2,
            "moved_after_first_step": 2,
            "frozen_tensors_unmoved": 3,
            "never_moved": [],
            "saved_bytes_read_back": 12_345,
        },
        "memory": {"planned": {"frozen": 3_000_000, "trained": 1_000_000, "context": 0}, "measured": 2_000_000},
        **record,
    }
    settings = {
        "model_name_or_path": "models/tiny",
        "unfrozen_parameters": [r"layers\.1\."],
        "dataset_name": ["alpaca.json"],
        "val_set_size": 6.0,
        "output_dir": str(folder),
        "learning_rate": 0.008,
        "optim": "diagonal_to",
        "optim_args": {"alpha": 0.3, "relative_alpha": True, "grad_scale": "rms"},
        **(config or {}),
    }
    sizes = {"model.embed.weight": 600}
    sizes |= {
        f"model.layers.{i}.{name}.weight": size for i in (0, 1) for name, size in (("q_proj", 1000), ("norm", 20))
    }
    trained = ["model.layers.1.q_proj.weight", "model.layers.1.norm.weight"]
    tensors = {
        trained[0]: {"sizes": [1.0, 2.0], "weight": 0.25, "quantiles": [-9.0, -1.0, 0.0, 0.5, 1.0, 3.0, 8.0]},
        trained[1]: {"sizes": [0.1, 0.125], "weight": 1.0, "quantiles": [-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 2.0]},
    }
    samples = [{"prompt": "What is red?", "reference": "A stone.", "before": "Red red …", "after": "A bird."}]
    contents = {
        "run.json": values,
        "trainer_state.json": {"log_history": history()},
        "parameters.json": {"sizes": sizes, "trained": trained},
        "slopes.json": {
            "form": "diagonal",
            "grad_scale": "rms",
            "sample": SAMPLE,
            "steps": [15, 30],
            "quantiles_at": QUANTILES,
            "tensors": tensors,
        },
        "samples.json": {"held_out": True, "rows": samples},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def page_of(*runs: Path) -> Page:
    path = runs[0].parent / "page.html"
    write_report(runs, path)
    return Page(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made(tmp_path / "run")


@pytest.fixture
def others(tmp_path: Path) -> list[Path]:
    """Beside the run: one that is better in loss and slower, and one that failed with the lowest loss and time."""
    results = {"steps": 40, "train_loss_mean": 2.9, "train_loss_first_fifth": 4.25, "eval_loss": 2.25}
    better = made(
        tmp_path / "better",
        {"optim": "adamw_torch", "optim_args": None, "learning_rate": 0.004},
        results={**results, "train_seconds": 130.8, "processes": 1},
        memory={"planned": {"frozen": 8_000_000}, "measured": None},
    )
    failed = made(
        tmp_path / "failed", status="failed", error="RunError: nan", results={"eval_loss": 1.0, "train_seconds": 65.4}
    )
    return [better, failed]


# The page of one run


def test_the_head_has_the_runs_numbers(run: Path) -> None:
    page = page_of(run)
    assert page.tiles() == {
        "held-out loss": "2.5000",
        "training loss, mean": "3.0000",
        "its first fifth": "4.0000",
        "steps": "30",
        "training time": "1 min 05 s",
        "tokens a second": "2,000",  # the median: the first entry has the start's compilation in it
    }
    assert ("h1", "Diagonal TO on tiny") in page.texts
    assert ("span", "done") in page.texts
    facts = [text for tag, text in page.texts if tag == "dd"]
    assert facts == [
        "Diagonal TO, learning rate 0.008, alpha 0.3, relative_alpha True, grad_scale rms",
        "models/tiny",
        r"1,020 of 2,640 weights (38.6 %) in 2 tensors; unfrozen_parameters layers\.1\.",
        "alpaca.json, 6 rows held out",
        str(run),
        "2026-01-02 03:04:05 UTC",
        "Some Processor, 4 cores, 1 thread, Linux x86_64, 1 process",
        "torch 2.13.0",
    ]


def test_every_setting_that_says_what_trains_is_shown(tmp_path: Path) -> None:
    adapters = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"], "load_in_8bit": True}
    page = page_of(made(tmp_path / "run", config={"unfrozen_parameters": "", **adapters}))
    how = "use_peft True; lora_r 8; lora_target_modules q_proj, v_proj; load_in_8bit True"
    assert any(how in text for _, text in page.texts)


def test_the_command_can_be_copied(tmp_path: Path) -> None:
    """A flag a line; the shell puts them together again. The launcher of several processes is not known."""
    command = "scripts/finetune.py --unfrozen_parameters 'layers\\.(0|1)\\.' lm_head --max_steps 5"
    alone, two = made(tmp_path / "a", command=command), made(tmp_path / "b", command=command, results={"processes": 2})
    lines = "scripts/finetune.py \\\n    --unfrozen_parameters 'layers\\.(0|1)\\.' lm_head \\\n    --max_steps 5"
    assert [text for tag, text in page_of(alone).texts if tag == "pre"] == ["accelerate launch " + lines]
    assert [text for tag, text in page_of(two).texts if tag == "pre"] == [lines]


def test_the_proofs_are_in_words(tmp_path: Path) -> None:
    page = page_of(made(tmp_path / "run", proofs={**read_run(made(tmp_path / "other")).record["proofs"], "new_one": 7}))
    checks = re.findall(r"<li( class=\"no\")?>([^<]*)</li>", page.source)
    assert checks == [
        ("", "The live optimizer is DiagonalTO, the one that was asked for."),
        ("", "It holds exactly the 2 tensors that were to train."),
        ("", "2 tensors moved in the first step."),
        ("", "No bit of the 3 frozen tensors changed."),
        ("", "Every trained tensor has moved."),
        ("", "The 12,345 bytes that were saved read back bit for bit."),
        ("", "new one: 7"),
    ]
    page = page_of(made(tmp_path / "third", proofs={"never_moved": ["a", "b"]}))
    assert '<li class="no">2 of the trained tensors never moved: a, b.</li>' in page.source


def test_memory_is_drawn_to_scale(run: Path, others: list[Path]) -> None:
    """The widest bar, of all runs, is the whole width; its parts share it by their bytes."""
    bars = re.compile(r'class="bar" style="width: ([\d.]+)%">(.*?)</div>')
    parts = re.compile(r'flex: (\d+).*?title="(.*?)"')
    drawn = [(width, parts.findall(inside)) for width, inside in bars.findall(page_of(run, others[0]).source)]
    assert drawn == [
        ("50.00", [("3000000", "frozen: 3.00 MB"), ("1000000", "trained: 1.00 MB")]),
        ("25.00", [("1", "2.00 MB")]),
        ("100.00", [("8000000", "frozen: 8.00 MB")]),
    ]


def test_what_is_said_of_memory_and_of_nothing_frozen(tmp_path: Path) -> None:
    memory = {"planned": None, "not_planned": "It would be a guess.", "measured": 2_000_000, "kind": "resident"}
    text = page_of(made(tmp_path / "run", memory=memory, proofs={"frozen_tensors_unmoved": 0})).text
    assert "It would be a guess." in text
    assert "Measured is by how much the process grew, libraries and all." in text
    assert "frozen tensors changed" not in text


def test_answers_before_and_after(run: Path) -> None:
    texts = [text for _, text in page_of(run).texts]
    at = texts.index("What is red?")
    assert texts[at : at + 7] == ["What is red?", "in the data", "A stone.", "before", "Red red …", "after", "A bird."]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"status": "failed", "error": "RunError: loss is nan at step 3"}, "RunError: loss is nan at step 3"),
        (
            {"status": "interrupted", "checkpoint": "runs/x/checkpoint-4"},
            "Stopped by a signal; runs/x/checkpoint-4 is where it can go on from.",
        ),
        ({"status": "running"}, "The run goes on, or was ended from outside: its record says no more."),
    ],
    ids=["failed", "interrupted", "running"],
)
def test_a_run_that_did_not_end_well_says_why(tmp_path: Path, record: dict[str, Any], sentence: str) -> None:
    page = page_of(made(tmp_path / "run", results={}, proofs={}, **record))
    assert ("p", sentence) in page.texts
    assert f'class="status {record["status"]}"' in page.source
    assert page.tiles()["held-out loss"] == "–"
    assert page.tiles()["tokens a second"] == "2,000"


@pytest.mark.parametrize(
    "missing",
    [
        ["trainer_state.json"],
        ["parameters.json"],
        ["slopes.json"],
        ["samples.json"],
        ["config.yaml"],
        ["trainer_state.json", "parameters.json", "slopes.json", "samples.json", "config.yaml"],
    ],
    ids=lambda names: names[0] if len(names) == 1 else "all",
)
def test_what_is_missing_is_left_out(run: Path, missing: list[str]) -> None:
    headings = {
        "trainer_state.json": ("p", "Nothing was logged."),
        "slopes.json": ("p", "No slopes were recorded: the run has no slopes.json."),
    }
    absent = {"parameters.json": "What trains", "samples.json": "Answers before and after"}
    for name in missing:
        (run / name).unlink()
    page = page_of(run)
    assert page.wrong == []
    assert page.tiles()["held-out loss"] == "2.5000"
    for name in missing:
        assert name not in absent or ("h2", absent[name]) not in page.texts
        assert name not in headings or "config.yaml" in missing or headings[name] in page.texts


def test_a_bare_record_is_enough(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running", "command": "finetune.py"}')
    page = page_of(tmp_path)
    assert page.wrong == []
    assert set(page.tiles().values()) == {"–"}


def test_a_running_runs_curves_are_its_last_checkpoints(run: Path) -> None:
    (run / "trainer_state.json").unlink()
    for step, loss in ((5, 1.0), (20, 2.0), (100, 3.0)):
        (run / f"checkpoint-{step}").mkdir()
        log = {"log_history": [{"step": step, "loss": loss}]}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(log))
    assert read_run(run).history == [{"step": 100, "loss": 3.0}]


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = made(tmp_path / "run", {"model_name_or_path": evil, "note": evil}, status="failed", error=evil)
    (run / "samples.json").write_text(
        json.dumps({"held_out": True, "rows": [dict.fromkeys(("prompt", "reference", "before", "after"), evil)]})
    )
    page = page_of(run)
    assert "<script>alert" not in page.source
    assert page.tags.count("script") == 1  # the copy button's
    assert page.source.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6


def test_pages_are_whole_and_load_nothing(run: Path, others: list[Path]) -> None:
    for runs in ([run], [run, *others], others[1:]):
        page = page_of(*runs)
        assert page.wrong == []
        assert page.loads == []
        assert not re.search(r"url\(|@import|https?://", page.source)
        assert "prefers-color-scheme: dark" in page.source


# Several runs


def test_runs_are_compared_with_the_first(run: Path, others: list[Path]) -> None:
    """The best of those that ended is marked; the failed run's lower loss wins nothing."""
    rows = page_of(run, *others).rows()
    assert rows["run"] == ["done", "2.5000", "3.0000", "4.0000", "30", "1 min 05 s", "2,000"]
    assert rows["better"] == [
        *("done", "2.2500 −0.2500", "2.9000 −0.1000", "4.2500 +0.2500", "40 +10"),
        *("2 min 11 s +100.0 %", "2,000 +0.0 %"),
    ]
    assert rows["failed"] == ["failed", "1.0000 −1.5000", "–", "–", "–", "1 min 05 s +0.0 %", "2,000 +0.0 %"]
    best = re.findall(r'<td class="best" title="the best"><b>(.*?)</b>', page_of(run, *others).source)
    assert best == ["4.0000", "1 min 05 s", "2.2500", "2.9000"]


def test_the_first_is_the_baseline(run: Path, others: list[Path]) -> None:
    rows = page_of(others[0], run).rows()
    assert rows["better"][1] == "2.2500"
    assert rows["run"][1:6] == ["2.5000 +0.2500", "3.0000 +0.1000", "4.0000 −0.2500", "30 −10", "1 min 05 s −50.0 %"]


def test_only_settings_that_differ_are_listed(run: Path, others: list[Path]) -> None:
    source = page_of(run, *others).source
    table = re.search(r"<h2>Settings that differ</h2>(.*?)</table>", source, flags=re.DOTALL)
    assert table
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", table[1])
    cells = {
        name: [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for name, row in rows[1:]
    }
    assert cells == {
        "learning_rate": ["0.008", "0.004", "0.008"],
        "optim": ["diagonal_to", "adamw_torch", "diagonal_to"],
        "optim_args": ["default", "None", "default"],
        "optim_args.alpha": ["0.3", "–", "0.3"],
        "optim_args.grad_scale": ["rms", "–", "rms"],
        "optim_args.relative_alpha": ["True", "–", "True"],
    }
    assert ("p", "None but the folder.") in page_of(run, made(run.parent / "same")).texts


def test_answers_stand_under_one_prompt(run: Path, others: list[Path]) -> None:
    texts = [text for _, text in page_of(run, others[0]).texts]
    assert texts.count("What is red?") == 1
    at = texts.index("Red red …")
    assert texts[at + 1 : at + 5] == ["run", "A bird.", "better", "A bird."]


def test_what_trains_is_drawn_once_if_it_is_the_same(run: Path, others: list[Path]) -> None:
    one = page_of(run, others[0])
    assert one.texts.count(("p", "1.02 k of 2.64 k weights train (38.6 %)")) == 1
    content = json.loads((others[0] / "parameters.json").read_text())
    content["trained"] = content["trained"][:1]
    (others[0] / "parameters.json").write_text(json.dumps(content))
    assert ("p", "1.00 k of 2.64 k weights train (37.9 %)") in page_of(run, others[0]).texts


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rows = page_of(made(tmp_path / "a" / "run"), made(tmp_path / "b" / "run")).rows()
    assert {"a/run", "b/run"} <= rows.keys()


# Drawings


def test_curves_are_the_logs_numbers(run: Path) -> None:
    """Loss 4, 3, 2 at steps 10, 20, 30 in a drawing from 1.9 to 4.1, and the held-out dot at 2.5."""
    source = page_of(run).source
    assert 'd="M0 4.55L50 50L100 95.45"><title>run, training, ends at 2</title>' in source
    assert '<path class="dot" d="M100 72.73h0"><title>run, held out, 30: 2.5</title></path>' in source
    # the estimation error and the learning rate from zero on
    assert 'd="M0 4.76L50 15.34L100 25.93"><title>run, ends at 0.7</title>' in source
    assert 'd="M0 4.76L50 52.38L100 100"><title>run, ends at 0</title>' in source


def drawn(xs: list[float], ys: list[float], **options: Any) -> Any:
    chart = curves("title", "unit", [Series("one", "red", xs, ys)], **options)
    assert chart
    return chart


def test_numbers_that_are_not_finite_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    assert drawn([1, 2, 3, 4], [0.0, nan, inf, 1.0]).lines[0].path == "M0 95.45L100 4.55"
    assert curves("title", "unit", [Series("one", "red", [1.0], [nan])]) is None
    assert curves("title", "unit", []) is None


def test_a_single_point_is_to_be_seen() -> None:
    """A line of one point is not."""
    assert drawn([5.0], [1.0]).lines[0].shows_dots
    assert not drawn([5.0, 6.0], [1.0, 2.0]).lines[0].shows_dots


def test_long_curves_are_averaged() -> None:
    """1,000 points, three at a time; the last group has one."""
    xs = [float(x) for x in range(1000)]
    chart = drawn(xs, [x % 3 for x in xs])
    assert chart.averaged == 3
    places = re.findall(r"([\d.]+) ([\d.]+)", chart.lines[0].path)
    assert len(places) == 334
    assert len({y for _, y in places[:-1]}) == 1
    assert chart.lines[0].dots == []
    assert drawn(xs[:400], xs[:400]).averaged == 1


@pytest.mark.parametrize(
    ("ys", "options", "ticks"),
    [
        ([0.0, 10.0], {}, ["0", "5", "10"]),
        ([5.0, 10.0], {"from_zero": True}, ["0", "5", "10"]),
        ([0.01, 100.0], {"log": True}, ["0.01", "0.1", "1", "10", "100"]),
        ([0.01, 0.1], {"log": True}, ["0.025", "0.05", "0.075", "0.1"]),  # not far enough apart
        ([2.0, 2.0], {}, ["1", "2", "3"]),
        ([0.0, 0.0], {"from_zero": True}, ["0", "0.5", "1"]),
        ([0.0, 40_000.0], {}, ["0", "20k", "40k"]),
        ([-3.0, 0.0], {}, ["−3", "−2", "−1", "0"]),
    ],
)
def test_an_axis_has_round_numbers(ys: list[float], options: dict[str, Any], ticks: list[str]) -> None:
    chart = drawn([1.0, 2.0], ys, **options)
    assert [tick.text for tick in chart.y_ticks] == ticks
    assert chart.widest in ticks
    assert all(0 <= tick.at <= 100 for tick in chart.y_ticks)


def test_a_logarithmic_axis_places_by_the_logarithm() -> None:
    path = drawn([1.0, 2.0, 3.0], [0.01, 1.0, 100.0], log=True).lines[0].path
    assert path == "M0 95.45L50 50L100 4.55"


def test_boxes_stand_side_by_side() -> None:
    """Two layers at a quarter and three; from the 5 % quantile 0 to the 95 % quantile 10, with a margin of 5 %."""
    chart = boxes("a", [Box("one", 3, [-5, 0, 2, 4, 6, 10, 50]), Box("two", 7, [1, 2, 3, 4, 5, 6, 7])], ticks=True)
    assert chart
    assert [(box.x, box.title) for box in chart.boxes] == [(25, "one"), (75, "two")]
    assert chart.boxes[0].ys[1:6] == [95.45, 77.27, 59.09, 40.91, 4.55]
    assert [(tick.at, tick.text) for tick in chart.x_ticks] == [(25, "3"), (75, "7")]
    assert boxes("a", [Box("one", 0, [])], ticks=True) is None


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (number, 0.000125, "0.000125"),
        (number, 5e-05, "5e−05"),
        (number, 12_500, "12.5k"),
        (number, 3e7, "3e+07"),
        (number, -1200, "−1,200"),
    ],
)
def test_numbers_in_words(function: Callable[[float], str], value: float, text: str) -> None:
    assert function(value) == text


def test_the_map_of_what_trains() -> None:
    """Layers 0 and 1 of two modules, one of them with a bias that stays frozen, and an embedding."""
    sizes = {"embed.weight": 50}
    for i in (0, 1):
        sizes |= {f"layers.{i}.q.weight": 100, f"layers.{i}.q.bias": 10, f"layers.{i}.norm.weight": 5}
    sizes.pop("layers.0.norm.weight")
    grid = subset_grid(sizes, {"layers.1.q.weight", "layers.1.norm.weight"})
    assert grid.headline == "105 of 275 weights train (38.2 %)"
    assert {row.label: [(cell.state, cell.text, cell.span) for cell in row.cells] for row in grid.rows} == {
        "embed": [("frozen", "50", 2)],
        "q": [("frozen", "110", 1), ("partly", "100 of 110", 1)],
        "norm": [("none", "", 1), ("trained", "5", 1)],
    }
    assert grid.rows[1].cells[1].title == "layer 1 q: 100 of 110, partly"
    assert [row.text for row in grid.rows] == ["", "100", "5"]
    assert [(tick.at, tick.text) for tick in grid.ticks] == [(25, "0"), (75, "1")]


def test_the_slopes_by_layer(run: Path) -> None:
    """rms(a) at the last moment, times rms(w): 2 × 0.25 and 0.125 × 1."""
    data = read_run(run)
    assert data.slopes
    assert data.parameters
    view = slopes_view(data.slopes, data.parameters.sizes)
    assert view
    cells = {row.label: [(cell.text, cell.title, cell.share) for cell in row.cells] for row in view.grid.rows}
    assert cells == {
        "q_proj": [("0.50", "layer 1 q_proj: 0.5", 1.0)],
        "norm": [("0.12", "layer 1 norm: 0.125", 0.25)],
    }
    assert view.largest == "0.5"
    assert (view.symbol, view.unit, view.grid_unit) == ("rms(a)", "rms(g) per unit of weight", "rms(g)")
    assert [(chart.title, chart.lines[0].path) for chart in view.growth] == [
        ("q_proj", "M0 52.38L100 4.76"),
        ("norm", "M0 23.81L100 4.76"),
    ]
    title = "layer 1 q_proj: median 0.5, 90 % within -1 to 3, extremes -9 and 8"
    assert view.spread[0].boxes[0].title == title
    page = page_of(run)
    assert page.rows()["model.layers.1.q_proj.weight"] == ["2", "0.25", "-9", "-1", "0", "0.5", "1", "3", "8"]
    assert "relative_alpha gives alpha another unit, not A." in page.text
    assert "With grad_scale=rms the model is of each tensor's g / rms(g)" in page.text


@pytest.mark.parametrize("grad_scale", ["rms", "factored", None])
def test_the_units_of_the_slopes_are_those_of_the_gradient_that_was_modelled(run: Path, grad_scale: str | None) -> None:
    path = run / "slopes.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "grad_scale": grad_scale}))
    text = page_of(run).text
    assert ("whose rows and columns weigh alike" in text) == (grad_scale == "factored")
    assert ("each tensor's g / rms(g)" in text) == (grad_scale == "rms")
    unit = {"rms": "rms(g)", "factored": "scaled gradient", None: "gradient"}[grad_scale]
    assert f"in {unit} per unit of weight" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"eval_dataset_name": "other.jsonl", "val_set_size": 500}, "held out: other.jsonl"),
        ({"dataset_test_split": "test", "val_set_size": 500}, "held out: test"),
        ({"eval_dataset_name": "other.jsonl", "dataset_test_split": "test"}, "held out: other.jsonl, test"),
        ({"val_set_size": 500.0}, "500 rows held out"),
        ({"val_set_size": 0.05}, "5 % held out"),
        ({}, ""),
    ],
)
def test_the_held_out_data_are_those_that_were_evaluated_on(config: dict[str, Any], said: str) -> None:
    assert _data({"dataset_name": ["rows.jsonl"], **config}) == ", ".join(filter(None, ["rows.jsonl", said]))


def test_the_slopes_of_rank_one_without_scaling() -> None:
    """Experts of a layer are one: the rms of theirs. There is no spread of a single number."""
    tensors = {f"layers.0.experts.{i}.w.weight": TensorSlope([x], x, []) for i, x in enumerate((3.0, 5.0))}
    view = slopes_view(Slopes("rank_one", None, 9, [5], tensors), {})
    assert view
    assert (view.symbol, view.unit, view.grid_unit) == ("‖u‖‖v‖", "gradient per unit of weight", "gradient")
    assert [row.label for row in view.grid.rows] == ["experts.*.w"]
    assert view.grid.rows[0].cells[0].text == "17"  # (3² + 5²) / 2, of which √ × √
    assert view.spread == []
    assert slopes_view(Slopes("rank_one", None, 9, [], {}), {}) is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"optim_args": {"alpha": 0}}, "alpha is 0: the slope stays zero, and the optimizer is momentum."),
        ({"optim": "full_to"}, "Full TO's slope is a matrix for each tensor, of which no summary is taken."),
        ({"optim": "adamw_torch"}, None),
    ],
    ids=["alpha 0", "full_to", "adamw"],
)
def test_without_slopes_the_page_says_why(tmp_path: Path, config: dict[str, Any], sentence: str | None) -> None:
    run = made(tmp_path / "run", config)
    (run / "slopes.json").unlink()
    page = page_of(run)
    assert (("h2", "Learned slopes") in page.texts) == (sentence is not None)
    assert sentence is None or ("p", sentence) in page.texts


# The slopes of a live optimizer


def stepped(variant: type[TrainableOptimizer], *shapes: tuple[int, ...], **options: Any) -> Any:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    optimizer = variant(weights, alpha=0.3, relative_alpha=True, grad_scale="rms", lr=0.1, **options)
    for _ in range(5):
        for p in weights:
            p.grad = torch.randn_like(p) + p.detach()
        optimizer.step()
    return optimizer


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_diagonal_slopes_are_the_states(state_dtype: str) -> None:
    optimizer = stepped(DiagonalTO, (45, 7), (64,), state_dtype=state_dtype)
    found = slopes(optimizer)
    assert list(found) == [0, 1]
    for position, p in enumerate(optimizer.param_groups[0]["params"]):
        a = read(optimizer.state[p], "a", torch.float32)
        slope = found[position]
        assert slope.size == pytest.approx(rms(a), rel=1e-6)
        assert slope.size > 0.01
        assert slope.weight == pytest.approx(rms(p), rel=1e-6)
        ordered = a.flatten().sort().values.tolist()
        assert slope.quantiles[0] == ordered[0]
        assert slope.quantiles[-1] == ordered[-1]
        assert slope.quantiles == pytest.approx([a.quantile(q).item() for q in QUANTILES])


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_the_slope_of_rank_one_is_its_singular_value(state_dtype: str) -> None:
    optimizer = stepped(RankOneTO, (9, 5), state_dtype=state_dtype)
    (p,) = optimizer.param_groups[0]["params"]
    u, v = (read(optimizer.state[p], name, torch.float64).flatten() for name in "uv")
    (slope,) = slopes(optimizer).values()
    assert slope.size == pytest.approx(torch.linalg.svdvals(torch.outer(u, v))[0].item(), rel=1e-6)
    assert slope.size > 1e-4
    assert slope.quantiles == []


def test_large_tensors_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 21st of 1,000 numbers: an odd step, so that columns take turns."""
    monkeypatch.setattr(slopes_module, "SAMPLE", 50)
    optimizer = stepped(DiagonalTO, (100, 10))
    (p,) = optimizer.param_groups[0]["params"]
    sample = optimizer.state[p]["a"].flatten()[::21]
    (slope,) = slopes(optimizer).values()
    assert slope.size == pytest.approx(rms(sample), rel=1e-6)
    assert slope.quantiles[3] == sample.quantile(0.5).item()


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["a", None])
def test_pieces_give_the_sample_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, state_dtype: str, name: str | None
) -> None:
    """Cut where no block of 32 ends; each process adds its numbers at their places."""
    monkeypatch.setattr(slopes_module, "SAMPLE", 64)
    optimizer = stepped(DiagonalTO, (40, 10), state_dtype=state_dtype)
    (whole,) = optimizer.held()
    if state_dtype == "int8":
        whole.state["a_exponent"].copy_(torch.arange(120, 133))  # no two blocks alike
    first, numel = 101, 400
    last_block = 4 if state_dtype == "int8" else 0
    state = whole.state

    def piece(begin: int, end: int, blocks: slice) -> Member:
        views = cut(state, begin, end - begin, blocks.start, blocks.stop - blocks.start)
        return Member(0, whole.p.view(-1)[begin:end], whole.grad, views, whole.owner, numel, begin)

    left, right = piece(0, first, slice(0, last_block)), piece(first, numel, slice(first // 32, 13))
    parts = [_sample([member], name) for member in (left, right, piece(numel, numel, slice(13, 13)))]
    assert all(part is not None for part in parts)
    assert torch.equal(sum(parts[1:], start=parts[0]), _sample([whole], name))  # type: ignore[arg-type]
    assert torch.equal(_sample([left, right], name), _sample([whole], name))  # type: ignore[arg-type]


def traced(folder: Path, max_steps: int, begin: int = 0, end: int | None = None) -> dict[str, Any]:
    """A training loop with the callback."""
    net = nn.Linear(3, 2)
    optimizer = DiagonalTO(net.parameters(), lr=0.01, alpha=0.3, beta=0.1)
    trace = SlopeTrace(folder)
    state = TrainerState(max_steps=max_steps, global_step=begin, is_world_process_zero=True)
    about: Any = (TrainingArguments(str(folder), report_to="none"), state, TrainerControl())
    trace.on_train_begin(*about, model=net, optimizer=optimizer)
    for step in range(begin + 1, (max_steps if end is None else end) + 1):
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        state.global_step = step
        trace.on_step_end(*about, model=net, optimizer=optimizer)
    trace.on_train_end(*about, model=net, optimizer=optimizer)
    return json.loads((folder / "slopes.json").read_text())


def test_the_slopes_are_looked_at_some_twenty_times(tmp_path: Path) -> None:
    assert traced(tmp_path, 3)["steps"] == [1, 2, 3]
    assert traced(tmp_path, 20)["steps"] == list(range(1, 21))
    assert traced(tmp_path, 45)["steps"] == list(range(3, 46, 3))
    assert traced(tmp_path, 50)["steps"] == [*range(3, 50, 3), 50]  # and at the end


def test_a_resumed_run_keeps_what_was_seen_before(tmp_path: Path) -> None:
    """It was stopped at step 8 and goes on from a checkpoint of step 5."""
    before = traced(tmp_path, 10, end=8)
    after = traced(tmp_path, 10, begin=5)
    assert after["steps"] == list(range(1, 11))
    for name, tensor in after["tensors"].items():
        assert len(tensor["sizes"]) == 10
        assert tensor["sizes"][:5] == before["tensors"][name]["sizes"][:5]
    assert traced(tmp_path / "..", 10, begin=5)["steps"] == list(range(6, 11))


def test_a_diverged_slope_is_no_number(tmp_path: Path) -> None:
    with mock.patch("to_finetune.training.traces.slopes") as broken:
        broken.return_value = {0: slopes_module.Slope(float("inf"), 1.0, [float("nan")] * 7)}
        found = traced(tmp_path, 1)
    assert found["tensors"]["weight"] == {"sizes": [None], "weight": 1.0, "quantiles": [None] * 7}
    made_run = made(tmp_path / "run")
    (made_run / "slopes.json").write_text((tmp_path / "slopes.json").read_text())
    assert page_of(made_run).wrong == []


# What a run leaves


@pytest.fixture(scope="module")
def finished(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finetune(tmp_path_factory.mktemp("runs") / "diagonal", val_set_size=4, answer_tokens=NEW_TOKENS)
    assert run.code == 0
    return run


def test_a_run_ends_with_its_page(finished: Run) -> None:
    page = Page(finished.folder / "report.html")
    results = finished.record["results"]
    assert page.wrong == []
    assert page.tiles()["held-out loss"] == f"{results['eval_loss']:.4f}"
    assert page.tiles()["steps"] == "4"
    titles = [text for tag, text in page.texts if tag == "h2"]
    expected = ["Curves", "Learned slopes", "What trains", "Answers before and after"]
    assert titles[:4] == expected
    assert titles[-2:] == ["Proofs of engagement", "How to repeat it"]
    assert f"training, {4}: {finished.losses[-1]:.4g}" in page.source


def test_the_slopes_file_is_the_optimizers_state(finished: Run) -> None:
    optimizer, model = finished.trainer.optimizer.optimizer, finished.trainer.model
    content = json.loads((finished.folder / "slopes.json").read_text())
    assert (content["form"], content["grad_scale"], content["steps"]) == ("diagonal", "factored", [1, 2, 3, 4])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert content["tensors"].keys() == trained.keys()
    for name, p in trained.items():
        a, found = optimizer.state[p]["a"], content["tensors"][name]
        assert found["sizes"][-1] == pytest.approx(rms(a), rel=1e-4)
        assert found["weight"] == pytest.approx(rms(p), rel=1e-4)
        assert found["quantiles"] == pytest.approx([a.quantile(q).item() for q in QUANTILES], rel=1e-4, abs=1e-12)


def test_the_parameters_file_names_what_trains(finished: Run, llama: Path) -> None:
    content = json.loads((finished.folder / "parameters.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert content["sizes"] == {name: p.numel() for name, p in model.named_parameters()}
    assert content["trained"] == [name for name in content["sizes"] if name in finished.weights]
    assert len(content["trained"]) == 9


def test_packed_and_sharded_parameters_count_whole(tmp_path: Path) -> None:
    def parameter(**more: Any) -> Any:
        return SimpleNamespace(shape=torch.Size([3]), requires_grad=False, **more)

    packed = parameter(quant_state=SimpleNamespace(shape=torch.Size([4, 6])))
    whole = {"plain": parameter(), "packed": packed, "zero3": parameter(ds_shape=torch.Size([5, 7]))}
    write_parameters(SimpleNamespace(named_parameters=whole.items), tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "parameters.json").read_text())["sizes"] == {"plain": 3, "packed": 24, "zero3": 35}


def test_the_answers_are_the_models(finished: Run, llama: Path) -> None:
    """Each prompt by itself, without padding: the base's before, the trained model's after."""
    content = json.loads((finished.folder / "samples.json").read_text())
    tokenizer, rows = finished.trainer.processing_class, content["rows"]
    assert content["held_out"] is True
    assert len(rows) == 3
    models = {"before": AutoModelForCausalLM.from_pretrained(llama), "after": load_finetuned(finished.folder)[0]}
    for row, example in zip(rows, finished.trainer.eval_dataset, strict=False):
        learned = [label for label in example["labels"] if label != -100]
        prompt = example["input_ids"][: len(example["input_ids"]) - len(learned)]
        assert row["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True).strip()
        assert row["reference"] == tokenizer.decode(learned, skip_special_tokens=True).strip()
        for when, model in models.items():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2)
            new = out[0, len(prompt) :].tolist()
            ended = tokenizer.eos_token_id in new
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            assert row[when] == text + ("" if ended else " …")
    assert any(row["before"] != row["after"] for row in rows)


def test_answers_change_no_training(finetune: Callable[..., Run], finished: Run, tmp_path: Path) -> None:
    with mock.patch("to_finetune.training.traces.SampleAnswers.take"):
        without = finetune(tmp_path / "run", val_set_size=4)
    assert without.losses == finished.losses
    assert_same_bits(without.weights, finished.weights)
    assert not (without.folder / "samples.json").exists()


def test_answers_are_without_dropout(finished: Run, tmp_path: Path) -> None:
    """And the model trains on as it was."""
    model, modes = finished.trainer.model, []
    answers = SampleAnswers(finished.trainer, tmp_path)
    for training in (True, False):
        model.train(training)
        with mock.patch.object(model, "generate", wraps=model.generate) as generate:
            generate.side_effect = lambda **kwargs: modes.append(model.training) or mock.DEFAULT
            answers.take("after")
        assert model.training is training
    assert modes == [False, False]


def test_a_model_that_cannot_answer_still_trains(
    finetune: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch.object(LlamaForCausalLM, "generate", side_effect=RuntimeError("no room")):
        run = finetune(tmp_path / "run", "--bf16", "true", optim="rank_one_to")
    assert run.code == 0
    assert "No sample answers: RuntimeError: no room" in caplog.text
    assert not (run.folder / "samples.json").exists()
    assert "‖u‖‖v‖" in Page(run.folder / "report.html").text


def test_answers_end_where_the_positions_do(
    finetune: Callable[..., Run], llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model that has too few for a whole answer."""
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=300, n_positions=200, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    options = {"unfrozen_parameters": [r"h\.1\."], "max_length": 200, "learning_rate": 0.001}
    run = finetune(tmp_path / "run", model_name_or_path=base, answer_tokens=64, **options)
    assert run.code == 0
    assert "No sample answers" not in caplog.text
    assert (run.folder / "samples.json").exists()


@pytest.mark.parametrize("options", [{"optim": "adamw_torch"}, {"optim_args": "alpha=0"}], ids=["adamw", "alpha 0"])
def test_in_mixed_precision_and_without_slopes(
    finetune: Callable[..., Run], tmp_path: Path, options: dict[str, Any]
) -> None:
    """The trained part in float32 and the frozen one in bfloat16 answer too; training rows where none are held out."""
    run = finetune(tmp_path / "run", bf16=True, **options)
    assert run.code == 0
    assert not (run.folder / "slopes.json").exists()
    samples = json.loads((run.folder / "samples.json").read_text())
    assert samples["held_out"] is False
    assert all(row["after"] for row in samples["rows"])
    assert "To training rows" in Page(run.folder / "report.html").text


def test_prompts_end_where_learning_begins() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, -100, 6]},
        {"input_ids": [1, 2], "labels": [-100, -100]},  # nothing to learn
        {"input_ids": list(range(100)), "labels": list(range(100))},  # a text
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
    ]
    assert list(_prompts(rows)) == [
        ([1, 2], [3, 4]),
        (list(range(32)), list(range(32, 100))),
        ([1], [2, 3]),
    ]


class _Stop(StopOnNonFinite):
    """Ends the run in its third step."""

    how: Callable[[], None]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if args[1].global_step == 2:
            type(self).how()


def _fail() -> None:
    raise RunError("it is no good")


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Stop]]:
    monkeypatch.setattr("to_finetune.finetune.StopOnNonFinite", _Stop)
    return _Stop  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "code", "steps", "sentence"),
    [
        (_fail, 1, "2", "RunError: it is no good"),
        (_interrupt, 128 + signal.SIGTERM, "3", "Stopped by a signal; "),
    ],
    ids=["failed", "interrupted"],
)
def test_a_run_that_does_not_end_leaves_a_page_too(
    finetune: Callable[..., Run],
    tmp_path: Path,
    stop: type[_Stop],
    how: Callable[[], None],
    code: int,
    steps: str,
    sentence: str,
) -> None:
    stop.how = how  # type: ignore[method-assign]
    run = finetune(tmp_path / "run", val_set_size=4)
    assert run.code == code
    page = Page(run.folder / "report.html")
    assert sentence in page.text
    assert page.tiles()["steps"] == steps
    assert page.tiles()["training loss, mean"] == f"{sum(run.losses) / len(run.losses):.4f}"
    assert json.loads((run.folder / "slopes.json").read_text())["steps"] == list(range(1, int(steps) + 1))
    assert ("h4", "before") in page.texts
    assert ("h4", "after") not in page.texts


# The verb


def test_the_verb_writes_where_it_should(run: Path, others: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (beside,) = run.parent.glob("better")
    assert main(["report", str(run)]) == 0
    assert f"{run / 'report.html'} is the page." in capsys.readouterr().out
    assert Page(run / "report.html").tiles()["steps"] == "30"
    assert main(["report", str(run), str(beside)]) == 0
    assert "2 runs side by side" in (run.parent / "comparison.html").read_text()
    assert main(["report", str(run), "--output_file", str(run.parent / "x.html")]) == 0
    assert (run.parent / "x.html").read_text() == (run / "report.html").read_text()
    assert not list(run.parent.rglob("*.partial"))


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["report", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, run.parent / "rum")
    assert error == f"error: {str(run.parent / 'rum')!r} is no folder. Did you mean 'run'?\n"
    assert "is no folder.\n" in refused(capsys, "/nowhere/at/all")
    assert "is no folder." in refused(capsys, run / "run.json")


def test_a_folder_without_a_run_is_refused(run: Path, others: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, run.parent)
    assert "holds no run.json, so it is no run of finetune.py. The runs in it are better, failed, run." in error


def _slopes_text(steps: str, quantiles: str) -> str:
    tensor = f'{{"sizes": [], "weight": 1, "quantiles": {quantiles}}}'
    about = '"form": "diagonal", "grad_scale": null, "sample": 9, "quantiles_at": [0, 1]'
    return f'{{{about}, "steps": {steps}, "tensors": {{"a": {tensor}}}}}'


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("run.json", '{"status": "do', "JSONDecodeError"),
        ("run.json", "[]", "TypeError: a list, not a mapping"),
        ("run.json", '{"status": "done"}', "KeyError: 'command'"),
        ("run.json", '{"status": 3, "command": "x"}', "TypeError: status is no text"),
        ("run.json", '{"status": "done", "command": ""}', "ValueError: command is empty"),
        ("run.json", '{"status": "done", "command": "x", "results": {"eval_loss": "low"}}', "TypeError"),
        ("run.json", '{"status": "done", "command": "x", "proofs": []}', "TypeError: a list, not a mapping"),
        ("run.json", '{"status": "done", "command": "x", "memory": {"planned": {"a": "b"}}}', "ValueError"),
        ("config.yaml", "a: [", "ParserError"),
        ("config.yaml", "just a word", "TypeError: a str, not a mapping"),
        ("trainer_state.json", "{}", "KeyError: 'log_history'"),
        ("trainer_state.json", '{"log_history": 3}', "TypeError"),
        ("parameters.json", '{"sizes": {"a": 1}, "trained": ["b"]}', "what trains is not among the parameters"),
        ("slopes.json", '{"form": "diagonal", "steps": []}', "KeyError: 'tensors'"),
        (
            "slopes.json",
            _slopes_text("[1]", "[]"),
            "not as many sizes as steps",
        ),
        (
            "slopes.json",
            _slopes_text("[]", "[2]"),
            "other quantiles",
        ),
        ("samples.json", '{"held_out": true, "rows": [{}]}', "KeyError: 'prompt'"),
        ("samples.json", b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_damaged_file_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, text: str | bytes, reason: str
) -> None:
    (run / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    error = refused(capsys, run)
    assert error.startswith(f"error: {run / file} is damaged (")
    assert reason in error
    assert ("Without this file the page leaves its part out." in error) == (file != "run.json")
    assert not (run / "report.html").exists()


def test_a_run_is_given_once(run: Path, others: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    again = run.parent / "better" / ".." / "run"
    assert refused(capsys, run, others[0], again) == f"error: {str(again)!r} is given twice: each run once.\n"


def test_a_page_that_cannot_be_written_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"output_file={str(run)!r} is a folder: give the name" in refused(capsys, run, "--output_file", run)
    nowhere = run / "nowhere" / "page.html"
    assert "cannot be written: No such file or directory." in refused(capsys, run, "--output_file", nowhere)
    too_long = run / ("x" * 300)
    assert "cannot be written: File name too long." in refused(capsys, run, "--output_file", too_long)


def test_no_run_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report"])
    assert end.value.code == 2
    assert "RUN" in capsys.readouterr().err
