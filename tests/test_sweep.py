"""Sweeps: what is searched, which trial is the best, going on after a stop, and Hugging Face's own search."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback

from to_finetune import finetune as finetune_module
from to_finetune.cli import main
from to_finetune.errors import RunError, UsageError
from to_finetune.model import select_trainable
from to_finetune.report.sweep import _top, findings, sweep_table
from to_finetune.training import TOTrainer, TOTrainingArguments
from to_finetune.training import trial as trial_module
from to_finetune.training.optimizers import recommended_learning_rate, unwrapped
from to_finetune.training.sweep import Sweep, _ended, sweep

from .helpers import flags
from .test_trainer import arguments, rows

RATES = ["learning_rate=0.001..0.1"]
Loss = Callable[[dict[str, Any]], float]


@pytest.fixture
def words(llama: Path, alpaca: Path) -> list[str]:
    """The flags of a short run on the last layer, with rows held out."""
    return flags(
        model_name_or_path=llama,
        dataset_name=alpaca,
        unfrozen_parameters=[r"layers\.3\."],
        val_set_size=8,
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials train in this process, which saves the imports; the folders that were trained in."""
    trained = list[str]()

    def finetune(words: Sequence[str], log: Path, on_line: Any) -> int:
        trained.append(log.parent.name)
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            return finetune_module.main(words)

    monkeypatch.setattr(trial_module, "finetune", finetune)
    monkeypatch.setattr("to_finetune.training.traces.NEW_TOKENS", 8)  # as in `helpers.finetune`
    return trained


class Pretence:
    """Trials that train nothing: their loss is a function of what they would have been run with."""

    def __init__(self) -> None:
        self.loss: Loss = lambda values: (math.log(values["learning_rate"] / 0.02)) ** 2 + values.get("seed", 0)
        self.seen: list[dict[str, Any]] = []
        self.stop_after: int | None = None

    def __call__(self, words: Sequence[str], log: Path, on_line: Any) -> int:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        given = {w[2:]: v for w, v in pairwise(words) if w[:2] == "--"}
        options = dict(item.split("=") for item in given.get("optim_args", "").split(",") if item)
        values = {k: float(v) for k, v in {**given, **options}.items() if re.fullmatch(r"-?[\d.]+(e-?\d+)?", v)}
        self.seen.append(values)
        loss = self.loss(values)
        record: dict[str, Any] = {"status": "done", "results": {"eval_loss": loss, "train_seconds": 2.0}}
        if not math.isfinite(loss):
            word = "loss is nan at step 3: the run has diverged." if loss > 0 else "CUDA is out of memory."
            error = f"{'RunError' if loss > 0 else 'OutOfMemoryError'}: {word}"
            # Of an evaluation before, and better than any that ends.
            record = {"status": "failed", "error": error, "results": {"eval_loss": -1.0, "train_loss_mean": math.nan}}
        (log.parent / "run.json").write_text(json.dumps(record))
        return 0 if math.isfinite(loss) else 1


@pytest.fixture
def pretence(monkeypatch: pytest.MonkeyPatch) -> Pretence:
    pretend = Pretence()
    monkeypatch.setattr(trial_module, "finetune", pretend)
    monkeypatch.setattr("to_finetune.report.page.write_report", lambda runs, path: path.write_text(str(len(runs))))
    return pretend


def rates(made: Sweep) -> list[float]:
    return [trial.values["learning_rate"] for trial in made.trials]


