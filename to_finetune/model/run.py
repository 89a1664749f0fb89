"""The contents of a run's folder, or of one of its checkpoints: the trained part, the recipe and the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from to_finetune.errors import UsageError
from to_finetune.model.quantized import Quantization
from to_finetune.model.trained import TRAINED_WEIGHTS_NAME
from to_finetune.runs import CHECKPOINT, CONFIG, RECORD, STATE, home_of, located, mapping, read

# What was trained -> the file that shows it; the first file found decides.
PARTS = {"subset": TRAINED_WEIGHTS_NAME, "adapter": "adapter_config.json", "whole": "config.json"}


class FinetunedRun(NamedTuple):
    """A run on disk. Each of the last three is empty if its file is missing, as after a Trainer of one's own."""

    folder: Path  # where the weights are
    part: Literal["subset", "adapter", "whole"]
    config: dict[str, Any]  # config.yaml
    record: dict[str, Any]  # run.json
    history: list[dict[str, Any]]  # the Trainer's log

    @property
    def base(self) -> str | None:
        """The model that the run began from, as it is found from here, if config.yaml names it."""
        name = self.config.get("model_name_or_path")
        return None if name is None else located(name, self.folder)

    @property
    def quantization(self) -> Quantization | None:
        """The quantisation of the weights that did not train, or None."""
        return "4bit" if self.config.get("load_in_4bit") else "8bit" if self.config.get("load_in_8bit") else None


def find_run(name: str) -> FinetunedRun | None:
    """Return the run whose folder or checkpoint is `name`; None for any other model.

    Raises:
        UsageError: for a run that has not saved its weights yet, and a record that is damaged.
    """
    folder = Path(name)
    home = home_of(folder)
    part: Any = next((part for part, file in PARTS.items() if (folder / file).is_file()), None)
    is_run = (home / RECORD).is_file()
    if part is None and is_run:
        checkpoints = [path.name for path in sorted(folder.glob(f"{CHECKPOINT}*"))]
        there = f" It has {', '.join(checkpoints)}." if checkpoints else ""
        raise UsageError(f"{name!r} is a run without trained weights: it did not end.{there}")
    if part is None or (part == "whole" and not is_run):
        return None
    return FinetunedRun(
        folder,
        part,
        config=read(home / CONFIG, mapping) or {},
        record=read(home / RECORD, mapping) or {},
        history=read(folder / STATE, lambda state: mapping(state).get("log_history", [])) or [],
    )
