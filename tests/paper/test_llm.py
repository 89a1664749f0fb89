"""`to-finetune reproduce table6`: all trainings are finetune.py's, with the options asked for; none is made twice."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from to_finetune.errors import RunError, UsageError
from to_finetune.paper import llm
from to_finetune.paper.llm import FULL, METHODS, QUICK, Finetune, finetune_process, flags, train
from to_finetune.paper.tuning import DIGITS, rounded
from to_finetune.training.parser import parse_arguments

EXACT = ("momentum", "diagonal_to", "rank_one_to")
OURS = ("momentum_ours", "diagonal_to_ours", "rank_one_to_ours")
TRIAL = {"lr": 0.004, "schedule": "constant"}


class QuickRun(NamedTuple):
    folder: Path
    result: dict[str, Any]
    lines: list[str]  # of progress


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    """A whole quick run. Treat its folder as read-only."""
    folder, lines = tmp_path_factory.mktemp("llm") / "new", []
    return QuickRun(folder, llm.run(None, folder, True, lines.append), lines)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of training, every training diverges; the flags of all that would have been."""
    all_flags: list[list[str]] = []

    def diverge(finetune: Finetune, flags: list[str], points: list[int]) -> list[float]:
        all_flags.append(flags)
        return [math.inf] * len(points)

    @contextmanager
    def no_process(log: Path, stand_ins: Path | None) -> Iterator[None]:
        yield None

    monkeypatch.setattr(llm, "train", diverge)
    monkeypatch.setattr(llm, "finetune_process", no_process)
    return all_flags


def test_a_quick_run_has_the_form_of_a_contest(quick_run: QuickRun) -> None:
    """JSON; one trial a method, whose losses fall from where all begin."""
    result = json.loads(json.dumps(quick_run.result))
    assert result["case"]["name"] == "llm"
    assert result["case"]["dataset"] == "alpaca"
    assert result["protocol"]["name"] == "quick"
    assert result["steps"] == [0, 1, 2]
    assert list(result["methods"]) == ["adam", *EXACT, *OURS]
    for found in result["methods"].values():
        assert (found["trials"], found["diverged"], found["widened"], len(found["lrs"])) == (1, 0, 0, 1)
        assert set(found["winners"]) == set(found["curves"]) == {"minimum", "area"}
        (curve,) = found["curves"]["minimum"]
        assert len(curve) == 3
        assert curve[0] == result["methods"]["adam"]["curves"]["minimum"][0][0]
        assert curve[2] < curve[0]
    assert result["methods"]["rank_one_to_ours"]["winners"]["area"] == {
        "lr": 0.008,
        "schedule": "constant",
        "alpha": 0.3,
        "beta": 0.1,
    }
    assert len(quick_run.lines) == len(METHODS)


def test_the_methods_differ(quick_run: QuickRun) -> None:
    """No two take the same steps, but for a slope that is nothing yet for weights of about 0.02."""
    ends = {name: found["curves"]["area"][0][-1] for name, found in quick_run.result["methods"].items()}
    assert len(set(ends.values())) >= len(ends) - 2, ends


def test_what_is_finished_is_not_repeated(quick_run: QuickRun, trained: list[list[str]]) -> None:
    assert llm.run(None, quick_run.folder, True, print) == quick_run.result
    assert not trained


def test_a_line_that_broke_off_is_trained_again(quick_run: QuickRun, trained: list[list[str]], tmp_path: Path) -> None:
    """And the file is whole afterwards. A training that diverged is null."""
    text = (quick_run.folder / "llm.jsonl").read_text()
    path = tmp_path / "llm.jsonl"
    path.write_text(text[:-20])
    result = llm.run(None, tmp_path, True, print)
    (again,) = trained
    assert "rank_one_to" in again
    lines = path.read_text().splitlines()
    assert lines[:-1] == text.splitlines()[:-1]
    assert json.loads(lines[-1])["losses"] == [None, None, None]
    found = result["methods"]["rank_one_to_ours"]
    assert found["diverged"] == 1
    assert found["curves"] == {"minimum": [], "area": []}
    assert llm.run(None, tmp_path, True, print) == result
    assert len(trained) == 1


def test_another_protocols_trainings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "llm.jsonl").write_text('{"steps": 1}\n')
    with pytest.raises(UsageError, match=r"llm\.jsonl has trainings of another protocol: move it away\."):
        llm.run(None, tmp_path, True, print)


