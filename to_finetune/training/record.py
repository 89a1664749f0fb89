"""A run's folder and its record: config.yaml repeats the run, run.json says what happened."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from operator import mul
from pathlib import Path
from typing import Any

import yaml

from to_finetune.errors import UsageError
from to_finetune.files import check_place, write_json, write_whole
from to_finetune.machine import machine
from to_finetune.runs import (
    CHECKPOINT,
    CONFIG,
    LOSS_CURVE,
    PARAMETERS,
    RECORD,
    REPORT,
    SAMPLES,
    SLOPES,
    STATE,
    last_checkpoint,
    mapping,
    read,
    step_of,
)
from to_finetune.training.recipe import without_secrets

MUST_AGREE = (
    "model_name_or_path",
    "model_revision",
    "unfrozen_parameters",
    "unfrozen_last_layers",
    "unfrozen_modules",
    "load_in_8bit",
    "load_in_4bit",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "optim",
    "optim_args",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "dtype",
    "bf16",
    "fp16",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template_path",
    "eos_token",
    "dataset_name",
    "dataset_weights",
    "dataset_streaming",
    "dataset_config",
    "dataset_train_split",
    "dataset_text_field",
    "val_set_size",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "shuffle_dataset",
    "seed",
    "data_seed",
)


OPTIMIZER_STATES = ("to_state", "optimizer.pt", "optimizer.bin", "latest")  # ours; Hugging Face's; FSDP's; DeepSpeed's


class RunRecord:
    """The folder of one run. Both files are written atomically, so that neither is ever incomplete."""

    def __init__(self, folder: str, config: dict[str, Any], rows_a_step: int) -> None:
        self.folder = Path(folder)
        self.values: dict[str, Any] = {
            "status": "running",
            "command": shlex.join(without_secrets(sys.argv)),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows_a_step": rows_a_step,
            **machine(),
        }
        base = config.get("model_name_or_path")
        if base and Path(base).is_dir():  # read from another folder, a relative path would be taken for the hub's name
            self.values["base_folder"] = os.path.abspath(base)
        self.config = config
        self._is_taken_over = False  # from a failed run

    def check_folder(self, resume: str | None) -> None:
        """Raise if the folder holds another run, or if the run to resume had other settings.

        Raises:
            UsageError: naming the folder, or the keys that differ.
        """
        if not self.folder.name:
            raise UsageError(f"output_dir={str(self.folder)!r} is not valid: give the run a folder of its own.")
        check_place("output_dir", self.folder / RECORD)
        resumed = self.folder if resume is None else Path(resume).resolve().parent
        is_another = resume is None or resumed != self.folder.resolve()
        last = last_checkpoint(self.folder)
        if is_another and self._holds_a_run() and not was_restarted():
            go_on = ", or continue that run with --resume_from_checkpoint true" if last else ""
            raise UsageError(f"output_dir={str(self.folder)!r} holds another run. Choose a new folder{go_on}.")
        self._is_taken_over = is_another and (self.folder / RECORD).exists() and not was_restarted()
        if resume is None:
            return
        if not is_another and last is not None and step_of(last) > step_of(resume):
            raise UsageError(
                f"resume_from_checkpoint={resume!r}: {str(self.folder)!r} holds a later one, {last!r}. Resume from "
                "that one, delete what is later, or choose a new output_dir."
            )
        self._check_agrees(resumed)

    def _check_agrees(self, resumed: Path) -> None:
        """Raise if the run in the folder `resumed` has a config.yaml with other settings."""
        before = read(resumed / CONFIG, mapping)
        if before is None:
            return
        differing = [
            f"{key}={before.get(key)!r}, now {self.config.get(key)!r}"
            for key in MUST_AGREE
            if _words(before.get(key)) != _words(self.config.get(key))
        ]
        rows, now = _rows_a_step(resumed), self.values["rows_a_step"]
        if rows not in (None, now):
            differing.append(f"{rows} rows a step (batch size x accumulation x processes), now {now}")
        if differing:
            raise UsageError(
                f"resume_from_checkpoint: the run in {str(resumed)!r} had {', '.join(differing)}. Resume with the "
                "same settings, or start a new run."
            )

    def _holds_a_run(self) -> bool:
        """Whether the folder holds a run that did not fail before it saved anything."""
        if not (self.folder / RECORD).exists():
            return False
        before = read(self.folder / RECORD, mapping) or {}
        saved = [*self.folder.glob("*.safetensors"), *self.folder.glob(f"{CHECKPOINT}*")]
        return before.get("status") != "failed" or bool(saved)

    def begin(self) -> None:
        """Write config.yaml and run.json, in place of a failed run's files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (PARAMETERS, SLOPES, SAMPLES, STATE, LOSS_CURVE, REPORT) if self._is_taken_over else ():
            (self.folder / name).unlink(missing_ok=True)
        write_whole(self.folder / CONFIG, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        self.update()

    def update(self, **values: Any) -> None:
        """Add `values` to run.json."""
        self.values.update(values)
        write_json(self.folder / RECORD, self.values)


def _rows_a_step(folder: Path) -> int | None:
    """Return the rows per step from a run.json; None from a damaged one, which will be overwritten."""
    with suppress(UsageError):
        return (read(folder / RECORD, mapping) or {}).get("rows_a_step")
    return None


def _words(value: Any) -> list[Any]:
    """Return a value as typed words: in a file, one value may be a list of one, or a number in quotes."""
    return [item if isinstance(item, dict) else str(item) for item in (value if isinstance(value, list) else [value])]


def was_restarted() -> bool:
    """Whether torchrun has restarted this run after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def resume_point(asked: str | None, output_dir: str) -> str | None:
    """Return the checkpoint to resume from: the one named, or the last one for ``--resume_from_checkpoint true``.

    A run that torchrun has restarted resumes from its last checkpoint, if it has one.

    Raises:
        UsageError: when there is no such checkpoint, or it has no optimizer state.
    """
    word = str(asked).lower()
    last = last_checkpoint(output_dir)
    if was_restarted() and last is not None:
        chosen = last
    elif word in ("none", "false"):
        return None
    elif word == "true":
        if last is None:
            raise UsageError(f"resume_from_checkpoint={asked!r}: there is no checkpoint in {output_dir!r}.")
        chosen = last
    else:
        if not os.path.isdir(str(asked)):
            raise UsageError(f"resume_from_checkpoint={asked!r}: no such folder. 'true' takes the last checkpoint.")
        chosen = str(asked)
    if not any(Path(chosen, name).exists() for name in OPTIMIZER_STATES):
        near = last_checkpoint(chosen)
        hint = f" Did you mean {near!r}?" if near else ""
        raise UsageError(
            f"resume_from_checkpoint={chosen!r} cannot be resumed from: it has no optimizer's state, as after "
            f"--save_only_model true.{hint}"
        )
    return chosen


def summarise(history: Sequence[Mapping[str, Any]], saved_step: int | None = None) -> dict[str, Any]:
    """Summarise a Trainer's ``state.log_history``; losses in nats per token. None for a value that is not finite.

    Args:
        history: of the run.
        saved_step: the step whose weights are saved, to take the held-out loss from; None for the last.
    """
    rows = [row for row in history if "loss" in row]
    losses = [row["loss"] for row in rows]  # each the mean since the previous row
    steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
    first = losses[: len(losses) // 5]

    def last(key: str, step: int | None = None) -> Any:
        return next((row[key] for row in reversed(history) if key in row and step in (None, row["step"])), None)

    found = {
        "steps": last("step"),
        "train_loss_mean": sum(map(mul, losses, steps)) / sum(steps) if losses else last("train_loss"),
        "train_loss_first_fifth": sum(first) / len(first) if first else None,
        "eval_loss": last("eval_loss", saved_step),
        "train_seconds": last("train_runtime"),
    }
    return {key: None if value is None or not math.isfinite(value) else value for key, value in found.items()}
