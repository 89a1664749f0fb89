"""What a run leaves behind: the trained weights alone, a record that proves it, and a recipe that repeats it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainerState

from to_finetune.data.preview import IGNORED
from to_finetune.errors import UsageError
from to_finetune.files import whole, write_whole
from to_finetune.finetune import main, summary
from to_finetune.model import load_finetuned, save_trained, select_trainable
from to_finetune.model.adapters import lora_config, with_adapters
from to_finetune.model.trained import Base, read_trained
from to_finetune.training.callbacks import TerminalLines
from to_finetune.training.optimizers import recommended_learning_rate
from to_finetune.training.record import RunRecord, summarise

from .helpers import LAYER_WEIGHTS, Run, assert_same_bits

SETTINGS = {
    "optim_args": "alpha=0.2,beta=0.2",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "seed": 7,
    "val_set_size": 6,
    "per_device_eval_batch_size": 4,  # two batches of different size: the loss is over tokens, not over batches
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "tensorboard",
}


@pytest.fixture(scope="module")
def run(finetune: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finetune(tmp_path_factory.mktemp("runs") / "first", **SETTINGS)
    assert run.code == 0
    return run


def test_saves_the_trained_tensors_and_nothing_else(run: Run) -> None:
    data = (run.folder / "trained.safetensors").read_bytes()
    (header_size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_size])
    header.pop("__metadata__")
    assert len(header) == 9
    assert all(name.startswith("model.layers.3.") for name in header)
    assert len(data) == 8 + header_size + 4 * LAYER_WEIGHTS
    assert header_size < 2000
    for folder in (run.folder, run.folder / "checkpoint-2", run.folder / "checkpoint-4"):
        assert [file.name for file in folder.glob("*.safetensors")] == ["trained.safetensors"]


def test_the_saved_file_names_its_base(run: Run, llama: Path) -> None:
    data = (run.folder / "trained.safetensors").read_bytes()
    (header_size,) = struct.unpack("<Q", data[:8])
    assert json.loads(data[8 : 8 + header_size])["__metadata__"]["base_model_name_or_path"] == str(llama)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_saved_file_names_its_bases_commit(llama: Path, tmp_path: Path, adapters: bool) -> None:
    """What trained is put onto the very weights that it trained on, whatever has become of the base since."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    model.config._commit_hash = "abc"
    select_trainable(model, [r"layers\.3\."])
    model = with_adapters(model, lora_config(4, 8, 0.0, ["q_proj"])) if adapters else model
    save_trained(model, tmp_path)
    assert read_trained(tmp_path)[1] == Base(str(llama), "abc")


def test_a_file_that_names_no_base_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "trained.safetensors")
    with pytest.raises(UsageError, match="does not say which base model it belongs to"):
        read_trained(tmp_path)


@pytest.mark.parametrize("folder", [".", "checkpoint-4"])
def test_load_finetuned_gives_the_live_model_back_bit_for_bit(run: Run, folder: str) -> None:
    model, tokenizer = load_finetuned(run.folder / folder)
    assert_same_bits(dict(model.named_parameters()), dict(run.trainer.model.named_parameters()))
    assert tokenizer("red tree").input_ids == run.trainer.processing_class("red tree").input_ids


@pytest.mark.parametrize("adapters", [False, True])
def test_the_default_rate_is_written_down(finetune: Callable[..., Run], tmp_path: Path, adapters: bool) -> None:
    """It is that of the model and of what trains, and the run's recipe names it, as any that was given."""
    chosen = {"unfrozen_parameters": None, "use_peft": True} if adapters else {}
    run = finetune(tmp_path / "run", **chosen)
    rate = recommended_learning_rate(run.trainer.model)
    assert run.trainer.optimizer.param_groups[0]["initial_lr"] == rate
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["learning_rate"] == rate


def test_the_record_holds_every_proof(run: Run) -> None:
    record = run.record
    assert record["status"] == "done"
    assert record["proofs"] == {
        "live_optimizer": "DiagonalTO",
        "trained_tensors": 9,
        "moved_after_first_step": 9,
        "frozen_tensors_unmoved": 30,
        "never_moved": [],
        "saved_bytes_read_back": 4 * LAYER_WEIGHTS,
    }
    assert {name: record["versions"][name] for name in ("torch", "trl")} == {
        "torch": version("torch"),
        "trl": version("trl"),
    }
    assert record["results"]["processes"] == 1


def test_what_never_moved_is_said_at_the_end(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {}, 1)
    record.values["proofs"] = {"never_moved": ["layers.0.weight", "layers.1.weight"]}
    console = Console(record=True, file=StringIO())
    console.print(summary({}, record))
    assert "2 trained tensors, layers.0.weight first" in console.export_text()


