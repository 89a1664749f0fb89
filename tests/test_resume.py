"""An interrupted run saves a checkpoint, says so, and goes on to the uninterrupted run's weights, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch.distributed import ReduceOp
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from to_finetune.errors import RunError, UsageError
from to_finetune.model import save_trained, select_trainable
from to_finetune.training.callbacks import SaveOnSignal, StopOnNonFinite
from to_finetune.training.record import RunRecord, resume_point

from .helpers import Run, assert_same_bits

Finetune = Callable[..., Run]
STEPS = 8  # of 4 rows, from 24: the data come round after step 6


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which makes them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(finetune: Finetune, folder: Path, *signals: signal.Signals, **options: Any) -> Run:
    """A run that gets `signals` in the middle of its fourth step."""

    class Interrupt(StopOnNonFinite):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step == 3:
                for number in signals:
                    os.kill(os.getpid(), number)

    with mock.patch("to_finetune.finetune.StopOnNonFinite", Interrupt):
        return finetune(folder, max_steps=STEPS, **options)


@pytest.fixture(scope="module")
def stopped(finetune: Finetune, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was interrupted and has not gone on."""
    return interrupted(finetune, tmp_path_factory.mktemp("runs") / "stopped", signal.SIGINT)


@pytest.mark.parametrize(
    ("optim", "number", "unfrozen_parameters"),
    [
        ("diagonal_to", signal.SIGINT, r"layers\.3\."),
        ("rank_one_to", signal.SIGTERM, r"layers\.3\."),
        ("full_to", signal.SIGINT, r"^model\.norm\.weight$"),
        ("adamw_torch", signal.SIGTERM, r"layers\.3\."),
    ],
)
def test_an_interrupted_run_ends_in_the_uninterrupted_ones_weights(
    finetune: Finetune, tmp_path: Path, optim: str, number: signal.Signals, unfrozen_parameters: str
) -> None:
    options: dict[str, Any] = {"optim": optim, "unfrozen_parameters": [unfrozen_parameters], "warmup_steps": 2}
    whole = finetune(tmp_path / "whole", max_steps=STEPS, **options)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    first = interrupted(finetune, tmp_path / "parts", number, **options)
    assert first.code == 128 + number
    assert first.record["status"] == "interrupted"
    assert first.record["checkpoint"] == str(first.folder / "checkpoint-4")
    assert not (first.folder / "trained.safetensors").exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers

    second = finetune(tmp_path / "parts", max_steps=STEPS, resume_from_checkpoint=True, **options)
    assert second.code == 0
    assert second.record["status"] == "done"
    assert second.losses == whole.losses
    assert_same_bits(second.weights, whole.weights)


def test_a_finished_run_that_is_resumed_stays_what_it_is(finetune: Finetune, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4}
    run = finetune(tmp_path / "run", **options)
    before = run.weights
    again = finetune(tmp_path / "run", resume_from_checkpoint=True, **options)
    assert again.code == 0
    assert again.record["results"]["steps"] == 4
    assert_same_bits(again.weights, before)
    assert not (run.folder / "checkpoint-5").exists()


def test_a_damaged_record_is_written_anew(finetune: Finetune, tmp_path: Path) -> None:
    run = interrupted(finetune, tmp_path / "run", signal.SIGTERM)
    (run.folder / "run.json").write_text('{"status": ')
    assert finetune(run.folder, max_steps=STEPS, resume_from_checkpoint=True).record["status"] == "done"


