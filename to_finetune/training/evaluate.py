"""The held-out loss of a run, or of any model, and lm-evaluation-harness's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

import yaml
from transformers import PrinterCallback

from to_finetune.data.load import default_eval_split
from to_finetune.data.preview import IGNORED, check_labels
from to_finetune.errors import RunError, UsageError, did_you_mean
from to_finetune.model.opened import OpenModel
from to_finetune.model.run import FinetunedRun, find_run
from to_finetune.training.arguments import DataArguments
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import prepare_data, prepare_model, prepare_trainer

# Settings that say how a run is trained and saved, not how its loss is evaluated.
TRAINING_ONLY = (
    "deepspeed",
    "eval_on_start",
    "eval_strategy",
    "fsdp",
    "fsdp_config",
    "learning_rate",
    "load_best_model_at_end",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "optim_args",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "save_strategy",
)
TASK_BATCH_SIZE = 8


class HeldOut(NamedTuple):
    """The mean loss over all held-out tokens that have one, in nats per token."""

    loss: float
    rows: int
    tokens: int
    base_loss: float | None = None  # of the run's base

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def evaluate_held_out(
    name: str,
    dataset_name: str | None = None,
    split: str | None = None,
    flags: Sequence[str] = (),
    with_base: bool = False,
) -> HeldOut:
    """Evaluate a run, a checkpoint or any model exactly as a run evaluates itself.

    Args:
        name: a run's folder, whose config.yaml says how, or the folder or hub name of any model.
        dataset_name: what to evaluate on; None for what the run held out.
        split: of `dataset_name`; None for that of `default_eval_split`.
        flags: of finetune.py, which override the run's own.
        with_base: evaluate the run's base as well.

    Raises:
        UsageError: when there is no data to evaluate on, or no base to compare with.
    """
    run = find_run(name)
    if with_base and run is None:
        raise UsageError(f"{name!r} is no run, so that its base is not known: nothing to compare with.")
    with TemporaryDirectory(prefix="to-finetune-evaluate-") as folder:
        config = {**_settings(name, run, dataset_name, split), "output_dir": folder, "report_to": "none"}
        recipe = Path(folder) / "config.yaml"
        recipe.write_text(yaml.safe_dump(config), encoding="utf-8")
        model_args, data_args, args = parse_arguments(["--config", str(recipe), *flags])
        tokenizer, rows, held_out = prepare_data(model_args, data_args, args)
        if dataset_name is None:
            rows = held_out
        if rows is None:
            raise UsageError(f"{name!r} has held nothing out: name what to evaluate on with --dataset_name.")
        model, _ = prepare_model(model_args, args, is_trained=run is not None)
        trainer: Any = prepare_trainer(model, tokenizer, args, rows.take(1), rows)  # it needs rows to train on
        check_labels(trainer.eval_dataset, args.max_length)
        trainer.remove_callback(PrinterCallback)
        base_loss = trainer.evaluate()["eval_loss"] if with_base else None
        if run is not None:
            trainer._load_from_checkpoint(str(run.folder))
        loss = trainer.evaluate()["eval_loss"]
        return HeldOut(loss, len(trainer.eval_dataset), _tokens_with_a_loss(trainer.eval_dataset), base_loss)


def _tokens_with_a_loss(rows: Any) -> int:
    """Count the learned tokens except the first of a row and of each example packed in it, which nothing predicts."""
    count = 0
    for row in rows:
        firsts = {0, *accumulate(row.get("seq_lengths") or [])}
        count += sum(label != IGNORED for i, label in enumerate(row["labels"]) if i not in firsts)
    return count


def _settings(name: str, run: FinetunedRun | None, dataset_name: str | None, split: str | None) -> dict[str, Any]:
    """Return the run's recipe without its training settings, and with other data if `dataset_name` is given."""
    if run is None:
        if dataset_name is None:
            raise UsageError(f"{name!r} is no run, which would know its held-out data: give --dataset_name.")
        config = {"model_name_or_path": name}
    elif run.base is None:
        raise UsageError(f"{name!r} has no config.yaml, which says how its data are prepared.")
    else:
        config = {key: value for key, value in run.config.items() if key not in TRAINING_ONLY}
    if dataset_name is not None:
        trained_on = {f.name for f in fields(DataArguments)}
        config = {key: value for key, value in config.items() if key not in trained_on}
        config |= {"dataset_name": dataset_name, "dataset_train_split": split or default_eval_split(dataset_name)}
    return config


def evaluate_tasks(
    opened: OpenModel, tasks: Sequence[str], batch_size: int | None = None, max_length: int | None = None
) -> dict[str, dict[str, float]]:
    """Run lm-evaluation-harness and return each task's metrics, by the harness's names.

    Raises:
        UsageError: when it is not installed, or has no such task.
        RunError: when it fails.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(
            '--tasks needs lm-evaluation-harness, which is not installed: pip install "to-finetune[evaluate]"'
        ) from None
    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks:
            near = did_you_mean(task, manager.all_tasks)
            raise UsageError(f"tasks: lm-evaluation-harness has no task {task!r}.{near}")
    model = HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        batch_size=batch_size or TASK_BATCH_SIZE,
        max_length=max_length,
    )
    try:
        results = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, log_samples=False)["results"]
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"lm-evaluation-harness failed: {shorten(str(error), 400)}") from error
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
        for task, values in results.items()
    }
