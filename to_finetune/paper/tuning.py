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
        new = beyond(grid, [winner["lr"] for winner in winners.values() if winner])
        if not new:
            break
        grid = sorted([*grid, *new])
    return {
        "trials": len(tried),
        "diverged": sum(math.inf in losses for losses in curves),
        "lrs": [rounded(lr) for lr in grid],
        "widened": len(grid) - len(lrs),
        "winners": {
            name: winner and {key: rounded(value) for key, value in winner.items()} for name, winner in winners.items()
        },
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


def rounded(value: Any) -> Any:
    """A number with six digits, None for one that is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
