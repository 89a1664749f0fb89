"""Run one case: each method's rates are tuned on one seed, with equal numbers of trials, and judged on others.

All trials are screened over part of the training. The best twelfth of each schedule's trials by each criterion is then
trained again, from the start to the end, and the winner is chosen by the full training loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from to_finetune.paper.cases import Case, Protocol
from to_finetune.paper.data import Classification
from to_finetune.paper.members import Problem, train
from to_finetune.paper.methods import METHODS, SCHEDULES, Method, Trial
from to_finetune.paper.tuning import CRITERIA, DIGITS, TUNING_SEED, Losses, choose, points, rounded

WIDENINGS = 12  # of a grid at most, each by a factor of sqrt(10) at the end where a winner is
Progress = Callable[[str, int, int], None]  # takes a description, the member steps since the last call, and the total


def run(case: Case, data: Classification, protocol: Protocol, progress: Progress) -> dict[str, Any]:
    """Tune and judge every method; return JSON with losses rounded to nine digits, null once diverged."""
    problem = Problem(with_ones(data), data.y, data.classes, case.hidden, case.l2)
    steps = protocol.steps(case.dataset, len(data.y))
    methods = {}
    for name in protocol.methods:
        method = METHODS[name]
        trials_of = partial(thinned_trials, method, protocol.thinned)
        losses_of = partial(tuning_losses, problem, method, protocol, steps, progress)
        choice = choose(method.lrs, trials_of, losses_of, WIDENINGS)
        methods[name] = choice | {"curves": judge(problem, method, choice["winners"], protocol, steps, progress)}
    return {
        "case": asdict(case),
        "data": {"rows": len(data.y), "features": data.x.shape[1], "classes": data.classes, "note": data.note},
        "weights": problem.n,
        "protocol": asdict(protocol),
        "steps": points(steps, protocol.evaluations),
        "methods": methods,
    }


def with_ones(data: Classification) -> torch.Tensor:
    """Append a column of ones to the inputs, (rows, features + 1)."""
    return torch.cat([data.x, torch.ones_like(data.x[:, :1])], dim=1)


def thinned_trials(method: Method, thinned: int, lrs: list[float]) -> list[Trial]:
    return method.trials(lrs)[::thinned]


def tuning_losses(
    problem: Problem, method: Method, protocol: Protocol, steps: int, progress: Progress, trials: list[Trial]
) -> list[Losses]:
    """Return each trial's losses on the tuning seed; NaN after the screening unless it is promising."""

    def losses(trials: list[Trial], what: str, stop_after: int | None, rows: torch.Tensor | None) -> list[Losses]:
        total = len(trials) * points(steps, protocol.evaluations)[-1 if stop_after is None else stop_after]
        return train(
            problem,
            method,
            trials,
            [TUNING_SEED],
            steps=steps,
            batch_size=protocol.batch_size,
            evaluations=protocol.evaluations,
            rows=rows,
            stop_after=stop_after,
            compiled=protocol.compiled,
            progress=lambda done: progress(f"{method.title}, {what}", done, total),
        )[0].tolist()

    shuffled = torch.randperm(len(problem.y), generator=torch.Generator().manual_seed(TUNING_SEED))
    early = losses(trials, "screening", protocol.screened, shuffled[: protocol.screening_rows])
    kept = promising(trials, early)
    late = losses([trials[i] for i in kept], "tuning", None, None)
    dropped = [math.nan] * (protocol.evaluations - protocol.screened)
    return [late[kept.index(i)] if i in kept else curve + dropped for i, curve in enumerate(early)]


def promising(trials: list[Trial], curves: list[Losses]) -> list[int]:
    """Return the sorted indices of the best twelfth of each schedule's trials by each criterion, at least one each."""
    kept: set[int] = set()
    for schedule in SCHEDULES:
        of_schedule = [i for i, trial in enumerate(trials) if trial["schedule"] == schedule]
        for score in CRITERIA.values():
            ranked = sorted(of_schedule, key=lambda i: (math.isinf(curves[i][-1]), score(curves[i])))
            kept |= set(ranked[: max(1, len(ranked) // 12)])
    return sorted(kept)


def judge(
    problem: Problem,
    method: Method,
    winners: dict[str, Trial | None],
    protocol: Protocol,
    steps: int,
    progress: Progress,
) -> dict[str, list[list[float | None]]]:
    """Return the full training losses of each criterion's winner, one list per seed; none if all trials diverged."""
    trials: list[Trial] = []
    for winner in winners.values():
        if winner and winner not in trials:
            trials.append(winner)
    if not trials:
        return {name: [] for name in winners}
    seeds = list(protocol.seeds)
    total = len(trials) * len(seeds) * steps
    losses = train(
        problem,
        method,
        trials,
        seeds,
        steps=steps,
        batch_size=protocol.batch_size,
        evaluations=protocol.evaluations,
        compiled=protocol.compiled,
        progress=lambda done: progress(f"{method.title}, judging", done, total),
    )
    return {
        name: rounded(losses[:, trials.index(winner)].tolist(), DIGITS) if winner else []
        for name, winner in winners.items()
    }
