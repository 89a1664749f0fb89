"""A run's folder: what its files are called, and where in it a run can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

RECORD, CONFIG = "run.json", "config.yaml"
STATE, CHECKPOINT = "trainer_state.json", "checkpoint-"  # as Hugging Face calls them
_WHAT_TRAINS = ("unfrozen_", "use_peft", "lora_", "load_in_")


def what_trains(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.yaml that say it."""
    return {key: value for key, value in config.items() if key.startswith(_WHAT_TRAINS)}


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint that was written to its end; Hugging Face writes trainer_state.json last."""
    steps = {}
    for file in Path(folder).glob(f"{CHECKPOINT}*/{STATE}"):
        with suppress(ValueError):  # half a file, or a folder of another name
            json.loads(file.read_text(encoding="utf-8"))
            steps[step_of(file.parent)] = file.parent
    return str(steps[max(steps)]) if steps else None


def step_of(checkpoint: str | Path) -> int:
    """The step after which a checkpoint was written, by its folder's name."""
    number = Path(checkpoint).name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
