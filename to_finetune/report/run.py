"""Read and check a run's folder for its page; every file but run.json may be missing."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.report.plot import series
from to_finetune.runs import CONFIG, PARAMETERS, RECORD, SAMPLES, SLOPES, STATE, last_checkpoint, mapping, read

TITLES = {"diagonal_to": "Diagonal TO", "rank_one_to": "RankOne TO", "full_to": "Full TO", "adamw_torch": "AdamW"}
Row = dict[str, Any]
T = TypeVar("T")


@dataclass
class Parameters:
    """The number of weights of each parameter of the model, and the names of those that train."""

    sizes: dict[str, int]
    trained: set[str]


@dataclass
class TensorSlope:
    """One tensor's slope: its size at each recorded step, the rest of `to_finetune.optim.slopes.Slope` at the last."""

    sizes: list[float]
    weight: float
    quantiles: list[float]


@dataclass
class Slopes:
    """The contents of slopes.json."""

    form: str  # diagonal, rank_one
    grad_scale: str | None
    sample: int  # the most elements sampled from a tensor
    steps: list[int]
    tensors: dict[str, TensorSlope]


@dataclass
class Sample:
    """A row of the data, and the model's answers before and after training; None for a missing answer."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


@dataclass
class RunData:
    """A run, as far as its folder describes it."""

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
        return TITLES.get(name, name)

    @property
    def options(self) -> Row:
        """The options of a Trainable Optimizer, by name."""
        options = self.config.get("optim_args")
        return options if isinstance(options, dict) else {}

    @property
    def model(self) -> str:
        return Path(str(self.config.get("model_name_or_path", "unknown model"))).name

    def measured(self, name: str) -> float | None:
        """Return a result of run.json by name, or ``tokens_per_second``, the median over the log."""
        if name == "tokens_per_second":
            speeds = [y for y in series(self.history, name)[1] if math.isfinite(y)]
            return statistics.median(speeds) if speeds else None
        value = self.record.get("results", {}).get(name)
        return value if value is not None and math.isfinite(value) else None


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read several runs.

    Raises:
        UsageError: for a run that is named twice, and as `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UsageError(f"{str(folder)!r} is given twice: each run once.")
    return runs


def read_run(folder: Path) -> RunData:
    """Read a run that has finished, failed, or is still running.

    Raises:
        UsageError: for a folder that does not exist or holds no run, and for a damaged file.
    """
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        names = [path.name for path in beside if (path / RECORD).is_file()]
        raise UsageError(f"{str(folder)!r} is no folder.{did_you_mean(folder.name, names)}")
    if not (folder / RECORD).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
        there = f" The runs in it are {', '.join(inside)}." if inside else ""
        raise UsageError(f"{str(folder)!r} holds no {RECORD}, so it is no run of finetune.py.{there}")
    has_state = (folder / STATE).is_file()  # else the run is still going, or was cut short
    state = (folder if has_state else Path(last_checkpoint(folder) or folder)) / STATE
    samples = _optional(folder / SAMPLES, lambda found: (_samples(found), bool(found["held_out"])))
    return RunData(
        folder,
        record=read(folder / RECORD, _record) or {},
        config=_optional(folder / CONFIG, mapping) or {},
        history=_optional(state, _history) or [],
        parameters=_optional(folder / PARAMETERS, _parameters),
        slopes=_optional(folder / SLOPES, _slopes),
        samples=samples[0] if samples else [],
        held_out_samples=bool(samples and samples[1]),
    )


def _optional(path: Path, check: Callable[[Any], T]) -> T | None:
    try:
        return read(path, check)
    except UsageError as error:
        raise UsageError(f"{error} Without this file the page leaves its part out.") from None


def _record(found: Any) -> Row:
    record = mapping(found)
    for key in ("status", "command"):
        if not isinstance(record[key], str):
            raise TypeError(f"{key} is no text")
    if not shlex.split(record["command"]):
        raise ValueError("command is empty")
    for key in ("results", "proofs", "versions", "memory", "subset"):
        mapping(record.setdefault(key, {}))
    for name, value in record["results"].items():
        if value is not None:
            record["results"][name] = value + 0  # TypeError unless it is a number
    planned, measured = record["memory"].get("planned") or {}, record["memory"].get("measured")
    record["memory"]["planned"] = {str(name): int(count) for name, count in planned.items()}
    record["memory"]["measured"] = int(measured or 0)
    return record


def _history(found: Any) -> list[Row]:
    numbers = (int, float)
    rows = [{k: v for k, v in row.items() if isinstance(v, numbers)} for row in mapping(found)["log_history"]]
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
    if any(len(one.quantiles) not in (0, len(found["quantiles_at"])) for one in tensors.values()):
        raise ValueError("other quantiles")
    return Slopes(str(found["form"]), found["grad_scale"], int(found.get("sample", 1 << 16)), steps, tensors)


def _samples(found: Any) -> list[Sample]:
    return [
        Sample(str(row["prompt"]), str(row["reference"]), row.get("before"), row.get("after")) for row in found["rows"]
    ]


def _numbers(values: Sequence[Any]) -> list[float]:
    return [_number(x) for x in values]


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)
