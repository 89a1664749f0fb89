"""What the README and the recipes say works as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from types import ModuleType
from unittest import mock

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from to_finetune import DiagonalTO
from to_finetune.cli import VERBS, main
from to_finetune.finetune import main as finetune
from to_finetune.training.optimizers import unwrapped

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "scripts" / "benchmarks"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_a_python_block_of_the_readme_runs(
    block: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [0, 5, 6, 7], "labels": [0, 5, 6, 7]}] * 16
    module = ModuleType("block")
    monkeypatch.setitem(sys.modules, "block", module)  # where pickle finds the classes of a block
    names = module.__dict__
    names |= {
        "model": AutoModelForCausalLM.from_pretrained(llama),
        "dataset": Dataset.from_list(rows),
        "preferences": Dataset.from_list([{"prompt": "red", "chosen": " blue", "rejected": " green"}] * 16),
        "tokenizer": AutoTokenizer.from_pretrained(llama),
    }
    exec(block, names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 2
        assert isinstance(unwrapped(names["trainer"].optimizer), DiagonalTO)
    else:
        loss, error = map(float, capsys.readouterr().out.split())
        assert loss < 1e-2  # of a problem that a linear layer solves exactly
        assert error > 0


def test_every_path_that_the_readme_names_is_there() -> None:
    paths = re.findall(r"(?:scripts|configs|to_finetune)/[\w./-]+\w", README)
    missing = sorted({path for path in paths if not (ROOT / path).exists()})
    assert not missing
    assert len(paths) > 10


def test_the_readme_has_every_row_of_the_papers_tables() -> None:
    results = ROOT / "scripts" / "paper" / "results"
    for name in ("table2", "table3", "table6"):
        rows = [line for line in (results / f"{name}.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
        assert len(rows) > 4
        assert [row for row in rows if row not in README] == []


@pytest.mark.parametrize("file", ["step-cpu", "step-nvidia-h200"])
def test_the_tables_of_the_step_are_those_of_the_results(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    assert step.summary(json.loads((BENCHMARKS / f"{file}.json").read_text())) in README


def test_the_tables_of_the_layouts_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import layouts

    assert layouts.table(json.loads((BENCHMARKS / "layouts.json").read_text())["results"]) in README
    assert indent(layouts.scale(), "  ") in README


def test_the_quick_starts_rates_are_those_of_the_results() -> None:
    best: dict[str, float] = {}
    for run in json.loads((BENCHMARKS / "quickstart_rates.json").read_text())["runs"]:
        best[run["optim"]] = min(run["eval_loss"], best.get(run["optim"], 9.0))
    adamw, diagonal, rank_one = (f"{best[name]:.3f}" for name in ("adamw_torch", "diagonal_to", "rank_one_to"))
    said = f"{adamw} (AdamW), {diagonal} (Diagonal TO) and {rank_one} (RankOne TO), each at its best of four rates"
    assert said in " ".join(README.split())


def become(file: str, command: list[str]) -> int:
    """The run that would take this process's place."""
    assert (file, command[:3]) == (sys.executable, [sys.executable, "-m", "to_finetune.finetune"])
    return finetune(command[3:])


def test_the_whole_road_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands one after the other, as they stand there."""
    block = next(block for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) if "generate" in block)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").split("$ ")[1:]]
    assert {words[1] for words in commands[1:]} == VERBS.keys() - {
        "reproduce"
    }  # which has a section, and tests, of its own
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "scripts"):
        os.symlink(ROOT / folder, tmp_path / folder)
    subprocess.run([sys.executable, *commands[0][1:]], check=True, capture_output=True)
    first = next(words for words in commands if words[1] == "train")
    for words in commands[1:]:
        if words is first:  # becomes the run's process; the next one does in this process what that would do
            subprocess.run([sys.executable, "-m", "to_finetune.cli", *words[1:]], check=True, capture_output=True)
        else:
            with mock.patch("os.execvp", become):
                assert main(words[1:]) == 0, shlex.join(words)
    for made in ("subset.yaml", "both.html", "mine/report.html", "mine/hub/README.md", "merged/model.safetensors"):
        assert (tmp_path / "runs" / made).stat().st_size
    for made in ("mine/trained.safetensors", "lora/adapter_model.safetensors", "sweep/sweep.json"):
        assert (tmp_path / "runs" / made).stat().st_size