@pytest.mark.parametrize("have", [None, [], ["stories260k/config.json"], ["alpaca_data.json"]])
def test_missing_data_are_named(have: list[str] | None, tmp_path: Path) -> None:
    """And no file is left behind."""
    for name in have or []:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"--data_dir with a folder stories260k .* and alpaca_data\.json .*; it is"):
        llm.run(None if have is None else tmp_path, tmp_path / "results", False, print)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("schedule", FULL.schedules)
@pytest.mark.parametrize("name", METHODS)
def test_finetune_understands_the_flags(name: str, schedule: str) -> None:
    method = METHODS[name]
    trial = {"lr": 0.5, "schedule": schedule, **method.own}
    words = flags(method, trial, 3, FULL, Path("some folder"))
    model, data, args = parse_arguments([*words, "--output_dir", "new"])
    assert model.unfrozen_parameters == [r"layers\.(3|4)\."]
    assert (model.model_name_or_path, model.dtype) == (str(Path("some folder/stories260k")), "float32")
    assert (data.dataset_train_split, data.dataset_test_split) == ("train[:640]", "train[:64]")
    assert (args.max_steps, args.per_device_train_batch_size, args.max_length) == (80, 8, 256)
    assert (args.learning_rate, args.lr_scheduler_type, args.seed, args.data_seed) == (0.5, schedule, 3, None)
    assert (args.max_grad_norm, args.weight_decay, args.bf16, args.use_cpu) == (0, 0, False, True)
    assert args.eval_on_start
    assert [args.eval_steps * i for i in range(6)] == FULL.points
    if name == "adam":
        assert args.optim == "adamw_torch"
        return
    options = {"gamma_max": 1.0, "scope": "tensor", **args.to_options}
    assert args.optim == ("rank_one_to" if "rank_one" in name else "diagonal_to")
    assert {rate: options[rate] for rate in ("alpha", "beta")} == method.own
    assert (options["alpha"] == 0) == ("momentum" in name)
    assert options["gamma_max"] == (None if name in EXACT else 1.0)
    assert options["relative_alpha"] == (name in OURS)
    assert options["grad_scale"] == ("rms" if name in OURS else None)
    assert options["scope"] == ("group" if "rank_one" in name else "tensor")


def test_a_diverging_training_is_told_from_a_failing_one(quick_run: QuickRun, tmp_path: Path) -> None:
    """In one process, which outlives both: what it trains then ends as in a new one."""
    with finetune_process(tmp_path / "log", stand_ins=tmp_path) as finetune:
        diverging = flags(METHODS["adam"], {**TRIAL, "lr": 1e30}, 0, QUICK, tmp_path)
        assert train(finetune, diverging, [0, 1, 2]) == [math.inf] * 3
        with pytest.raises(RunError, match=r"finetune\.py failed.*dataset_name='.*elsewhere.*': no such file"):
            train(finetune, [*diverging, "--dataset_name", "elsewhere/data.json"], [0, 1, 2])
        after_both = train(finetune, flags(METHODS["adam"], TRIAL, 0, QUICK, tmp_path), [0, 1, 2])
    assert [rounded(after_both, DIGITS)] == quick_run.result["methods"]["adam"]["curves"]["area"]


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "WORKER", "import sys; sys.stdin.readline(); sys.exit('no such library')")
    with (
        finetune_process(tmp_path / "log", stand_ins=None) as finetune,
        pytest.raises(RunError, match=r"has died, its last line in log is: no such library"),
    ):
        train(finetune, [], [])


def test_a_process_that_has_died_before_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "WORKER", "import sys; sys.exit('gone')")
    with finetune_process(tmp_path / "log", stand_ins=None) as finetune:
        while "gone" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        time.sleep(0.1)  # until its end of the pipe is closed
        with pytest.raises(RunError, match="has died"):
            train(finetune, ["x" * 100_000], [])


def test_a_process_that_dies_has_not_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the last that it said was of a training that had."""
    worker = "import sys; sys.stdin.readline(); sys.exit('the run has diverged')"
    monkeypatch.setattr(llm, "WORKER", worker)
    with finetune_process(tmp_path / "log", stand_ins=None) as finetune, pytest.raises(RunError, match="has died"):
        train(finetune, [], [])
