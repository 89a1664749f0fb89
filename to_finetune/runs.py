"""A run's folder: the names of its files, how they are read, and the checkpoint to resume from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from to_finetune.errors import UsageError

RECORD, CONFIG, REPORT, LOSS_CURVE = "run.json", "config.yaml", "report.html", "loss.png"
PARAMETERS, SLOPES, SAMPLES = "parameters.json", "slopes.json", "samples.json"  # what the report shows besides
STATE, CHECKPOINT = "trainer_state.json", "checkpoint-"  # as Hugging Face calls them
_WHAT_TRAINS = ("unfrozen_", "use_peft", "lora_", "load_in_")  # prefixes of these settings
T = TypeVar("T")


def what_trains(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.yaml that say what trains, and how its base is quantised."""
    return {key: value for key, value in config.items() if key.startswith(_WHAT_TRAINS)}


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the last complete checkpoint, or None; Hugging Face writes trainer_state.json last."""
    steps = {}
    for file in Path(folder).glob(f"{CHECKPOINT}*/{STATE}"):
        with suppress(ValueError):  # a file that was not written to its end
            json.loads(file.read_text(encoding="utf-8"))
            steps[step_of(file.parent)] = file.parent
    return str(steps[max(steps)]) if steps else None


def step_of(checkpoint: str | Path) -> int:
    """Return the step of a checkpoint from its folder's name; 0 if the name has none."""
    number = Path(checkpoint).name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def home_of(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a run, given it or one of the run's checkpoints."""
    whole = Path(folder).resolve()
    return whole.parent if whole.name.startswith(CHECKPOINT) else Path(folder)


def located(base: str, folder: str | os.PathLike[str]) -> str:
    """Return the path of a run's base if that was a folder and is there still, else its name, as the run had it."""
    was_there = (read(home_of(folder) / RECORD, mapping) or {}).get("base_folder")
    return was_there if was_there and Path(was_there).is_dir() else base


def read(path: Path, check: Callable[[Any], T]) -> T | None:
    """Read a JSON or YAML file through `check`; return None if there is no file.

    Raises:
        UsageError: for a file that cannot be parsed, or that `check` rejects.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return check(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{path} is damaged ({reason}).") from None


def mapping(found: Any) -> dict[str, Any]:
    """Check, for `read`, that the content is a mapping."""
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}, not a mapping")
    return found
