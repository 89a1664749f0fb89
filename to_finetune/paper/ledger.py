"""Trainings that run one after another: each finished one is a line of a file, from which a run resumes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from to_finetune.errors import UsageError
from to_finetune.files import write_whole
from to_finetune.paper.methods import Trial
from to_finetune.paper.tuning import DIGITS, TUNING_SEED, Losses, choose, rounded


class Ledger:
    """The trainings of one experiment.

    Args:
        path: the file; its first line is the protocol. An incomplete last line is dropped.
        train: runs a method's trial with a seed and returns its losses, infinite once diverged; not called for
            trainings that are in the file.
        progress: called with a description of each training before it starts.

    Raises:
        UsageError: if the file is of another protocol, or damaged.
    """

    def __init__(
        self,
        path: Path,
        protocol: dict[str, Any],
        train: Callable[[str, Trial, int], Losses],
        progress: Callable[[str], None],
    ) -> None:
        self.path, self._train, self._progress = path, train, progress
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps(protocol) + "\n"
        found = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        text = found[: found.rfind("\n") + 1] or header
        if not text.startswith(header):
            raise UsageError(f"{path} has trainings of another protocol: move it away.")
        if text != found:
            write_whole(path, text)
        self.seconds = 0.0  # of all trainings, including those of earlier runs
        self._finished: dict[str, list[float | None]] = {}
        for number, line in enumerate(text.splitlines()[1:], start=2):
            try:
                training = json.loads(line)
                self._finished[_key(training["method"], training["trial"], training["seed"])] = training["losses"]
                self.seconds += training["seconds"]
            except (ValueError, LookupError, TypeError, AttributeError):
                raise UsageError(f"{path} is damaged in line {number}: delete that line.") from None

    def losses(self, method: str, trial: Trial, seed: int) -> list[float | None]:
        """Return the losses of one training, rounded, None once diverged; train only if the file lacks them."""
        key = _key(method, trial, seed)
        if key not in self._finished:
            self._progress(f"training {len(self._finished) + 1}: {key}")
            began = time.perf_counter()
            found = rounded(self._train(method, trial, seed), DIGITS)
            seconds = round(time.perf_counter() - began, 1)
            line = {"method": method, "trial": trial, "seed": seed, "seconds": seconds, "losses": found}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._finished[key] = found
            self.seconds += seconds
        return self._finished[key]

    def compare(
        self,
        method: str,
        lrs: Sequence[float],
        trials_of: Callable[[list[float]], list[Trial]],
        widenings: int,
        seeds: Sequence[int],
    ) -> dict[str, Any]:
        """Return the result of `tuning.choose`, and the winners' `curves` on the seeds; none if all trials diverged."""

        def losses_of(trials: list[Trial]) -> list[Losses]:
            all_losses = [self.losses(method, trial, TUNING_SEED) for trial in trials]
            return [[math.inf if loss is None else loss for loss in losses] for losses in all_losses]

        choice = choose(lrs, trials_of, losses_of, widenings)
        return choice | {
            "curves": {
                name: [self.losses(method, winner, seed) for seed in seeds] if winner else []
                for name, winner in choice["winners"].items()
            }
        }


def _key(method: str, trial: Trial, seed: int) -> str:
    values = " ".join(f"{name}={value:g}" if isinstance(value, float) else str(value) for name, value in trial.items())
    return f"{method} {values}, seed {seed}"
