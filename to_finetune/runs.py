"""A run's folder: what its files are called, how they are read, and where in it the run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from to_finetune.errors import UsageError

RECORD, CONFIG = "run.json", "config.yaml"
STATE, CHECKPOINT = "trainer_state.json", "checkpoint-"  # as Hugging Face calls them
_WHAT_TRAINS = ("unfrozen_", "use_peft", "lora_", "load_in_")  # how the settings begin that say it
T = TypeVar("T")


def what_trains(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.yaml that say what trains, of what."""
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


def read(path: Path, check: Callable[[Any], T]) -> T | None:
    """What `check` makes of a JSON or YAML file; None where there is none.

    Raises:
        UsageError: for a file that cannot be read, or that `check` stumbles over.
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
    """A check for `read`."""
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}, not a mapping")
    return found