def test_a_signal_does_not_cut_the_record_of_a_failed_run_short(finetune: Finetune, tmp_path: Path) -> None:
    """As torchrun's, when another process has died."""
    from to_finetune.finetune import conclude

    def killed(*args: Any, **outcome: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        conclude(*args, **outcome)

    with mock.patch("to_finetune.finetune.conclude", killed):
        run = finetune(tmp_path / "run", optim="sgd", learning_rate=1e30, max_steps=STEPS)
    assert run.code == 1
    assert "diverged" in run.record["error"]
    assert (run.folder / "report.html").exists()


@pytest.mark.parametrize("optim", ["diagonal_to", "adamw_torch"])
def test_a_longer_run_goes_on_at_its_own_schedules_rates(finetune: Finetune, tmp_path: Path, optim: str) -> None:
    """The first step too: a finished run has ended at a rate of zero."""
    options: dict[str, Any] = {"optim": optim, "learning_rate": 0.01, "lr_scheduler_type": "linear", "seed": 3}
    finetune(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=4, **options)
    used = list[float]()
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    longer = finetune(tmp_path / "run", max_steps=8, resume_from_checkpoint=True, **options)
    hook.remove()
    assert longer.trainer is not None
    logged = [row["learning_rate"] for row in longer.trainer.state.log_history if "learning_rate" in row][4:]
    assert used[-4:] == logged == pytest.approx([0.01 * (8 - step) / 8 for step in range(4, 8)])


@pytest.mark.parametrize("saved", [None, "checkpoint-1", "trained.safetensors"])
def test_a_run_that_failed_before_it_saved_anything_leaves_its_folder_free(
    finetune: Finetune, tmp_path: Path, saved: str | None
) -> None:
    with mock.patch("to_finetune.finetune.finish", side_effect=RunError("a disk is full")):
        failed = finetune(tmp_path / "run")
    assert failed.code == 1
    assert (failed.folder / "slopes.json").exists()
    if saved:
        (failed.folder / saved).mkdir()
    again = finetune(tmp_path / "run", optim="sgd", learning_rate=0.01)
    assert (again.code, again.record["status"]) == ((2, "failed") if saved else (0, "done"))
    assert (again.folder / "slopes.json").exists() == bool(saved), "the failed run's slopes are taken for this one's"


def test_the_time_before_a_resume_counts(finetune: Finetune, tmp_path: Path) -> None:
    interrupted(finetune, tmp_path / "run", signal.SIGTERM)
    path = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"]["WholeRuntime"]["attributes"]["seconds"] > 0
    state["stateful_callbacks"]["WholeRuntime"]["attributes"]["seconds"] = 5000.0
    path.write_text(json.dumps(state))
    again = finetune(tmp_path / "run", max_steps=STEPS, resume_from_checkpoint=True)
    assert 5000 < again.record["results"]["train_seconds"] < 9000

    del state["stateful_callbacks"]["WholeRuntime"]  # a checkpoint of an earlier version
    path.write_text(json.dumps(state))
    options = {"max_steps": STEPS, "resume_from_checkpoint": path.parent, "save_strategy": "steps", "save_steps": 6}
    assert finetune(tmp_path / "again", **options).record["results"]["train_seconds"] < 5000


def test_the_losses_before_a_resume_count(finetune: Finetune, tmp_path: Path) -> None:
    """Also those since the last log, and a step of an epoch's end."""
    options: dict[str, Any] = {"logging_steps": 7, "max_steps": STEPS}
    whole = finetune(tmp_path / "whole", **options)
    interrupted(finetune, tmp_path / "parts", signal.SIGTERM, logging_steps=7)
    again = finetune(tmp_path / "parts", resume_from_checkpoint=True, **options)
    wanted = whole.record["results"]["train_loss_mean"]
    assert again.record["results"]["train_loss_mean"] == pytest.approx(wanted, rel=1e-6)


def test_what_a_step_takes_must_be_as_it_was(
    finetune: Finetune, stopped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else rows would be skipped, or seen twice; the batch of a process may be another."""
    folder = tmp_path / "run"
    shutil.copytree(stopped.folder, folder)
    options: dict[str, Any] = {"max_steps": STEPS, "resume_from_checkpoint": True}
    assert finetune(folder, gradient_accumulation_steps=2, **options).code == 2
    assert "had 4 rows a step (batch size x accumulation x processes), now 8." in capsys.readouterr().err
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert finetune(folder, **halves, **options).code == 0


def test_a_checkpoint_of_the_weights_alone_is_not_gone_on_from(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tmp_path / "run", save_only_model=True, save_strategy="steps", save_steps=2)
    assert finetune(tmp_path / "run", max_steps=STEPS, resume_from_checkpoint=True).code == 2
    assert "checkpoint-4' cannot be resumed from: it has no optimizer's state" in capsys.readouterr().err


def test_a_resumed_run_saves_and_evaluates_as_often_as_it_is_told(finetune: Finetune, tmp_path: Path) -> None:
    """Not as often as the run that it goes on from."""
    finetune(tmp_path / "run", save_strategy="steps", save_steps=4, val_set_size=4)
    now = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    run = finetune(tmp_path / "run", max_steps=STEPS, val_set_size=4, resume_from_checkpoint=True, **now)
    assert run.code == 0
    assert all((run.folder / f"checkpoint-{step}").is_dir() for step in range(4, STEPS + 1))
    assert [row["step"] for row in run.trainer.state.log_history if "eval_loss" in row] == [6, 8]


def test_an_earlier_checkpoint_is_not_gone_on_from_beside_later_ones(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next resume would take the last of them, which is of the run that was left."""
    options = {"save_strategy": "steps", "save_steps": 2}
    run = finetune(tmp_path / "run", **options)
    early = {"resume_from_checkpoint": run.folder / "checkpoint-2", **options}
    assert finetune(run.folder, **early).code == 2
    assert f"holds a later one, '{run.folder}/checkpoint-4'" in capsys.readouterr().err
    shutil.rmtree(run.folder / "checkpoint-4")
    assert finetune(run.folder, **early).code == 0


def test_a_subsets_file_that_has_changed_is_noticed(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's config.yaml has what stood in it."""
    subset = tmp_path / "subset.yaml"
    subset.write_text("unfrozen_parameters:\n- layers\\.3\\.\n")
    options: dict[str, Any] = {"unfrozen_parameters": [str(subset)]}
    run = interrupted(finetune, tmp_path / "run", signal.SIGTERM, **options)
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["unfrozen_parameters"] == [r"layers\.3\."]
    subset.write_text("unfrozen_parameters:\n- layers\\.2\\.\n")
    assert finetune(run.folder, max_steps=STEPS, resume_from_checkpoint=True, **options).code == 2
    assert "had unfrozen_parameters=" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scheduler.pt", "to_state/__0_0.distcp", "to_state/.metadata"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_checkpoint_is_said_to_be_one(
    finetune: Finetune, stopped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped.folder, folder)
    file = folder / "checkpoint-4" / name
    half = file.read_bytes()[:100]
    file.unlink()
    if damage == "cut":
        file.write_bytes(half)
    assert finetune(folder, max_steps=STEPS, resume_from_checkpoint=True).code == 1
    assert f"{folder}/checkpoint-4 cannot be resumed from, it is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["prepare_data", "finish"])
def test_a_signal_outside_the_training_ends_the_run_and_its_record(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, where: str
) -> None:
    with mock.patch(f"to_finetune.finetune.{where}", side_effect=lambda *_: os.kill(os.getpid(), number)):
        run = finetune(tmp_path / "run")
    assert run.code == 128 + number
    assert f"{number.name}: stopped at once" in capsys.readouterr().err
    if where == "finish":
        assert run.record["status"] == "interrupted"
    else:
        assert not run.folder.exists()


class SignalInEvaluation(StopOnNonFinite):
    """SIGTERM while the held-out rows are evaluated after the last step."""

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 4 and not getattr(self, "sent", False):
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_step_throws_nothing_away(finetune: Finetune, tmp_path: Path) -> None:
    evaluated = {"val_set_size": 4, "eval_strategy": "steps", "eval_steps": 4}
    with mock.patch("to_finetune.finetune.StopOnNonFinite", SignalInEvaluation):
        run = finetune(tmp_path / "run", **evaluated)
    assert (run.code, run.record["status"]) == (0, "done")
    assert_same_bits(run.weights, finetune(tmp_path / "undisturbed", **evaluated).weights)


def test_an_interrupted_run_keeps_its_last_checkpoint_beside_the_best(finetune: Finetune, tmp_path: Path) -> None:
    """Hugging Face deletes all but the best when it ends."""
    best = {"load_best_model_at_end": True, "save_total_limit": 1, "save_strategy": "steps", "save_steps": 2}
    best |= {"val_set_size": 4, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}  # the first
    run = interrupted(finetune, tmp_path / "run", signal.SIGTERM, **best)
    assert run.record["checkpoint"] == str(run.folder / "checkpoint-4")
    state = run.trainer.state
    assert state.best_model_checkpoint == str(run.folder / "checkpoint-2")
    assert (run.folder / "checkpoint-4" / "to_state").is_dir()


def test_a_folder_without_an_optimizers_state_is_no_checkpoint(
    finetune: Finetune, stopped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would begin anew, with a fresh optimizer, and not say so."""
    assert finetune(tmp_path / "new", resume_from_checkpoint=stopped.folder).code == 2
    said = capsys.readouterr().err
    assert "cannot be resumed from: it has no optimizer's state" in said
    assert f"Did you mean '{stopped.folder}/checkpoint-4'?" in said


def test_another_runs_checkpoint_is_asked_what_it_was_made_with(
    finetune: Finetune, stopped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = stopped.folder / "checkpoint-4"
    options = {"max_steps": STEPS, "resume_from_checkpoint": checkpoint}
    assert finetune(tmp_path / "new", learning_rate=0.5, **options).code == 2
    assert f"the run in {str(stopped.folder)!r} had learning_rate=" in capsys.readouterr().err
    there = finetune(tmp_path / "there", max_steps=1)
    assert finetune(there.folder, **options).code == 2
    assert "holds another run. Choose a new folder." in capsys.readouterr().err
    new = finetune(tmp_path / "new", **options)
    assert (new.code, new.record["results"]["steps"]) == (0, STEPS)
    assert "resume_from_checkpoint" not in (new.folder / "config.yaml").read_text()


def test_a_second_signal_stops_at_once(finetune: Finetune, tmp_path: Path) -> None:
    run = interrupted(finetune, tmp_path / "run", signal.SIGINT, signal.SIGINT)
    assert (run.code, run.record["status"], run.record["checkpoint"]) == (130, "interrupted", None)
    assert not list(tmp_path.rglob("trained.safetensors"))


def test_a_signal_that_came_to_another_process_stops_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(flag: torch.Tensor, op: Any) -> None:
        flag.fill_(max(int(flag), 1) if op == ReduceOp.MAX else min(int(flag), 1))

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    args: Any = SimpleNamespace(world_size=2, device="cpu", save_total_limit=None)
    signals, control = SaveOnSignal(), TrainerControl()
    signals.on_step_end(args, TrainerState(), control)
    assert (signals.received, signals.stopped) == (None, signal.SIGTERM)
    assert (control.should_save, control.should_training_stop) == (True, True)


@pytest.mark.parametrize(
    "other",
    [
        {"optim": "rank_one_to"},
        {"optim_args": "alpha=0.7"},
        {"unfrozen_parameters": [r"layers\.2\."]},
        {"learning_rate": 0.5},
        {"weight_decay": 0.5},
        {"lr_scheduler_type": "cosine"},
        {"dtype": "bfloat16"},
        {"completion_only_loss": False},
        {"dataset_name": "other.jsonl"},
        {"dataset_weights": [1.0]},
        {"dataset_streaming": True},
        {"dataset_config": "main"},
        {"dataset_train_split": "train[:20]"},
        {"val_set_size": 4},
        {"max_length": 100},
        {"packing": True},
        {"seed": 7},
        {"data_seed": 7},
    ],
    ids=lambda other: next(iter(other)),
)
def test_resuming_with_other_settings_is_refused(
    finetune: Finetune, stopped: Run, capsys: pytest.CaptureFixture[str], other: dict[str, Any]
) -> None:
    """What the checkpoint would override, or could not be loaded onto."""
    before = {file: file.read_bytes() for file in stopped.folder.rglob("*") if file.is_file()}
    assert finetune(stopped.folder, max_steps=STEPS, resume_from_checkpoint=True, **other).code == 2
    assert f"the run in {str(stopped.folder)!r} had {next(iter(other))}=" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in stopped.folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "key",
    [
        *("model_revision", "unfrozen_last_layers", "load_in_4bit", "lora_alpha", "warmup_steps", "warmup_ratio"),
        *("max_grad_norm", "neftune_noise_alpha", "assistant_only_loss", "chat_template_path", "truncation_mode"),
        *("shuffle_dataset", "train_sampling_strategy", "dataloader_drop_last"),
    ],
)
def test_whatever_settles_the_trajectory_must_agree(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.yaml").write_text(f"{key}: 1\n")
    with pytest.raises(UsageError, match=f"had {key}=1, now 2"):
        RunRecord(str(tmp_path), {key: 2}, 8).check_folder(str(tmp_path / "checkpoint-2"))


def test_one_value_may_stand_as_a_list_or_in_quotes(tmp_path: Path) -> None:
    """As in a config.yaml that was written by hand; the batch of each process may be another."""
    (tmp_path / "config.yaml").write_text(
        "dataset_name: rows.jsonl\ndataset_weights: 1.0\nseed: '42'\noptim_args: {alpha: 0.1, beta: 0.2}\n"
        "max_length: null\nper_device_train_batch_size: 8\n"
    )
    now = {"dataset_name": ["rows.jsonl"], "dataset_weights": [1.0], "seed": 42, "max_length": None}
    now |= {"optim_args": {"beta": 0.2, "alpha": 0.1}, "per_device_train_batch_size": 4}
    RunRecord(str(tmp_path), now, 8).check_folder(str(tmp_path / "checkpoint-2"))
    for other in ({"dataset_name": ["rows.jsonl", "more.jsonl"]}, {"optim_args": {"alpha": 0.1}}, {"max_length": 9}):
        with pytest.raises(UsageError, match=f"had {next(iter(other))}="):
            RunRecord(str(tmp_path), now | other, 8).check_folder(str(tmp_path / "checkpoint-2"))


def test_a_folder_with_a_run_is_refused(finetune: Finetune, stopped: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(stopped.folder).code == 2
    assert "holds another run" in capsys.readouterr().err
    assert stopped.record["status"] == "interrupted"


@pytest.mark.parametrize("asked", ["true", "nowhere"])
def test_resuming_without_a_checkpoint_is_refused(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    assert finetune(tmp_path / "empty", resume_from_checkpoint=asked).code == 2
    assert f"resume_from_checkpoint='{asked}'" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()


def test_false_names_no_checkpoint(tmp_path: Path) -> None:
    assert resume_point("False", str(tmp_path)) is resume_point(None, str(tmp_path)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(llama: Path, tmp_path: Path, value: float) -> None:
    """The last good file stays."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    select_trainable(model, [r"layers\.3\."])
    good = save_trained(model, tmp_path).read_bytes()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[1, 2] = value
    with pytest.raises(RunError, match=r"1 trained tensors are not finite, model\.layers\.3\.mlp\.up_proj\.weight"):
        save_trained(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"trained.safetensors": good}