def test_the_losses_of_the_record_are_the_models(run: Run) -> None:
    """The held-out loss (of one batch: Hugging Face averages over batches), computed again a row at a time."""
    model, _ = load_finetuned(run.folder, dtype=torch.float64)
    total, tokens = 0.0, 0
    for row in run.trainer.eval_dataset:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        tokens += int((labels != IGNORED).sum())
    results = run.record["results"]
    assert results["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert results["train_loss_mean"] == pytest.approx(sum(run.losses) / 4)
    assert results["steps"] == 4


def test_leaves_a_picture_and_the_curves(run: Run) -> None:
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(run.losses) == 4
    events = list(run.folder.rglob("events.out.tfevents.*"))
    assert events
    assert b"train/estimate_error" in b"".join(file.read_bytes() for file in events)


def test_the_picture_shows_the_logged_losses(finetune: Callable[..., Run], tmp_path: Path) -> None:
    with mock.patch.object(Figure, "savefig", autospec=True) as saved:
        run = finetune(tmp_path / "run", val_set_size=4)
    figure = saved.call_args.args[0]
    training, held_out = figure.axes[0].lines
    assert training.get_xydata().tolist() == [[step, loss] for step, loss in enumerate(run.losses, start=1)]
    assert held_out.get_xydata().tolist() == [[4, run.record["results"]["eval_loss"]]]
    assert (training.get_label(), figure.axes[0].get_xlabel()) == ("diagonal_to", "step")


def test_rows_are_cut_to_the_models_context(run: Run) -> None:
    """Unless a length is given: the default is TRL's 1,024 tokens, for which this model has no positions."""
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["max_length"] == 512


def test_nothing_half_written_stays(run: Run) -> None:
    assert not list(run.folder.rglob("*.partial"))


def test_its_config_repeats_the_run_bit_for_bit(run: Run, tmp_path: Path) -> None:
    """Given config.yaml and another folder, and nothing else."""
    folder = tmp_path / "again"
    again = Run(main(["--config", str(run.folder / "config.yaml"), "--output_dir", str(folder)]), folder, None)
    assert again.code == 0
    assert again.losses == run.losses
    assert_same_bits(again.weights, run.weights)


def test_only_trained_weights_have_gradients_and_state(run: Run) -> None:
    model, optimizer = run.trainer.model, run.trainer.optimizer.optimizer
    model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    names = {p: name for name, p in model.named_parameters()}
    assert trained == run.weights.keys()
    assert {names[p] for p in optimizer.state} == trained
    assert {names[p] for group in optimizer.param_groups for p in group["params"]} == trained


def test_a_checkpoint_holds_state_of_the_trained_weights_only(run: Run) -> None:
    folder = run.folder / "checkpoint-2" / "to_state"
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {key.rsplit(".", 1)[1] for key in saved} == {"step", "a", "b"}
    numbers = {key: value.size.numel() for key, value in saved.items() if isinstance(value, TensorStorageMetadata)}
    assert sum(n for key, n in numbers.items() if not key.endswith(".step")) == 2 * LAYER_WEIGHTS
    assert {key.rsplit(".", 1)[0] for key in numbers} == run.weights.keys()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * LAYER_WEIGHTS + 27 * 2_000  # tensors


def test_a_model_trained_whole_is_saved_whole(finetune: Callable[..., Run], tmp_path: Path) -> None:
    run = finetune(tmp_path / "whole", unfrozen_parameters=None, max_steps=2)
    assert run.code == 0
    saved = AutoModelForCausalLM.from_pretrained(run.folder)
    assert_same_bits(dict(saved.named_parameters()), dict(run.trainer.model.named_parameters()))
    with pytest.raises(UsageError, match=r"holds no trained\.safetensors"):
        load_finetuned(run.folder)


def test_the_mean_training_loss_is_over_all_steps(finetune: Callable[..., Run], tmp_path: Path) -> None:
    """Also over those behind the last that `logging_steps` would log."""
    run = finetune(tmp_path / "run", max_steps=5, logging_steps=4, max_grad_norm=1.0)
    history = run.trainer.state.log_history
    assert [row["step"] for row in history if "loss" in row] == [4, 5]
    assert run.record["results"]["train_loss_mean"] == pytest.approx(history[-1]["train_loss"], rel=1e-6)


def test_the_first_fifth_of_the_losses_has_a_mean_of_its_own() -> None:
    history = [{"step": step, "loss": float(step)} for step in range(1, 12)]
    results = summarise(history)
    assert (results["train_loss_first_fifth"], results["train_loss_mean"]) == (1.5, 6.0)
    assert summarise(history[:4])["train_loss_first_fifth"] is None


def test_a_log_is_one_line_and_of_the_first_process_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"loss": 2.0, "learning_rate": 0.008, "grad_norm": 1.5, "estimate_error": 0.25, "gradient_peak": 0.5}
    logs |= {"skipped_steps": 2, "tokens_per_second": 1234.0, "epoch": 1}
    for first in (True, False):
        state = TrainerState(global_step=7, max_steps=100, is_world_process_zero=first)
        TerminalLines().on_log(None, state, None, logs)  # type: ignore[arg-type]
    assert capsys.readouterr().out == (
        "step   7/100  loss 2.0000  lr 8.00e-03  |g| 1.50e+00  estimate error 0.250  peak 0.50  2 steps skipped  "
        "1,234 tokens/s\n"
    )


def test_what_is_not_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    """And what was there before still is; new files may be read by whom the folder's others may."""
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.touch()
    with whole(path) as beside:
        save_file({"a": torch.ones(2)}, beside)
    assert path.stat().st_mode == plain.stat().st_mode
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "plain"]
