"""Whatever cannot be is said in one sentence that names it, with exit code 2, and leaves no file behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import TrainerState

from to_finetune.errors import RunError
from to_finetune.training import TOSFTTrainer
from to_finetune.training.callbacks import StopOnNonFinite

from .helpers import ALPACA_ROWS, Run, write_jsonl

Finetune = Callable[..., Run]

FILES = {
    "list.yaml": "- optim\n- diagonal_to\n",
    "broken.yaml": "optim: [diagonal_to\nseed: 1\n",
    "unknown.yaml": "learning_rte: 0.1\nunfrozen_params: [layers]\n",
    "word.yaml": "seed: many\n",
    "fraction.yaml": "seed: 2.5\n",
    "null.yaml": "seed:\n",
    "list_for_a_number.yaml": "seed: [1, 2]\n",
    "zero2.json": '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}',
    "dtype.yaml": "dtype: float12\n",
    "optim_args.yaml": "optim_args: {alhpa: 0.1}\n",
    "no_subset.yaml": "unfrozen_parameters: []\n",
    "empty.jsonl": "",
    "empty.json": "[]",
    "header.csv": "instruction,output\n",
    "broken.jsonl": '{"instruction": "a", "output": "b"}\n{"instruction":\n',
    "broken.parquet": "no parquet",
    "columns.csv": "question,answer\n1,2\n",
    "messages.jsonl": '{"messages": [{"rle": "user", "content": "red"}]}\n',
    "conversations.jsonl": '{"conversations": "red"}\n',
    "no_assistant.jsonl": '{"messages": [{"role": "user", "content": "red"}]}\n',
    "no_model/tokenizer.json": "{}",
}

BAD = {
    # the optimizer
    "unknown optimizer": ({"optim": "diagonel_to"}, "optim='diagonel_to'", "'diagonal_to'"),
    "unknown option": ({"optim_args": "alhpa=0.1"}, "optim_args", "'alhpa'", "'alpha'"),
    "unknown option in a mapping": ({"config": "optim_args.yaml"}, "optim_args", "'alhpa'", "'alpha'"),
    "option without value": ({"optim_args": "alpha"}, "optim_args", "'alpha'", "key=value"),
    "option out of range": ({"optim_args": "beta=2"}, "beta=2", "between 0 and 1"),
    "option that is a word": ({"optim_args": "alpha=big"}, "alpha='big'", "number"),
    "switch that is a word": ({"optim_args": "relative_alpha=no"}, "relative_alpha='no'", "false"),
    "rate among the options": ({"optim_args": "lr=0.1"}, "lr=0.1", "--learning_rate"),
    "Adam's flags for a TO": ({"adam_beta1": 0.8}, "adam_beta1", "--optim_args"),
    "AdamW's beta": ({"optim": "adamw_torch", "adam_beta1": 1.5}, "optim=adamw_torch", "1.5"),
    "an option that is dropped": ({"optim": "sgd", "optim_args": "momentun=0.9"}, "sgd", "'momentun'"),
    "options of an 8-bit AdamW": ({"optim": "adamw_bnb_8bit", "optim_args": "eps=0.1"}, "adamw_bnb_8bit", "eps=0.1"),
    "negative rate": ({"learning_rate": -1}, "lr=-1.0", "at least 0"),
    # flags that could not be obeyed, or fail late
    "rounded for an evaluation": ({"bf16_full_eval": True}, "bf16_full_eval", "--bf16 true"),
    "batch size found on the way": ({"auto_find_batch_size": True}, "auto_find_batch_size", "to-finetune plan"),
    "best without checkpoint": (
        {
            **{"eval_strategy": "steps", "eval_steps": 1, "val_set_size": 4},
            **{"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True},
        },
        "save_steps=2",
        "eval_steps=1",
    ),
    "another checkpoint on SIGTERM": ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True", "by itself"),
    "steps below nothing": ({"eval_steps": -1}, "eval_steps=-1", "at least 0"),
    "offloading from a CPU": ({"activation_offloading": True}, "activation_offloading=True", "GPU"),
    "two ways to load": ({"model_init_kwargs": '{"dtype": "bfloat16"}'}, "model_init_kwargs", "--dtype"),
    "float16 on a CPU": ({"fp16": True}, "fp16=True", "--bf16 true"),
    "rows of a step": ({"accelerator_config": '{"split_batches": true}'}, "split_batches", "--per_device"),
    "no accelerator_config": ({"accelerator_config": "none.json"}, "none.json"),
    "a branch on the hub": ({"hub_revision": "dev"}, "hub_revision", "main"),
    "workers": ({"dataloader_persistent_workers": True}, "dataloader_num_workers=0", "at least 1"),
    "smoothing": ({"label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5", "between 0 and 1"),
    "noise": ({"neftune_noise_alpha": -5}, "neftune_noise_alpha=-5", "at least 0"),
    "padding to nothing": ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0", "at least 1"),
    "recomputed how": (
        {"gradient_checkpointing_kwargs": '{"use_reentrnt": false}'},
        "gradient_checkpointing_kwargs",
        "use_reentrnt",
    ),
    "DeepSpeed without processes": ({"deepspeed": "zero2.json"}, "deepspeed=zero2.json", "torchrun"),
    "a kernel that is not there": ({"use_liger_kernel": True}, "pip install liger-kernel"),
    "scheduler without its arguments": ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr", "min_lr"),
    "report to what is not there": ({"report_to": "codecarbon"}, "report_to=['codecarbon']", "installed"),
    "first evaluation of nothing": ({"eval_on_start": True}, "eval_on_start=True", "--val_set_size"),
    "less than a step": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 50},
        "dataloader_drop_last=True",
        "50 rows, there are 24",
    ),
    "tokens seen": ({"include_num_input_tokens_seen": "true"}, "include_num_input_tokens_seen", "non_padding"),
    # flags and configuration
    "bad value": ({"learning_rate": "fast"}, "--learning_rate", "'fast'"),
    "unknown flag": ({"learning_rte": 0.1}, "'learning_rte'", "'learning_rate'"),
    "two unknown flags": ({"learning_rte": 0.1, "max_stepz": 3}, "'learning_rate'", "'max_stepz'", "'max_steps'"),
    "unknown keys": ({"config": "unknown.yaml"}, "'learning_rate'", "'unfrozen_params'", "'unfrozen_parameters'"),
    "word for a number": ({"config": "word.yaml"}, "seed", "'many'"),
    "fraction for a number": ({"config": "fraction.yaml"}, "seed", "'2.5'"),
    "null for a number": ({"config": "null.yaml"}, "seed", "has no value", "leave it out"),
    "list for a number": ({"config": "list_for_a_number.yaml"}, "seed", "'[1, 2]'"),
    "bad choice": ({"config": "dtype.yaml"}, "dtype", "'float12'", "'bfloat16'"),
    "config that is a list": ({"config": "list.yaml"}, "list.yaml", "mapping"),
    "config that is no YAML": ({"config": "broken.yaml"}, "broken.yaml", "not valid YAML", "line 2"),
    "config that is not there": ({"config": "nowhere.yaml"}, "nowhere.yaml", "No such file"),
    "batch of none": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0", "at least 1"),
    "accumulation of none": (
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps=0 is not valid: at least 1",
    ),
    "length of none": ({"max_length": 0}, "max_length=0", "at least 1"),
    "no dataset": ({"dataset_name": None}, "required", "--dataset_name"),
    "no model": ({"model_name_or_path": None}, "required", "--model_name_or_path"),
    # the subset
    "pattern that finds nothing": (
        {"unfrozen_parameters": [r"layers\.3\.", "^model.layers.1.mlp.dwn_proj.weight$"]},
        "unfrozen_parameters",
        "'^model.layers.1.mlp.dwn_proj.weight$'",
        "'model.layers.1.mlp.down_proj.weight'",
    ),
    "pattern that finds nothing, before the data": (
        {"optim": "adamw_torch", "unfrozen_parameters": ["nosuch"], "dataset_name": "rws.jsonl"},
        "'nosuch' is found in none",
    ),
    "pattern with brackets": ({"unfrozen_parameters": ["[/x]_proj[y]"]}, "unfrozen_parameters", "'[/x]_proj[y]'"),
    "pattern that is none": ({"unfrozen_parameters": ["layers.("]}, "unfrozen_parameters", "'layers.('", "position 7"),
    "no pattern": ({"unfrozen_parameters": None, "config": "no_subset.yaml"}, "unfrozen_parameters", "empty"),
    # the model
    "model that is not there": ({"model_name_or_path": "./no_modle"}, "'./no_modle'", "no such folder", "'no_model'"),
    "folder without a model": ({"model_name_or_path": "no_model"}, "'no_model'", "config.json"),
    "folder that is not there in one that is": (
        {"model_name_or_path": "no_model/small"},
        "'no_model/small': no such folder",
    ),
    # the data
    "data that are not there": ({"dataset_name": "rws.jsonl"}, "'rws.jsonl'", "no such file", "'rows.jsonl'"),
    "empty data": ({"dataset_name": "empty.jsonl"}, "'empty.jsonl'", "empty"),
    "empty list": ({"dataset_name": "empty.json"}, "'empty.json'", "is empty"),
    "header alone": ({"dataset_name": "header.csv"}, "'header.csv'", "is empty"),
    "empty split": ({"dataset_train_split": "train[:0]"}, "dataset_name", "train[:0]"),
    "unknown split": ({"dataset_train_split": "test"}, "dataset_name", '"test"'),
    "broken JSON": ({"dataset_name": "broken.jsonl"}, "'broken.jsonl'", "malformed", "row 1"),
    "broken Parquet": ({"dataset_name": "broken.parquet"}, "'broken.parquet'", "Parquet"),
    "unknown columns": ({"dataset_name": "columns.csv"}, "'columns.csv'", "question, answer", "{prompt, completion}"),
    "broken messages": ({"dataset_name": "messages.jsonl"}, "'messages.jsonl'", "malformed", "'rle'"),
    "broken conversations": ({"dataset_name": "conversations.jsonl"}, "'conversations.jsonl'", "malformed", "'red'"),
    "no assistant": ({"dataset_name": "no_assistant.jsonl"}, "no assistant"),
    "nothing left to train on": ({"val_set_size": 24}, "val_set_size=24", "24 rows"),
    "negative rows": ({"val_set_size": -1}, "val_set_size=-1 is not valid: a whole number of rows, or a share"),
    "a row and a half": ({"val_set_size": 1.5}, "val_set_size=1.5 is not valid: a whole number of rows, or a share"),
    "a weight decay below zero": ({"weight_decay": -0.1}, "weight_decay=-0.1 is not valid"),
    "a coupled weight decay": (
        {"weight_decay": 0.1, "optim_args": "decoupled_weight_decay=false"},
        "weight_decay=0.1 is not valid: grad_scale='factored' needs decoupled_weight_decay=True",
    ),
    "an option given twice": ({"optim_args": "alpha=0.1,alpha=0.2"}, "optim_args: alpha is given twice"),
    "options of an optimizer without": (
        {"optim": "adamw_torch", "optim_args": "bteas=1"},
        "optim_args='bteas=1': Hugging Face gives adamw_torch none; its flags are adam_beta1",
    ),
    "options of Adafactor": (
        {"optim": "adafactor", "optim_args": "x=1"},
        "optim_args='x=1': Hugging Face gives adafactor none",
    ),
    "no steps": ({"max_steps": 0}, "max_steps=0 is not valid"),
    "no epochs": ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0"),
    "rows that are no number": (
        {"val_set_size": "nan"},
        "val_set_size=nan is not valid: a whole number of rows, or a share",
    ),
    "rows without end": ({"val_set_size": "inf"}, "val_set_size=inf is not valid: a whole number of rows, or a share"),
    "evaluation of nothing": ({"eval_strategy": "steps"}, "eval_strategy='steps'", "--val_set_size"),
    "all labels masked": ({"max_length": 20}, "All labels are masked", "max_length=20"),
    # the rest
    "unknown logger": ({"report_to": "paper"}, "paper", "tensorboard"),
}


@pytest.fixture(autouse=True)
def _among_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    write_jsonl(tmp_path / "rows.jsonl", ALPACA_ROWS)


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence (its line) that a failed run ends with."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize("case", BAD)
def test_it_is_named_and_nothing_is_written(
    case: str, finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, *named = BAD[case]
    run = finetune(tmp_path / "out", **options)
    assert run.code == 2
    error = the_error(capsys)
    assert [words for words in named if words not in error] == []
    assert len(error) < 800
    assert not any(run.folder.rglob("*"))


def test_an_unknown_metric_is_said_once_the_others_are_known(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = {"metric_for_best_model": "eval_los", "eval_strategy": "steps", "eval_steps": 1, "val_set_size": 4}
    run = finetune(tmp_path / "out", **metric)
    assert run.code == 2
    error = the_error(capsys)
    assert "'eval_los'" in error
    assert "eval_loss" in error
    assert run.record["status"] == "failed"


@pytest.mark.parametrize(
    "options", [{"dataset_name": "rws.jsonl"}, {"val_set_size": 24}, {"eval_packing": True}], ids=str
)
def test_data_that_cannot_be_are_refused_before_a_weight_is_loaded(
    options: dict[str, Any], finetune: Finetune, tmp_path: Path
) -> None:
    with mock.patch("to_finetune.training.prepare.load_model") as load_model:
        assert finetune(tmp_path / "out", **options).code == 2
    load_model.assert_not_called()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl/out"])
def test_a_folder_that_cannot_be_made_is_said_before_the_run(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = finetune(tmp_path / name)
    assert (run.code, run.trainer) == (2, None)
    assert f"output_dir: '{tmp_path / 'rows.jsonl'}' is no folder that can be written to." in the_error(capsys)


def test_several_problems_are_said_at_once(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file and among the flags."""
    assert finetune(tmp_path / "out", config="unknown.yaml", max_stepz=3).code == 2
    error = the_error(capsys)
    assert all(key in error for key in ("'learning_rte'", "'unfrozen_params'", "'max_stepz'"))


