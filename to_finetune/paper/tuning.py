"""Choose an experiment's rates: the best trial on one seed, from a grid of lr that is widened at its ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from to_finetune.paper.methods import Trial

Losses = list[float]  # of a training, from its start on; infinite once diverged, NaN beyond an early stop
Criterion = Callable[[Losses], float]

CRITERIA: dict[str, Criterion] = {
    "minimum": lambda losses: min(losses[1:]),  # the paper's
    "area": lambda losses: sum(losses[1:]) / (len(losses) - 1),  # under the curve after the start: rewards speed
}
TUNING_SEED = 0
DIGITS = 9  # significant digits of a loss in a result: more than float32 has


def choose(
    lrs: Sequence[float],
    trials_of: Callable[[list[float]], list[Trial]],
    losses_of: Callable[[list[Trial]], list[Losses]],
    widenings: int,
) -> dict[str, Any]:
    """Choose the best trial by each criterion, widening the grid of lr while a winner is at its end.

    Args:
        lrs: the initial values of lr, a geometric series.
        trials_of: returns the trials for values of lr.
        losses_of: returns the losses of trials on the tuning seed.
        widenings: how often the grid is widened at most.

    Returns:
        JSON: the number of `trials`, how many `diverged`, the `lrs` that were tried, by how many values the grid was
        `widened`, and the `winners` by criterion, None if all diverged.
    """
    tried: list[Trial] = []
    curves: list[Losses] = []
    grid, new = list(lrs), list(lrs)
    winners: dict[str, Trial | None] = {}
    for widened in range(widenings + 1):
        wanted = trials_of(new)
        tried, curves = tried + wanted, curves + losses_of(wanted)
        winners = {name: best(tried, curves, score) for name, score in CRITERIA.items()}
        if widened == widenings:
            break
        at = [winner["lr"] if winner else grid[0] for winner in winners.values()]  # if all diverged, go down
        new = beyond(grid, at)
        if not new:
            break
        grid = sorted([*grid, *new])
    return {
        "trials": len(tried),
        "diverged": sum(math.inf in losses for losses in curves),
        "lrs": rounded(grid),
        "widened": len(grid) - len(lrs),
        "winners": rounded(winners),
    }


def best(trials: list[Trial], curves: list[Losses], score: Criterion) -> Trial | None:
    """Return the trial with the lowest score among those trained to the end; None if there is none."""
    finished = [i for i, losses in enumerate(curves) if math.isfinite(losses[-1])]
    return trials[min(finished, key=lambda i: score(curves[i]))] if finished else None


def beyond(lrs: list[float], winners: list[float]) -> list[float]:
    """Return the values of lr to try next: about half a decade beyond each end of the grid that a winner is at."""
    ratio = lrs[1] / lrs[0]
    more = range(1, round(0.5 / math.log10(ratio)) + 1)
    lower = [lrs[0] / ratio**i for i in more if lrs[0] in winners]
    upper = [lrs[-1] * ratio**i for i in more if lrs[-1] in winners]
    return lower + upper


def points(steps: int, evaluations: int) -> list[int]:
    """Return the evenly spaced steps after which the loss is taken, starting with 0."""
    return [steps * i // evaluations for i in range(evaluations + 1)]


def rounded(value: Any, digits: int = 6) -> Any:
    """Round every float in `value` to so many significant digits, None if it is not finite; keep all else."""
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, digits) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
