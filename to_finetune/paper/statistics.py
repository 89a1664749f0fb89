"""The statistics in the tables: R, how far a method's loss is below another's, and whether that could be chance."""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from to_finetune.paper.tuning import CRITERIA

Curve = Sequence[float | None]  # losses at the recorded steps, None from where the training has diverged
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
RESOLUTION = 0.001  # percent; smaller differences between float32 losses are never called significant


class Comparison(NamedTuple):
    """A method against a reference, paired by seed: the same initial weights and batches.

    seeds: the number of the method's trainings; 0 if all its trials diverged, so that none was judged.
    diverged: how many of these diverged.
    r: R of each seed in percent, above 0 if the method's loss is lower; empty if either diverged on any seed.
    mean, sd: of r; sd is the sample standard deviation, None for one seed.
    p_normal, p_t: p-values of the two-sided Wald test that the mean of R is 0; None without sd.
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
        """Stars for p_t, the larger of the two p-values; none if the mean is below the resolution."""
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
    """Return each seed's loss by a criterion of `CRITERIA`, None if the training diverged."""
    score = CRITERIA[criterion]
    finite = [[loss for loss in curve if loss is not None] for curve in curves]
    return [score(known) if len(known) == len(curve) else None for known, curve in zip(finite, curves, strict=True)]


def compare(losses: Sequence[float | None], reference: Sequence[float | None]) -> Comparison:
    """Compute ``R = 100 (1 - loss / reference)`` over the seeds, in percent, and test its mean."""
    diverged = sum(loss is None for loss in losses)
    pairs = [(loss, other) for loss, other in zip(losses, reference, strict=False) if loss is not None and other]
    if not losses or len(pairs) < max(len(losses), len(reference)):
        return Comparison(len(losses), diverged)
    r = tuple(100 * (1 - loss / other) for loss, other in pairs)
    if len(r) == 1:
        return Comparison(1, 0, r, r[0])
    return Comparison(len(r), 0, r, fmean(r), stdev(r), *wald(r))


def wald(values: Sequence[float]) -> tuple[float, float]:
    """Return two-sided p-values for a mean of 0: normal, and Student's t with len(values) - 1 degrees of freedom."""
    from scipy.stats import norm, t

    mean, error = fmean(values), stdev(values) / sqrt(len(values))
    if not mean:
        return 1.0, 1.0
    statistic = abs(mean) / error if error else inf
    return float(2 * norm.sf(statistic)), float(2 * t.sf(statistic, len(values) - 1))
