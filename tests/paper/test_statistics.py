"""R and its test, against values by hand and against scipy."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import pytest
from scipy.stats import ttest_1samp

from to_finetune.paper.statistics import Comparison, compare, scores, wald

ADAM = [1.0, 2.0, 4.0]
BETTER = [0.9, 1.9, 3.0]  # by 10, 5 and 25 percent


def test_r_is_paired_by_seed_and_in_percent() -> None:
    found = compare(BETTER, ADAM)
    assert found.r == pytest.approx((10, 5, 25))
    assert found.mean == pytest.approx(40 / 3)
    assert found.sd == pytest.approx(sqrt((10**2 + 25**2 + 35**2) / 9 / 2))
    assert (found.seeds, found.diverged) == (3, 0)
    assert compare(ADAM, BETTER).r == pytest.approx((-100 / 9, -100 / 19, -100 / 3))


def test_both_p_are_two_sided() -> None:
    found = compare(BETTER, ADAM)
    z = (40 / 3) / (sqrt(325 / 3) / sqrt(3))
    assert found.p_t == pytest.approx(ttest_1samp([10, 5, 25], 0).pvalue)
    assert found.p_normal == pytest.approx(2 * (1 - NormalDist().cdf(z)))
    assert wald([-10, -5, -25]) == pytest.approx(wald([10, 5, 25]))
    assert wald([1.0, 2.0, 3.0, 2.5, 1.5])[1] == pytest.approx(ttest_1samp([1.0, 2.0, 3.0, 2.5, 1.5], 0).pvalue)


def test_equal_losses_are_no_difference() -> None:
    found = compare(ADAM, ADAM)
    assert (found.r, found.mean, found.sd, found.p_normal, found.p_t) == ((0, 0, 0), 0, 0, 1, 1)
    assert (found.marks, found.verdict) == ("", "no difference")


@pytest.mark.parametrize(("losses", "verdict"), [([0.5, 1.0, 2.0], "better"), ([2.0, 4.0, 8.0], "worse")])
def test_a_difference_without_spread_is_certain(losses: list[float], verdict: str) -> None:
    found = compare(losses, ADAM)
    assert (found.sd, found.p_normal, found.p_t) == (0, 0, 0)
    assert (found.marks, found.verdict) == ("***", verdict)


@pytest.mark.parametrize(
    ("losses", "reference", "seeds", "diverged"),
    [([0.9, None, None], ADAM, 3, 2), (ADAM, [None, 2.0, 4.0], 3, 0), ([], ADAM, 0, 0), (ADAM, [0.0, 2.0, 4.0], 3, 0)],
    ids=["diverged", "reference diverged", "none judged", "a reference of 0"],
)
def test_no_statistics_without_all_losses(
    losses: list[float | None], reference: list[float | None], seeds: int, diverged: int
) -> None:
    found = compare(losses, reference)
    assert found == Comparison(seeds, diverged)
    assert (found.marks, found.verdict) == ("", "no loss")


def test_one_seed_has_no_test() -> None:
    found = compare([0.5], [1.0])
    assert found == Comparison(1, 0, (50.0,), 50.0)
    assert (found.marks, found.verdict) == ("", "no difference")


@pytest.mark.parametrize(
    ("p", "marks"),
    [(1.0, ""), (0.05, ""), (0.0499, "*"), (0.01, "*"), (0.0099, "**"), (0.001, "**"), (0.0009, "***"), (None, "")],
)
def test_marks_are_of_t(p: float | None, marks: str) -> None:
    assert Comparison(5, 0, mean=1.0, p_normal=0.0, p_t=p).marks == marks


def test_scores_leave_the_start_out_and_none_for_a_diverged_seed() -> None:
    curves = [[0.1, 5.0, 3.0, 4.0], [0.1, 2.0, None, None], [None, None, None, None]]
    assert scores(curves, "minimum") == [3.0, None, None]
    assert scores(curves, "area") == [4.0, None, None]
