"""Rates are chosen fairly, and a result file says all of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from to_finetune.paper import contest
from to_finetune.paper.cases import CONVEX, FFN, QUICK, STRONGLY_CONVEX, Case, Protocol
from to_finetune.paper.data import Classification
from to_finetune.paper.members import Problem, train
from to_finetune.paper.methods import METHODS
from to_finetune.paper.tuning import CRITERIA

CASE = Case("made", "mnist", l2=0.1)
PROTOCOL = replace(QUICK, epochs={"mnist": 3}, seeds=(1, 2), evaluations=6, screening_rows=40)
SETTINGS: dict[str, Any] = {"steps": 12, "batch_size": PROTOCOL.batch_size, "evaluations": 6}


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
        assert found["trials"] >= 6
        for criterion in CRITERIA:
            assert found["winners"][criterion]["lr"] in found["lrs"][1:-1]
            assert [len(curve) for curve in found["curves"][criterion]] == [7, 7]


def test_the_winner_is_judged_on_its_own_seeds_over_all_rows(result: dict[str, Any], data: Classification) -> None:
    found = result["methods"]["adam"]
    trial = found["winners"]["area"]
    problem = Problem(contest.with_ones(data), data.y, 3, (), CASE.l2)
    losses = train(problem, METHODS["adam"], [trial], [1, 2], **SETTINGS)
    torch.testing.assert_close(torch.tensor(found["curves"]["area"]), losses[:, 0], rtol=1e-5, atol=0)


def test_screening_keeps_the_best_of_each_schedule() -> None:
    """Two of 24 by each criterion: the lowest loss, and the lowest mean; never one that diverged."""
    trials = [{"schedule": schedule} for schedule in ("constant", "exponential") for _ in range(24)]
    curves = [[9.0, 5.0, 5.0 + i / 100] for i in range(48)]
    curves[7], curves[40], curves[41] = [9.0, 9.0, 1.0], [9.0, 9.0, 1.0], [9.0, 9.0, 2.0]
    curves[0], curves[30] = [9.0, 0.0, math.inf], [9.0, 3.0, 3.0]
    assert contest.promising(trials, curves) == [1, 7, 30, 40, 41]
    assert contest.promising(trials[:3], curves[:3]) == [1]


def test_what_is_not_promising_is_not_trained_to_the_end(data: Classification) -> None:
    problem, method = Problem(contest.with_ones(data), data.y, 3), METHODS["momentum"]
    trials = method.trials(method.lrs)[::4]
    curves = contest.tuning_losses(problem, method, PROTOCOL, 12, lambda what, done, total: None, trials)
    finished = [i for i, curve in enumerate(curves) if math.isfinite(curve[-1])]
    assert [math.isnan(curve[3]) for curve in curves].count(False) == len(finished)
    assert 2 <= len(finished) <= 8
    whole = train(problem, method, trials, [0], **SETTINGS)[0]
    torch.testing.assert_close(torch.tensor(curves)[finished], whole[finished], rtol=1e-5, atol=0)


def test_the_whole_protocol_leaves_incomplete_batches_out() -> None:
    protocol = Protocol("mine", {"mnist": 2})
    assert protocol.steps("mnist", 200) == 6