def said(made: Sweep) -> str:
    """The table and the sentences as a terminal shows them."""
    console = Console(width=200, file=io.StringIO())
    console.print(sweep_table(made), *findings(made), sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


# Real trials


def test_the_best_is_the_lowest_held_out_loss_of_the_runs(
    words: list[str], tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each trial is a whole run with the rate and the option that it was to have."""
    folder = tmp_path / "sweep"
    search = ["--search", "learning_rate=0.001,0.3", "alpha=0.1,0.9"]
    given = [*words, "--optim_args", "beta=0.2", *search, "--seeds", "3", "42", "--output_dir", str(folder)]
    assert main(["sweep", *given]) == 0
    made = json.loads((folder / "sweep.json").read_text())
    losses = {}
    for trial in made["trials"]:
        config = yaml.safe_load((folder / trial["folder"] / "config.yaml").read_text())
        assert config["learning_rate"] == trial["values"]["learning_rate"]
        assert (config["optim_args"]["alpha"], config["optim_args"]["beta"]) == (trial["values"]["alpha"], 0.2)
        results = json.loads((folder / trial["folder"] / "run.json").read_text())["results"]
        assert (trial["loss"], trial["first_fifth"]) == (results["eval_loss"], results["train_loss_first_fifth"])
        losses[trial["number"]] = trial["loss"]
    assert len(set(losses.values())) == 4
    assert losses[made["best"]] == min(losses.values())

    judged, own = made["judged"]
    name = f"trial-{made['best']:03d}"
    assert own["loss"] == losses[made["best"]]  # 42 is the trials' seed
    assert in_process == [f"trial-00{i}" for i in range(4)] + [f"{name}-seed-3"]
    assert yaml.safe_load((folder / f"{name}-seed-3" / "config.yaml").read_text())["seed"] == 3
    mean = (judged["loss"] + own["loss"]) / 2
    assert made["judged_mean"] == pytest.approx(mean)
    assert made["judged_standard_deviation"] == pytest.approx(abs(judged["loss"] - own["loss"]) / math.sqrt(2))
    best = made["trials"][made["best"]]["values"]
    assert made["best_flags"][-4:] == [
        *("--learning_rate", str(best["learning_rate"])),
        *("--optim_args", f"beta=0.2,alpha={best['alpha']}"),
    ]
    assert f"held-out loss {mean:.4f} ±" in capsys.readouterr().out
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert (folder / "sweep.svg").stat().st_size > 10_000


def test_a_trial_that_diverges_is_a_bad_one_and_not_the_end(
    words: list[str], tmp_path: Path, in_process: list[str]
) -> None:
    made = sweep([*words, "--optim", "sgd"], ["learning_rate=1e30,0.01,1e29"], 3, str(tmp_path / "sweep"))
    assert sorted((t.values["learning_rate"], t.status) for t in made.trials) == [
        (0.01, "done"),
        (1e29, "diverged"),
        (1e30, "diverged"),
    ]
    assert made.best is not None
    assert made.best.values == {"learning_rate": 0.01}
    worst = made.ranking[-1]
    assert worst.loss is None
    assert "diverged" in str(worst.error)
    again = sweep([*words, "--optim", "sgd"], ["learning_rate=1e30,0.01,1e29"], 3, str(tmp_path / "sweep"))
    assert again.trials == made.trials
    assert len(in_process) == 3


def test_without_held_out_data_it_judges_by_the_training_loss_and_says_so(
    words: list[str], tmp_path: Path, in_process: list[str]
) -> None:
    made = sweep([*words, "--val_set_size", "0"], ["learning_rate=0.001,0.1"], 2, str(tmp_path / "sweep"))
    assert made.objective == "train_loss_mean"
    for trial in made.trials:
        record = json.loads((made.folder / trial.folder / "run.json").read_text())
        assert trial.loss == record["results"]["train_loss_mean"]
    assert "Judged by the training loss: give --val_set_size" in said(made)


def test_bad_usage_in_a_trial_ends_the_sweep_with_its_sentence(
    words: list[str], tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And leaves nothing, so that the same command, or another one, can follow."""
    data = tmp_path / "later.jsonl"
    given = ["sweep", *words, "--dataset_name", str(data), "--trials", "2", "--output_dir", str(tmp_path / "sweep")]
    assert main(given) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"error: trial-000: dataset_name='{data}': no such file." in error
    assert in_process == ["trial-000"]
    assert not (tmp_path / "sweep").exists()
    data.write_text(Path(words[words.index("--dataset_name") + 1]).read_text())
    assert main(given) == 0
    assert in_process == ["trial-000", "trial-000", "trial-001"]


def test_bad_usage_later_on_throws_nothing_away(
    words: list[str], tmp_path: Path, pretence: Pretence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sweep that goes on, where its first trial was stopped; and in one that has a trial already."""
    pretence.stop_after = 0
    with pytest.raises(KeyboardInterrupt):
        sweep(words, RATES, 2, str(tmp_path / "stopped"))
    pretence.stop_after = None
    monkeypatch.setattr(trial_module, "finetune", lambda *given: 2 if pretence.seen else pretence(*given))
    with pytest.raises(UsageError, match=r"^trial-001: "):
        sweep(words, RATES, 2, str(tmp_path / "new"))
    with pytest.raises(UsageError, match=r"^trial-000: "):
        sweep(words, RATES, 2, str(tmp_path / "stopped"))
    assert (tmp_path / "new" / "trial-000" / "run.json").exists()
    assert (tmp_path / "stopped" / "sweep.journal").exists()


def test_with_several_gpus_a_trial_takes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with mock.patch("subprocess.Popen", side_effect=FileNotFoundError) as started, pytest.raises(FileNotFoundError):
        trial_module.finetune(["--seed", "1"], tmp_path / "log.txt", lambda line: None)
    assert started.call_args[0][0][1:] == ["-m", "to_finetune.cli", "train", "--seed", "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The trial is a process of its own, which the signal reaches through the sweep alone."""
    steps = 200
    options = {"max_steps": steps, "logging_steps": 10, "trials": 1, "search": RATES, "output_dir": tmp_path / "sweep"}
    command = ["sweep", *words, *flags(**options)]
    log = tmp_path / "sweep" / "trial-000" / "log.txt"
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.05):
            if log.is_file() and "\nstep " in log.read_text():
                os.kill(os.getpid(), number)
                return

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    code = main(command)
    ended.set()
    watcher.join()
    assert code == 128 + number
    assert "interrupted; what is finished is kept" in capsys.readouterr().err
    (checkpoint,) = log.parent.glob("checkpoint-*")
    stopped = int(checkpoint.name.rpartition("-")[2])
    assert 0 < stopped < steps
    assert json.loads((log.parent / "run.json").read_text())["status"] == "interrupted"

    assert main(command) == 0
    record = json.loads((log.parent / "run.json").read_text())
    assert (record["status"], record["results"]["steps"]) == ("done", steps)
    history = json.loads((log.parent / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == sorted({stopped, *range(10, steps + 1, 10)})
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"][0]["values"] == {"learning_rate": 1e-3}
    at = os.stat(log)
    assert main(command) == 0
    assert os.stat(log) == at
    assert "1 of them are there." in capsys.readouterr().out


# Which trials


def test_a_single_range_is_an_even_grid_in_the_logarithm(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    made = sweep(words, RATES, 5, str(tmp_path / "sweep"))
    assert rates(made) == [0.001, 0.00316, 0.01, 0.0316, 0.1]
    assert [values["learning_rate"] for values in pretence.seen] == rates(made)


def test_without_a_search_it_is_the_rate_a_decade_to_each_side(
    words: list[str], llama: Path, tmp_path: Path, pretence: Pretence
) -> None:
    """Of a TO that of the model and what trains of it."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    select_trainable(model, [r"layers\.3\."])
    rate = recommended_learning_rate(model)
    assert rates(sweep(words, trials=3, output_dir=str(tmp_path / "a"))) == pytest.approx(
        [rate / 10, rate, rate * 10], rel=0.01
    )
    given = [*words, "--optim", "adamw_torch", "--learning_rate", "0.002"]
    assert rates(sweep(given, trials=2, output_dir=str(tmp_path / "b"))) == [2e-4, 2e-2]


def test_lists_are_tried_in_every_combination_once(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    search = ["learning_rate=0.01,0.02,0.04", "lora_r=4,8", "grad_scale=rms,none"]
    made = sweep(words, search, 100, str(tmp_path / "sweep"))
    assert made.planned == len(made.trials) == 12
    assert len({tuple(trial.values.values()) for trial in made.trials}) == 12
    assert {trial.values["grad_scale"] for trial in made.trials} == {"rms", None}
    assert sweep(words, search, 5, str(tmp_path / "fewer")).trials == [type(t)(**{**vars(t)}) for t in made.trials[:5]]


def test_several_ranges_spread_first_and_then_close_in(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    """The optimum is found nearer than by the spread alone."""

    def loss(values: dict[str, Any]) -> float:
        return math.log(values["learning_rate"] / 0.02) ** 2 + math.log(values["alpha"] / 0.2) ** 2

    pretence.loss = loss
    made = sweep(words, [*RATES, "alpha=0.03..1"], 40, str(tmp_path / "sweep"))
    assert all(0.001 <= t.values["learning_rate"] <= 0.1 and 0.03 <= t.values["alpha"] <= 1 for t in made.trials)
    spread, rest = made.trials[:20], made.trials[20:]
    quarters = {(t.values["learning_rate"] > 0.01, t.values["alpha"] > math.sqrt(0.03)) for t in spread[:4]}
    assert len(quarters) == 4
    assert sum(loss(t.values) for t in rest) < 0.5 * sum(loss(t.values) for t in spread)
    assert made.best in rest


def test_a_list_beside_a_range_is_spread_as_well(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    made = sweep(words, [*RATES, "alpha=0.1,0.3"], 8, str(tmp_path / "sweep"))
    assert {trial.values["alpha"] for trial in made.trials[:4]} == {0.1, 0.3}
    assert "Sensitivity: not known, the trials differ in more than the rate" in said(made)


def test_whole_numbers_stay_whole(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    pretence.loss = lambda values: values["gradient_accumulation_steps"]
    made = sweep(words, ["gradient_accumulation_steps=1..4"], 9, str(tmp_path / "few"))
    assert sorted(trial.values["gradient_accumulation_steps"] for trial in made.trials) == [1, 2, 3, 4]
    made = sweep(words, ["gradient_accumulation_steps=1..64"], 4, str(tmp_path / "many"))
    assert [trial.values["gradient_accumulation_steps"] for trial in made.trials] == [1, 4, 16, 64]
    assert made.best_flags[-2:] == ["--gradient_accumulation_steps", "1"]
    assert made.edges() == {"gradient_accumulation_steps": "1..8"}


# Going on


def test_it_goes_on_with_the_trials_that_it_would_have_had(
    words: list[str], tmp_path: Path, pretence: Pretence
) -> None:
    search = [*RATES, "alpha=0.03..1"]
    whole = sweep(words, search, 8, str(tmp_path / "whole"))
    pretence.seen.clear()
    for stop in (3, 6, None):
        pretence.stop_after = stop
        if stop:
            with pytest.raises(KeyboardInterrupt):
                sweep(words, search, 8, str(tmp_path / "parts"))
        else:
            parts = sweep(words, search, 8, str(tmp_path / "parts"))
    assert [trial.values for trial in parts.trials] == [trial.values for trial in whole.trials]
    assert len(pretence.seen) == 8
    assert parts.to_json() == whole.to_json()


def test_more_trials_and_seeds_go_on_from_what_is_there(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    folder = str(tmp_path / "sweep")
    first = sweep(words, RATES, 4, folder)
    more = sweep(words, RATES, 7, folder, seeds=[1, 2, 3])
    assert more.trials[:4] == first.trials
    assert len(pretence.seen) == 7 + 3
    assert more.best is not None
    assert more.judgement() == (pytest.approx(more.best.loss + 2), pytest.approx(1.0))
    sweep(words, RATES, 7, folder, seeds=[3, 1])
    assert len(pretence.seen) == 10


def test_a_trial_that_failed_begins_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """finetune.py would refuse one that holds a run."""
    found: list[Path] = []

    def finetune(words: Sequence[str], log: Path, on_line: Any) -> int:
        found.extend(log.parent.iterdir())
        return 1

    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "run.json").write_text('{"status": "failed"}')
    monkeypatch.setattr(trial_module, "finetune", finetune)
    assert trial_module.train(tmp_path / "trial", [], print) == {}
    assert found == []


def test_a_folder_of_another_sweep_is_refused_with_what_differs(
    words: list[str], tmp_path: Path, pretence: Pretence
) -> None:
    folder = str(tmp_path / "sweep")
    sweep(words, RATES, 1, folder)
    with pytest.raises(UsageError) as refused:
        sweep([*words, "--max_steps", "7", "--optim_args", "beta=0.5"], ["learning_rate=0.001..0.2"], 1, folder)
    sentence = str(refused.value)
    assert "holds another sweep" in sentence
    assert "max_steps=6, now 7" in sentence
    assert "'0.001..0.1'}, now {'learning_rate': '0.001..0.2'}" in sentence
    assert "optim_args" in sentence
    assert "val_set_size" not in sentence
    assert len(pretence.seen) == 1


# What it says


@pytest.mark.parametrize(
    ("at", "next_range"), [(1e-9, "0.0001..0.01"), (1.0, "0.01..1"), (0.01, None)], ids=["low", "high", "inside"]
)
def test_a_winner_at_an_end_of_its_range_is_said_with_the_range_to_search_next(
    words: list[str], tmp_path: Path, pretence: Pretence, at: float, next_range: str | None
) -> None:
    pretence.loss = lambda values: abs(math.log(values["learning_rate"] / at))
    made = sweep(words, RATES, 5, str(tmp_path / "sweep"))
    assert made.edges() == ({"learning_rate": next_range} if next_range else {})
    assert ("is at an end of its range" in said(made)) == bool(next_range)
    assert next_range is None or f"search learning_rate={next_range} next" in said(made)


def test_no_range_is_proposed_that_would_be_refused(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    """beta is at most 1."""
    pretence.loss = lambda values: -values["beta"]
    made = sweep(words, ["beta=0.1..0.9"], 3, str(tmp_path / "sweep"))
    assert made.edges() == {"beta": None}
    assert "beta, 0.9, is at an end of its range: finetune.py takes nothing as far beyond it" in said(made)


def test_the_sensitivity_is_interpolated_between_trials(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    """In the logarithm: here the loss is linear in it on each side, so that it is exact."""
    pretence.loss = lambda values: 2 + abs(math.log(values["learning_rate"] / 0.01))
    made = sweep(words, RATES, 5, str(tmp_path / "sweep"))
    assert made.loss_at(1) == 2
    assert made.loss_at(1 / 3) == pytest.approx(2 + math.log(3), abs=2e-3)  # the grid is rounded
    assert made.loss_at(3) == pytest.approx(2 + math.log(3), abs=2e-3)
    assert made.loss_at(20) is None
    assert "2.0000 at the best rate, 3.09" in said(made)
    assert "interpolated between trials, not measured" in said(made)
    pretence.loss = lambda values: math.inf if values["learning_rate"] > 0.02 else 2.0 - values["learning_rate"]
    made = sweep(words, RATES, 5, str(tmp_path / "other"))
    assert made.loss_at(3) == math.inf
    assert "diverges at three times it" in said(made)
    assert made.to_json()["interpolated_loss_at_three_times_the_best_rate"] == "diverges"
    made = sweep(words, [*RATES, "alpha=0.1,0.3"], 3, str(tmp_path / "two"))
    assert made.loss_at(3) is None


def test_three_failures_in_a_row_end_it_and_are_tried_again(
    words: list[str], tmp_path: Path, pretence: Pretence
) -> None:
    """A failure says nothing about the rates: out of memory, here."""
    folder = str(tmp_path / "sweep")
    pretence.loss = lambda values: -math.inf
    with pytest.raises(RunError, match="3 trials in a row failed, trial-002 last: OutOfMemoryError"):
        sweep(words, RATES, 5, folder)
    assert len(pretence.seen) == 3
    pretence.loss = lambda values: values["learning_rate"]
    made = sweep(words, RATES, 5, folder)
    assert rates(made) == [0.001, 0.00316, 0.01, 0.0316, 0.1]
    assert {trial.status for trial in made.trials} == {"done"}


def test_single_failures_are_left_for_the_same_command(
    words: list[str], tmp_path: Path, pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", *words, "--search", *RATES, "--trials", "3", "--output_dir", str(tmp_path / "sweep")]
    pretence.loss = lambda values: -math.inf if values["learning_rate"] == 0.01 else values["learning_rate"]
    assert main(command) == 1
    assert "Failed: trial-001, see log.txt there." in capsys.readouterr().out
    pretence.loss = lambda values: values["learning_rate"]
    assert main(command) == 0
    assert [values["learning_rate"] for values in pretence.seen] == [0.001, 0.01, 0.1, 0.01]


def test_failures_that_are_not_in_a_row_do_not_end_it(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    pretence.loss = lambda values: -math.inf if len(pretence.seen) % 2 else values["learning_rate"]
    made = sweep(words, RATES, 6, str(tmp_path / "sweep"))
    assert [trial.status for trial in made.trials] == ["failed", "done"] * 3


def test_weights_that_are_not_finite_have_diverged(tmp_path: Path) -> None:
    (tmp_path / "trial-000").mkdir()
    made: Any = SimpleNamespace(folder=tmp_path)
    for error, status in (("2 trained tensors are not finite, a first", "diverged"), ("No weight moved", "failed")):
        (tmp_path / "trial-000" / "run.json").write_text(json.dumps({"error": f"RunError: {error}"}))
        assert _ended(made, 0, {}, "trial-000", None).status == status


def test_where_all_diverge_there_is_no_best(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    pretence.loss = lambda values: math.inf
    with pytest.raises(RunError, match="None of 2 trials has a loss; trial-000: RunError: loss is nan"):
        sweep(words, RATES, 2, str(tmp_path / "sweep"))


def test_the_table_has_the_best_first_and_marked(words: list[str], tmp_path: Path, pretence: Pretence) -> None:
    pretence.loss = lambda values: math.inf if values["learning_rate"] == 0.1 else 1 / values["learning_rate"]
    lines = said(sweep(words, RATES, 5, str(tmp_path / "sweep"))).splitlines()
    trials = [re.findall(r"trial-\d+", line)[0] for line in lines if "trial-" in line]
    assert trials == ["trial-003", "trial-002", "trial-001", "trial-000", "trial-004"]
    assert [line for line in lines if "★" in line] == [line for line in lines if "trial-003" in line]
    assert "31.6456" in lines[4]
    assert "diverged" in next(line for line in lines if "trial-004" in line)


def test_a_loss_far_above_most_does_not_press_the_others_flat() -> None:
    assert _top([50.0, 1.1, 1.0, 1.2]) == pytest.approx(1 + 6 * 0.2)


def test_a_token_is_written_and_shown_nowhere(
    words: list[str], tmp_path: Path, pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    given = ["--hub_token", "hf_secret", "--search", *RATES, "--trials", "2", "--output_dir", str(folder)]
    assert main(["sweep", *words, *given]) == 0
    shown = capsys.readouterr().out
    assert "--hub_token '***'" in shown
    assert "hf_secret" not in shown
    assert [file for file in folder.rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()] == []


# What is refused


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--search", "learning_rte=1e-3..1"], ["'learning_rte' is not known", "'learning_rate'"]),
        (["--search", "lr=1e-3..1"], ["'lr' is not known", "'learning_rate'"]),
        (["--search", "alhpa=0.1..1"], ["'alhpa' is not known", "'alpha'"]),
        (["--search", "alpha=0.1..1", "--optim", "adamw_torch"], ["'alpha' is not known", "flag that is a number"]),
        (["--search", "dataset_name=a,b"], ["'dataset_name' is not known", "flag that is a number"]),
        (["--search", "bf16=true,false"], ["'bf16' is not known"]),
        (["--search", "seed=1,2,3"], ["seed is not searched", "--seeds"]),
        (["--search", "data_seed=1,2,3"], ["data_seed is not searched", "--seeds"]),
        (["--search", "val_set_size=4,8"], ["val_set_size is not searched", "other rows"]),
        (["--push_to_hub", "true"], ["push_to_hub is not taken here"]),
        (["--search", "learning_rate"], ["'learning_rate' is neither a range, key=low..high, nor a list"]),
        (["--search", "learning_rate="], ["'learning_rate=' is neither a range"]),
        (["--search", "learning_rate=1e-1..1e-3"], ["low end must be below", "'learning_rate=0.001..0.1'"]),
        (["--search", "learning_rate=0.1..0.1"], ["low end must be below"]),
        (["--search", "alpha=0..1"], ["alpha=0..1 is in log scale", "above 0", "alpha=0,0.1,1"]),
        (["--search", "learning_rate=-1..1"], ["log scale", "above 0"]),
        (["--search", "learning_rate=a..b"], ["learning_rate=a..b is not a range", "two numbers"]),
        (["--search", "learning_rate=1..2..3"], ["is not a range"]),
        (["--search", "learning_rate=1e-3..inf"], ["is not a range"]),
        (["--search", "learning_rate=0.1"], ["is one value", "low..high"]),
        (["--search", "learning_rate=0.1,0.1"], ["is one value"]),
        (["--search", "learning_rate=0.1,fast"], ["'fast' is not a number"]),
        (["--search", "lora_r=4,8.5"], ["8.5 is not a whole number"]),
        (["--search", "lora_r=4.5..8"], ["lora_r takes whole numbers"]),
        (["--search", "grad_scale=1..2"], ["grad_scale is no number", "grad_scale=a,b,c"]),
        (["--search", "schedule=constant,thoerem"], ["schedule=thoerem cannot be run", "theorem"]),
        (["--search", "beta=0.5..3"], ["beta=3.0 cannot be run", "between 0 and 1"]),
        (["--search", "per_device_train_batch_size=0,8"], ["per_device_train_batch_size=0", "at least 1"]),
        (["--search", "alpha=0.1,1", "alpha=0.1..1"], ["alpha is given twice"]),
        (["--trials", "0"], ["trials=0 is not valid: at least 1"]),
        (["--trials", "-3"], ["trials=-3"]),
        (["--seeds", "-1"], ["seeds: -1 is not valid: 0 to 4294967295"]),
        (["--seeds", "5", "6", "5"], ["seeds: 5 is given twice"]),
        (["--optim", "diagonel_to"], ["optim='diagonel_to'", "'diagonal_to'"]),
        (["--learning_rate", "0"], ["learning_rate=0.0 has no range around it", "--search"]),
        (["--learning_rte", "0.1"], ["Unknown flag 'learning_rte'", "'learning_rate'"]),
        (["--resume_from_checkpoint", "true"], ["resume_from_checkpoint is not taken here", "resumes the sweep"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if value and value[0].startswith("--") else "",
)
def test_what_is_refused(
    words: list[str],
    tmp_path: Path,
    pretence: Pretence,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    named: list[str],
) -> None:
    folder = tmp_path / "sweep"
    assert main(["sweep", *words, "--output_dir", str(folder), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert [part for part in named if part not in error] == []
    assert len(error) < 700
    assert not folder.exists()
    assert pretence.seen == []


def test_a_folder_below_a_file_is_refused(
    words: list[str], alpaca: Path, pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *words, "--output_dir", f"{alpaca}/sweep"]) == 2
    assert f"output_dir: '{alpaca}' is no folder that can be written to." in capsys.readouterr().err
    assert pretence.seen == []


def test_a_folder_that_holds_something_else_is_refused(
    words: list[str], tmp_path: Path, pretence: Pretence, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        assert main(["sweep", *words, "--output_dir", str(folder)]) == 2
        assert f"output_dir='{folder}' holds something else than a sweep." in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_without_optuna_it_says_what_to_install(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("training.search", "training.sweep", "report.sweep"):
        monkeypatch.delitem(sys.modules, f"to_finetune.{name}")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", *words, "--output_dir", str(tmp_path / "sweep")]) == 2
    assert capsys.readouterr().err == 'error: sweep needs optuna: pip install "to-finetune[sweep]"\n'


# Hugging Face's own search


def test_hyperparameter_search_reaches_the_live_optimizer(llama: Path, tmp_path: Path) -> None:
    """The rate and the options of each trial; and each training has its own proofs."""
    live: list[tuple[float, float, float]] = []
    asked: list[tuple[float, float]] = []

    def model_init(trial: Any = None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(llama)
        select_trainable(model, [r"layers\.3\."])
        return model

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert "never_moved" not in trainer.engagement.proofs
            for group in unwrapped(kwargs["optimizer"]).param_groups:
                live.append((group["lr"], group["alpha"], group["beta"]))

    def hp_space(trial: Any) -> dict[str, Any]:
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        alpha = trial.suggest_float("alpha", 0.03, 1.0, log=True)
        asked.append((rate, alpha))
        return {"learning_rate": rate, "optim_args": f"alpha={alpha},beta=0.2"}

    args = arguments(TOTrainingArguments, tmp_path, optim="diagonal_to", max_steps=2)
    trainer = TOTrainer(args=args, model_init=model_init, train_dataset=rows(), eval_dataset=rows(8))
    trainer.add_callback(Look())
    best = trainer.hyperparameter_search(hp_space, n_trials=2, backend="optuna", direction="minimize")
    assert len(set(asked)) == 2
    assert live == [(*values, 0.2) for values in asked for _ in range(2)]  # two parameter groups
    assert (best.hyperparameters["learning_rate"], best.hyperparameters["alpha"]) in asked
    assert trainer.engagement.proofs["moved_after_first_step"] == 9


def test_a_sweep_that_is_running_is_left_alone(words: list[str], pretence: Pretence, tmp_path: Path) -> None:
    refused = list[str]()

    def begin_again(made: Sweep) -> None:
        if not refused:
            with pytest.raises(UsageError, match="holds a sweep that is running") as raised:
                sweep(words, RATES, 3, str(tmp_path / "sweep"))
            refused.append(str(raised.value))

    made = sweep(words, RATES, 3, str(tmp_path / "sweep"), on_trial=begin_again)
    assert refused
    assert len(made.trials) == 3
    assert len(sweep(words, RATES, 4, str(tmp_path / "sweep")).trials) == 4  # and is free again at its end
