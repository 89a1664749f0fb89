"""One case: every method's rates are chosen on one seed, with equal numbers of trials, and judged on others.

All trials are screened over a part of the training; the best sixth by each criterion, schedule by schedule, are trained
to the end from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from to_finetune.paper.cases import Case, Protocol
from to_finetune.paper.data import Classification
from to_finetune.paper.members import Problem, train
from to_finetune.paper.methods import METHODS, SCHEDULES, Method, Trial

CRITERIA: dict[str, Callable[[list[float]], float]] = {
    "minimum": lambda losses: min(losses[1:]),  # the paper's
    "area": lambda losses: sum(losses[1:]) / (len(losses) - 1),  # under the curve from the first evaluation on: speed
}
TUNING_SEED = 0
WIDENINGS = 12  # of a grid, each by a factor of the square root of ten at the end where its winner stands
Progress = Callable[[str, int, int], None]  # what is being done, member steps done since the last call, of how many


def run(case: Case, data: Classification, protocol: Protocol, progress: Progress) -> dict[str, Any]:
    """Tune and judge every method; the result is JSON, its losses rounded to six digits, null once diverged."""
    problem = Problem(with_ones(data), data.y, data.classes, case.hidden, case.l2)
    steps = protocol.steps(case.dataset, len(data.y))
    methods = {}
    for name in protocol.methods:
        method = METHODS[name]
        choice = tune(problem, method, protocol, steps, progress)
        methods[name] = choice | {"curves": judge(problem, method, choice["winners"], protocol, steps, progress)}
    evaluated = [steps * i // protocol.evaluations for i in range(protocol.evaluations + 1)]
    return {
        "case": asdict(case),
        "data": {"rows": len(data.y), "features": data.x.shape[1], "classes": data.classes, "note": data.note},
        "weights": problem.n,
        "protocol": asdict(protocol),
        "steps": evaluated,
        "methods": methods,
    }


def with_ones(data: Classification) -> torch.Tensor:
    """The inputs and a column of ones, (rows, features + 1)."""
    return torch.cat([data.x, torch.ones(len(data.x), 1)], dim=1)


def tune(problem: Problem, method: Method, protocol: Protocol, steps: int, progress: Progress) -> dict[str, Any]:
    """The best trial by each criterion; the grid of lr is widened until no winner stands at an end of it."""
    lrs, new = list(method.lrs), list(method.lrs)
    tried: list[Trial] = []
    finalists: list[Trial] = []
    curves: list[list[float]] = []
    diverged = 0
    for _ in range(WIDENINGS + 1):
        wanted = method.trials(new)[:: protocol.thinned]
        early = _tuning_losses(problem, method, wanted, protocol, steps, progress, protocol.screened)
        kept = [wanted[i] for i in promising(wanted, early)]
        late = _tuning_losses(problem, method, kept, protocol, steps, progress, None)
        tried, finalists, curves = tried + wanted, finalists + kept, curves + late
        diverged += sum(math.isinf(losses[-1]) for losses in early)
        winners = {name: finalists[best(curves, score)] for name, score in CRITERIA.items()}
        new = beyond(lrs, [winner["lr"] for winner in winners.values()])
        if not new:
            break
        lrs = sorted({*lrs, *new})
    return {
        "trials": len(tried),
        "finalists": len(finalists),
        "diverged": diverged,
        "lrs": [rounded(lr) for lr in lrs],
        "widened": len(lrs) - len(method.lrs),
        "winners": {name: {key: rounded(value) for key, value in winner.items()} for name, winner in winners.items()},
    }


def _tuning_losses(
    problem: Problem,
    method: Method,
    trials: list[Trial],
    protocol: Protocol,
    steps: int,
    progress: Progress,
    stop_after: int | None,
) -> list[list[float]]:
    """Of each trial, on the tuning seed and rows."""
    rows = torch.randperm(len(problem.y), generator=torch.Generator().manual_seed(TUNING_SEED))[: protocol.tuning_rows]
    done_in_all = len(trials) * (steps if stop_after is None else steps * stop_after // protocol.evaluations)
    losses = train(
        problem,
        method,
        trials,
        [TUNING_SEED],
        steps,
        protocol.batch_size,
        protocol.evaluations,
        rows,
        stop_after,
        protocol.compiled,
        lambda done: progress(f"{method.title}, {'screening' if stop_after else 'tuning'}", done, done_in_all),
    )
    return losses[0].tolist()


def promising(trials: list[Trial], curves: list[list[float]]) -> list[int]:
    """The indices of the best sixth of each schedule's trials by each criterion, in order; at least one of each."""
    kept: set[int] = set()
    for schedule in SCHEDULES:
        of_schedule = [i for i, trial in enumerate(trials) if trial["schedule"] == schedule]
        for score in CRITERIA.values():
            ranked = sorted(of_schedule, key=lambda i: (math.isinf(curves[i][-1]), score(curves[i])))
            kept |= set(ranked[: max(1, len(ranked) // 6)])
    return sorted(kept)


def best(curves: list[list[float]], score: Callable[[list[float]], float]) -> int:
    """The index of the curve with the lowest score among those that did not diverge."""
    return min(range(len(curves)), key=lambda i: (math.isinf(curves[i][-1]), score(curves[i])))


def beyond(lrs: list[float], winners: list[float]) -> list[float]:
    """The rates to try next: as many as make up half a decade, at each end of the grid where a winner stands."""
    ratio = lrs[1] / lrs[0]
    more = range(1, round(0.5 / math.log10(ratio)) + 1)
    lower = [lrs[0] / ratio**i for i in more if lrs[0] in winners]
    upper = [lrs[-1] * ratio**i for i in more if lrs[-1] in winners]
    return lower + upper


def judge(
    problem: Problem,
    method: Method,
    winners: dict[str, Trial],
    protocol: Protocol,
    steps: int,
    progress: Progress,
) -> dict[str, list[list[float | None]]]:
    """The full training loss of each criterion's winner, a list a seed."""
    trials = [trial for i, trial in enumerate(winners.values()) if trial not in list(winners.values())[:i]]
    seeds = list(protocol.seeds)
    total = len(trials) * len(seeds) * steps
    losses = train(
        problem,
        method,
        trials,
        seeds,
        steps,
        protocol.batch_size,
        protocol.evaluations,
        compiled=protocol.compiled,
        progress=lambda done: progress(f"{method.title}, judging", done, total),
    )
    return {
        name: [[rounded(loss) for loss in curve] for curve in losses[:, trials.index(winner)].tolist()]
        for name, winner in winners.items()
    }


def rounded(value: Any) -> Any:
    """A number with six digits, None for an infinite one; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