@pytest.mark.parametrize("options", [{"optim": "sgd"}, {"optim": "diagonal_to"}], ids=lambda options: options["optim"])
def test_a_run_that_diverges_fails_and_saves_nothing(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    run = finetune(tmp_path / "out", learning_rate=1e30, **options)
    assert run.code == 1
    assert "diverged" in the_error(capsys)
    assert run.record["status"] == "failed"
    assert "diverged" in run.record["error"]
    assert run.record["results"]["train_loss_mean"] is None  # JSON has no NaN
    assert run.record["results"]["processes"] == 1
    assert not [file.name for file in run.folder.rglob("*") if file.suffix in (".safetensors", ".bin", ".pt")]
    assert "diverged" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize("key", ["loss", "eval_loss", "train_loss"])
def test_any_loss_that_is_not_finite_ends_the_run(key: str) -> None:
    state = TrainerState(global_step=3)
    with pytest.raises(RunError, match=rf"^{key} is nan at step 3: the run has diverged"):
        StopOnNonFinite().on_log(None, state, None, {key: math.nan})  # type: ignore[arg-type]


def test_too_little_memory_is_said(finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(TOSFTTrainer, "training_step", side_effect=torch.OutOfMemoryError("2 GiB asked")):
        run = finetune(tmp_path / "out")
    assert run.code == 1
    assert "The GPU is out of memory. Lower --per_device_train_batch_size" in the_error(capsys)
    assert (run.record["status"], run.record["error"]) == ("failed", "OutOfMemoryError: 2 GiB asked")


def test_one_pattern_needs_no_list(finetune: Finetune, tmp_path: Path) -> None:
    """A string in the file is one pattern, not a list of its characters."""
    Path("one.yaml").write_text("unfrozen_parameters: layers.3.mlp\n")
    run = finetune(tmp_path / "out", unfrozen_parameters=None, config="one.yaml")
    assert sorted(run.weights) == [f"model.layers.3.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]


def test_flags_win_over_the_file(finetune: Finetune, tmp_path: Path) -> None:
    Path("lists.yaml").write_text("unfrozen_parameters: [layers.1]\nlearning-rate: 1.0e-3\nseed: 5\n")
    run = finetune(tmp_path / "out", "--seed=6", config="lists.yaml", unfrozen_parameters=["layers.3"])
    args = run.trainer.args
    assert (args.learning_rate, args.seed) == (1e-3, 6)
    assert all(name.startswith("model.layers.3.") for name in run.weights)
