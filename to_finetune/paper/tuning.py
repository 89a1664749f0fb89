"""How every experiment chooses its rates: the best trial on one seed, from a grid of lr that is widened at its ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from to_finetune.paper.methods import Trial

Losses = list[float]  # of a training, from its start on; infinite once diverged, NaN where it was not trained so far
Criterion = Callable[[Losses], float]

CRITERIA: dict[str, Criterion] = {
    "minimum": lambda losses: min(losses[1:]),  # the paper's
    "area": lambda losses: sum(losses[1:]) / (len(losses) - 1),  # under the curve from the first evaluation on: speed
}
TUNING_SEED = 0
DIGITS = 9  # of a loss in a result: more than float32 has


def choose(
    lrs: Sequence[float],
    trials_of: Callable[[list[float]], list[Trial]],
    losses_of: Callable[[list[Trial]], list[Losses]],
    widenings: int,
) -> dict[str, Any]:
    """The best trial by each criterion; no winner stands at an end of the grid, unless it was widened so often.

    Args:
        lrs: the values of lr to begin with, a geometric series.
        trials_of: the trials that values of lr stand for.
        losses_of: the losses of trials on the tuning seed.

    Returns:
        JSON: the number of `trials`, how many `diverged`, the `lrs` that were tried and by how many the grid was
        `widened`, and the `winners` by criterion, None where all diverged.
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
        at = [winner["lr"] if winner else grid[0] for winner in winners.values()]  # where all diverged, go down
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
    """The trial with the lowest score, of those that were trained to the end."""
    finished = [i for i, losses in enumerate(curves) if math.isfinite(losses[-1])]
    return trials[min(finished, key=lambda i: score(curves[i]))] if finished else None


def beyond(lrs: list[float], winners: list[float]) -> list[float]:
    """The values to try next: as many as make up half a decade, at each end of the grid where a winner stands."""
    ratio = lrs[1] / lrs[0]
    more = range(1, round(0.5 / math.log10(ratio)) + 1)
    lower = [lrs[0] / ratio**i for i in more if lrs[0] in winners]
    upper = [lrs[-1] * ratio**i for i in more if lrs[-1] in winners]
    return lower + upper


def points(steps: int, evaluations: int) -> list[int]:
    """After how many steps the loss is taken, evenly, the start first."""
    return [steps * i // evaluations for i in range(evaluations + 1)]


def rounded(value: Any, digits: int = 6) -> Any:
    """Every float in it with so many digits, None for one that is not finite; anything else as it is."""
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, digits) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
