"""A run's folder as its page takes it: everything is read and checked here, and all but run.json may be missing."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.optim.slopes import QUANTILES
from to_finetune.report.plot import series

RUN, STATE = "run.json", "trainer_state.json"
OPTIMIZERS = {"diagonal_to": "Diagonal TO", "rank_one_to": "RankOne TO", "full_to": "Full TO", "adamw_torch": "AdamW"}
Row = dict[str, Any]
T = TypeVar("T")


@dataclass
class Parameters:
    """The number of weights of each parameter of the model, and the names of those that train."""

    sizes: dict[str, int]
    trained: set[str]


@dataclass
class TensorSlope:
    """One tensor's slope: its size at each moment, and what `to_finetune.optim.slopes.Slope` has at the last."""

    sizes: list[float]
    weight: float
    quantiles: list[float]


@dataclass
class Slopes:
    """What slopes.json holds."""

    form: str  # diagonal, rank_one
    grad_scale: str | None
    steps: list[int]
    tensors: dict[str, TensorSlope]


@dataclass
class Sample:
    """A row of the data and the model's answers to it; None where there is none."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


@dataclass
class RunData:
    """A run, as far as its folder has it."""

    folder: Path
    record: Row  # run.json
    config: Row  # config.yaml
    history: list[Row]  # the Trainer's log
    parameters: Parameters | None
    slopes: Slopes | None
    samples: list[Sample]
    held_out_samples: bool

    @property
    def optimizer(self) -> str:
        name = str(self.config.get("optim", "unknown optimizer"))
        return OPTIMIZERS.get(name, name)

    @property
    def options(self) -> Row:
        """Of a Trainable Optimizer, by name."""
        options = self.config.get("optim_args")
        return options if isinstance(options, dict) else {}

    @property
    def model(self) -> str:
        return Path(str(self.config.get("model_name_or_path", "unknown model"))).name

    def measured(self, name: str) -> float | None:
        """A result of run.json by its name, or ``tokens_per_second``: the median of the log's."""
        if name == "tokens_per_second":
            speeds = [y for y in series(self.history, name)[1] if math.isfinite(y)]
            return statistics.median(speeds) if speeds else None
        value = self.record.get("results", {}).get(name)
        return value if value is not None and math.isfinite(value) else None


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Several, each once.

    Raises:
        UsageError: for a run that is named twice, and what `read_run` refuses.
    """
    runs = [read_run(folder) for folder in folders]
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UsageError(f"{str(folder)!r} is given twice: each run once.")
    return runs


def read_run(folder: Path) -> RunData:
    """A run that has ended, well or badly, or goes on.

    Raises:
        UsageError: for a folder that is none or holds no run, and for a damaged file.
    """
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        names = [path.name for path in beside if (path / RUN).is_file()]
        raise UsageError(f"{str(folder)!r} is no folder.{did_you_mean(folder.name, names)}")
    if not (folder / RUN).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RUN}"))
        there = f" The runs in it are {', '.join(inside)}." if inside else ""
        raise UsageError(f"{str(folder)!r} holds no {RUN}, so it is no run of finetune.py.{there}")
    samples = _read(folder / "samples.json", lambda found: (_samples(found), bool(found["held_out"])))
    return RunData(
        folder,
        record=_read(folder / RUN, _record) or {},
        config=_read(folder / "config.yaml", _mapping) or {},
        history=_read(_last_state(folder), _history) or [],
        parameters=_read(folder / "parameters.json", _parameters),
        slopes=_read(folder / "slopes.json", _slopes),
        samples=samples[0] if samples else [],
        held_out_samples=bool(samples and samples[1]),
    )


def _last_state(folder: Path) -> Path:
    """The Trainer's log of the whole run, or the one of its last checkpoint."""
    checkpoints = folder.glob(f"checkpoint-*/{STATE}")
    steps = {path: path.parent.name.rpartition("-")[2] for path in checkpoints}
    numbered = {path: int(step) for path, step in steps.items() if step.isdigit()}
    if (folder / STATE).is_file() or not numbered:
        return folder / STATE
    return max(numbered, key=numbered.__getitem__)


def _read(path: Path, check: Callable[[Any], T]) -> T | None:
    """A JSON or YAML file, checked; None where there is none."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return check(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "" if path.name == RUN else " Without this file the page leaves its part out."
        raise UsageError(f"{path} is damaged ({reason}).{remedy}") from None


def _mapping(found: Any) -> Row:
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}, not a mapping")
    return found


def _record(found: Any) -> Row:
    record = _mapping(found)
    for key in ("status", "command"):
        if not isinstance(record[key], str):
            raise TypeError(f"{key} is no text")
    if not shlex.split(record["command"]):
        raise ValueError("command is empty")
    for key in ("results", "proofs", "versions", "memory", "subset"):
        _mapping(record.setdefault(key, {}))
    for name, value in record["results"].items():
        if value is not None:
            record["results"][name] = value + 0  # TypeError for what is no number
    planned, measured = record["memory"].get("planned") or {}, record["memory"].get("measured")
    record["memory"]["planned"] = {str(name): int(count) for name, count in planned.items()}
    record["memory"]["measured"] = int(measured or 0)
    return record


def _history(found: Any) -> list[Row]:
    numbers = (int, float)
    rows = [{k: v for k, v in row.items() if isinstance(v, numbers)} for row in _mapping(found)["log_history"]]
    return [row for row in rows if "step" in row]


def _parameters(found: Any) -> Parameters:
    sizes = {str(name): int(size) for name, size in found["sizes"].items()}
    trained = set(found["trained"])
    if not trained <= sizes.keys() or sum(sizes.values()) <= 0:
        raise ValueError("what trains is not among the parameters")
    return Parameters(sizes, trained)


def _slopes(found: Any) -> Slopes:
    steps = [int(step) for step in found["steps"]]
    tensors = {
        str(name): TensorSlope(_numbers(one["sizes"]), _number(one["weight"]), _numbers(one["quantiles"]))
        for name, one in found["tensors"].items()
    }
    if any(len(one.sizes) != len(steps) for one in tensors.values()):
        raise ValueError("not as many sizes as steps")
    if any(len(one.quantiles) not in (0, len(QUANTILES)) for one in tensors.values()):
        raise ValueError("other quantiles")
    return Slopes(str(found["form"]), found["grad_scale"], steps, tensors)


def _samples(found: Any) -> list[Sample]:
    return [
        Sample(str(row["prompt"]), str(row["reference"]), row.get("before"), row.get("after")) for row in found["rows"]
    ]


def _numbers(values: Sequence[Any]) -> list[float]:
    return [_number(x) for x in values]


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)
