"""R, how far a method's loss is below another's, and whether that could be chance: what stands in the tables."""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from to_finetune.paper.tuning import CRITERIA

Curve = Sequence[float | None]  # losses at the recorded steps, None from where the training has diverged
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
RESOLUTION = 0.001  # percent: of smaller differences between losses in float32 nothing is said


class Comparison(NamedTuple):
    """A method against a reference, paired by seed: the same initial weights and batches.

    seeds: how many trainings of the method there are; 0 where all its trials diverged, and none was judged.
    diverged: on how many of these it diverged.
    r: R of each seed in percent, above 0 where the method's loss is lower; empty where either diverged on any seed.
    mean, sd: of r; the sample's standard deviation, None for one seed.
    p_normal, p_t: of the two-sided Wald test that the mean of R is 0; None where there is no sd.
    """

    seeds: int
    diverged: int
    r: tuple[float, ...] = ()
    mean: float | None = None
    sd: float | None = None
    p_normal: float | None = None
    p_t: float | None = None

    @property
    def marks(self) -> str:
        """Stars for p_t, the larger of the two p; none where the mean is below the resolution."""
        p = 1.0 if self.p_t is None or self.mean is None or abs(self.mean) < RESOLUTION else self.p_t
        return next((stars for limit, stars in MARKS if p < limit), "")

    @property
    def verdict(self) -> str:
        """The method is significantly "better" or "worse", there is "no difference", or it has "no loss"."""
        if self.mean is None:
            return "no loss"
        if not self.marks:
            return "no difference"
        return "better" if self.mean > 0 else "worse"


def scores(curves: Sequence[Curve], criterion: str) -> list[float | None]:
    """Each seed's loss by a criterion of `CRITERIA`, None where the training diverged."""
    score = CRITERIA[criterion]
    finite = [[loss for loss in curve if loss is not None] for curve in curves]
    return [score(known) if len(known) == len(curve) else None for known, curve in zip(finite, curves, strict=True)]


def compare(losses: Sequence[float | None], reference: Sequence[float | None]) -> Comparison:
    """``R = 100 (1 - loss / reference)`` over the seeds, in percent, and its test."""
    diverged = sum(loss is None for loss in losses)
    pairs = [(loss, other) for loss, other in zip(losses, reference, strict=False) if loss is not None and other]
    if not losses or len(pairs) < max(len(losses), len(reference)):
        return Comparison(len(losses), diverged)
    r = tuple(100 * (1 - loss / other) for loss, other in pairs)
    if len(r) == 1:
        return Comparison(1, 0, r, r[0])
    return Comparison(len(r), 0, r, fmean(r), stdev(r), *wald(r))


def wald(values: Sequence[float]) -> tuple[float, float]:
    """Two-sided p of a mean of 0: by the normal distribution, and by Student's t, one degree fewer than values."""
    from scipy.stats import norm, t

    mean, error = fmean(values), stdev(values) / sqrt(len(values))
    if not mean:
        return 1.0, 1.0
    statistic = abs(mean) / error if error else inf
    return float(2 * norm.sf(statistic)), float(2 * t.sf(statistic, len(values) - 1))
