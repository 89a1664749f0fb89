"""What a run's folder, or one of its checkpoints, holds: the trained part, the recipe and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from to_finetune.errors import UsageError
from to_finetune.model.quantized import Quantization
from to_finetune.model.trained import TRAINED_WEIGHTS_NAME

# What was trained -> the file that says so, the first that is there.
PARTS = {"subset": TRAINED_WEIGHTS_NAME, "adapter": "adapter_config.json", "whole": "config.json"}


class FinetunedRun(NamedTuple):
    """A run on disk. Without finetune.py's files, as a Trainer of one's own leaves it, the last three are empty."""

    folder: Path  # where the weights are
    part: Literal["subset", "adapter", "whole"]
    config: dict[str, Any]  # config.yaml
    record: dict[str, Any]  # run.json
    history: list[dict[str, Any]]  # the Trainer's log

    @property
    def base(self) -> str | None:
        """The model that it began from, where config.yaml says so."""
        return self.config.get("model_name_or_path")

    @property
    def quantization(self) -> Quantization | None:
        """Of what did not train."""
        return "4bit" if self.config.get("load_in_4bit") else "8bit" if self.config.get("load_in_8bit") else None


def read_run(name: str) -> FinetunedRun | None:
    """The run that `name` is the folder of, or a checkpoint's; None for any other model.

    Raises:
        UsageError: for a run that has not saved its weights yet, and a record that is damaged.
    """
    folder = Path(name)
    whole = folder.resolve()
    home = whole.parent if whole.name.startswith("checkpoint-") else folder
    part: Any = next((part for part, file in PARTS.items() if (folder / file).is_file()), None)
    is_run = (home / "run.json").is_file()
    if part is None and is_run:
        checkpoints = [path.name for path in sorted(folder.glob("checkpoint-*"))]
        there = f" It has {', '.join(checkpoints)}." if checkpoints else ""
        raise UsageError(f"{name!r} is a run without trained weights: it did not end.{there}")
    if part is None or (part == "whole" and not is_run):
        return None
    state = folder / "trainer_state.json"
    return FinetunedRun(
        folder,
        part,
        _read(home / "config.yaml") or {},
        _read(home / "run.json") or {},
        (_read(state) or {}).get("log_history", []),
    )


def _read(path: Path) -> Any:
    """A YAML or JSON file, None where it is not there."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        raise UsageError(f"{path} is damaged.") from None
