"""Rates are chosen fairly, and a result file says all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from to_finetune.paper import contest
from to_finetune.paper.cases import CONVEX, FFN, QUICK, STRONGLY_CONVEX, Case, Protocol
from to_finetune.paper.data import Classification
from to_finetune.paper.members import Problem, train
from to_finetune.paper.methods import METHODS

CASE = Case("made", "mnist", l2=0.1)
PROTOCOL = replace(QUICK, epochs={"mnist": 3}, seeds=(1, 2), evaluations=6, tuning_rows=40)


@pytest.fixture(scope="module")
def data() -> Classification:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(256, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return Classification("made", x, y, 3, "made for the test")


@pytest.fixture(scope="module")
def result(data: Classification) -> dict[str, Any]:
    return contest.run(CASE, data, PROTOCOL, lambda what, done, total: None)


def test_there_are_the_papers_cases() -> None:
    assert len(STRONGLY_CONVEX) == 17
    assert sum(case.dataset == "news20" for case in STRONGLY_CONVEX) == 5
    assert len(CONVEX) == 5
    assert all(case.l2 == 0 and not case.hidden for case in CONVEX)
    assert [(case.dataset, case.hidden) for case in FFN] == [("covtype", (10,)), ("kdd", (10,))]
    assert len({case.name for case in (*STRONGLY_CONVEX, *CONVEX, *FFN)}) == 24


def test_every_method_has_equally_many_trials() -> None:
    counts = {name: len(method.trials(method.lrs)) for name, method in METHODS.items()}
    assert set(counts.values()) == {192}


def test_a_result_is_small_json_with_every_rate(result: dict[str, Any]) -> None:
    assert len(json.dumps(result)) < 30_000
    assert json.loads(json.dumps(result, allow_nan=False))["weights"] == 21
    assert result["steps"] == [0, 2, 4, 6, 8, 10, 12]
    assert list(result["methods"]) == list(METHODS)
    for found in result["methods"].values():
        assert found["trials"] >= found["finalists"] >= 2
        for criterion in contest.CRITERIA:
            assert found["winners"][criterion]["lr"] in found["lrs"][1:-1]
            assert [len(curve) for curve in found["curves"][criterion]] == [7, 7]


def test_the_winner_is_judged_on_its_own_seeds_over_all_rows(result: dict[str, Any], data: Classification) -> None:
    found = result["methods"]["adam"]
    trial = found["winners"]["area"]
    problem = Problem(contest.with_ones(data), data.y, 3, (), CASE.l2)
    losses = train(problem, METHODS["adam"], [trial], [1, 2], 12, PROTOCOL.batch_size, 6)
    torch.testing.assert_close(torch.tensor(found["curves"]["area"]), losses[:, 0], rtol=1e-5, atol=0)


def test_a_grid_is_widened_by_half_a_decade_where_its_winner_stands() -> None:
    assert contest.beyond([0.1, 1.0, 10.0], [1.0]) == []
    assert contest.beyond([1.0, 10**0.5], [1.0]) == pytest.approx([10**-0.5])
    fine = [10 ** (i / 4) for i in range(4)]
    assert contest.beyond(fine, [fine[-1], 1.0]) == pytest.approx([10**-0.25, 10**-0.5, 10, 10**1.25])


def test_a_diverged_curve_never_wins() -> None:
    inf = float("inf")
    assert contest.best([[9, 1.0, inf], [9, 5.0, 4.0], [9, 6.0, 5.0]], min) == 1
    trials = [{"schedule": "constant"}, {"schedule": "exponential"}, {"schedule": "constant"}]
    assert contest.promising(trials, [[9, 1.0, inf], [9, 8.0, 8.0], [9, 3.0, 2.0]]) == [1, 2]


def test_criteria_leave_the_start_out() -> None:
    assert contest.CRITERIA["minimum"]([1.0, 3.0, 2.0, 4.0]) == 2.0
    assert contest.CRITERIA["area"]([1.0, 3.0, 2.0, 4.0]) == 3.0


def test_numbers_keep_six_digits() -> None:
    assert contest.rounded(0.123456789) == 0.123457
    assert contest.rounded(float("inf")) is None
    assert contest.rounded("constant") == "constant"


def test_the_whole_protocol_leaves_incomplete_batches_out() -> None:
    protocol = Protocol("mine", {"mnist": 2})
    assert protocol.steps("mnist", 200) == 6
