"""Every member of a batched computation is the training that the real optimizers make, one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from to_finetune.optim import DiagonalTO, FullTO, RankOneTO
from to_finetune.paper import methods
from to_finetune.paper.members import (
    Problem,
    batch_order,
    can_compile,
    initial_weights,
    member_losses,
    train,
    training_loss,
)
from to_finetune.paper.methods import ALPHA_END, LR_END, METHODS, Trial

STEPS, BATCH, EVALUATIONS = 12, 4, 3
SEEDS = [3, 4]
SETTINGS: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "evaluations": EVALUATIONS}
EXACT: dict[str, Any] = {"gamma_max": None, "scope": "group"}
OURS: dict[str, Any] = {"relative_alpha": True, "scope": "group"}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "full_to": lambda p, **rates: FullTO(p, **rates, **EXACT),
    "diagonal_to": lambda p, **rates: DiagonalTO(p, **rates, gamma_max=None),
    "rank_one_to": lambda p, **rates: RankOneTO(p, **rates, **EXACT),
    "full_to_ours": lambda p, **rates: FullTO(p, **rates, **OURS),
    "diagonal_to_ours": lambda p, **rates: DiagonalTO(p, **rates, relative_alpha=True),
    "rank_one_to_ours": lambda p, **rates: RankOneTO(p, **rates, **OURS),
    "momentum": lambda p, **rates: DiagonalTO(p, **rates, alpha=0.0),
}


def problem(hidden: tuple[int, ...] = (), l2: float = 0.3, rows: int = 22) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (rows,), generator=generator)
    return Problem(torch.cat([x, torch.ones(rows, 1)], dim=1), y, 3, hidden, l2)


def alone(name: str, task: Problem, trial: Trial, seed: int) -> list[float]:
    """The losses of one training with the real optimizer on one flat weight."""
    w = initial_weights(task, seed).requires_grad_()
    decays = trial["schedule"] == "exponential"
    lr_decay = (LR_END if decays else 1.0) ** (1 / STEPS)
    optimizer: Optimizer
    if name == "adam":
        optimizer = torch.optim.Adam([w], trial["lr"], (trial["beta1"], trial["beta2"]), weight_decay=task.l2)
    else:
        own = {key: value for key, value in trial.items() if key not in ("lr", "schedule")}
        alpha_decay = (ALPHA_END if decays else 1.0) ** (1 / STEPS)
        more = {"schedule": "exponential", "alpha_decay": alpha_decay, "weight_decay": task.l2}
        optimizer = OPTIMIZERS[name]([w], lr=trial["lr"], **own, **more)
    losses = [loss(task, w, task.x, task.y) + task.l2 / 2 * w.square().sum()]
    for step, rows in enumerate(batch_order(len(task.y), BATCH, STEPS, seed), start=1):
        optimizer.param_groups[0]["lr"] = trial["lr"] * lr_decay ** (step - 1)
        optimizer.zero_grad()
        loss(task, w, task.x[rows], task.y[rows]).backward()
        optimizer.step()
        if step % (STEPS // EVALUATIONS) == 0:
            losses.append(loss(task, w, task.x, task.y) + task.l2 / 2 * w.square().sum())
    return [x.item() for x in losses]


def loss(task: Problem, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of one member, layer by layer."""
    used = 0
    for out, inputs in task.layers:
        if used:
            x = torch.cat([x.relu(), torch.ones(len(x), 1)], dim=1)
        x = x @ w[used : used + out * inputs].view(out, inputs).mT
        used += out * inputs
    return functional.cross_entropy(x, y)


def a_few(name: str) -> list[Trial]:
    """Rates that differ in every way and do not diverge within a few steps."""
    if name == "adam":
        return METHODS[name].trials([0.1])[::5]
    alphas = (0.0, 0.1, 1.0) if name.endswith("ours") else (0.0, 0.01)
    trials = METHODS[name].trials([0.02])
    return [t for t in trials if t.get("alpha", 0.0) in alphas and t["beta"] in (0.0, 0.1, 0.5)]


@pytest.mark.parametrize("name", ["full_to_ours", "diagonal_to_ours", "rank_one_to_ours"])
def test_the_guard_is_at_work_in_ours(name: str) -> None:
    unguarded = {
        "full_to_ours": methods._full,
        "diagonal_to_ours": methods._diagonal,
        "rank_one_to_ours": methods._rank_one,
    }
    update = partial(unguarded[name], {"gamma_max": None, "relative_alpha": True})
    task, trials = problem(), [t for t in a_few(name) if t["alpha"] == 1.0]
    guarded, without = (
        train(task, method, trials, SEEDS, **SETTINGS)
        for method in (METHODS[name], replace(METHODS[name], update=update))
    )
    assert (guarded - without).abs().amax() > 1e-3


@pytest.mark.parametrize("hidden", [(), (4,)], ids=["logistic", "network"])
@pytest.mark.parametrize("name", METHODS)
def test_a_member_is_the_training_with_the_real_optimizer(name: str, hidden: tuple[int, ...]) -> None:
    task, trials = problem(hidden), a_few(name)
    assert len(trials) > 3
    losses = train(task, METHODS[name], trials, SEEDS, **SETTINGS)
    expected = [[alone(name, task, trial, seed) for trial in trials] for seed in SEEDS]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_full_to_is_the_same_as_history_and_as_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("to_finetune.paper.methods.FOLDED", 5)
    task, trials = problem((9,)), a_few("full_to_ours")
    method = METHODS["full_to_ours"]
    pairs = [(2, 49, 99)] * 2
    assert [s.shape for s in method.start(torch.zeros(2, 99), 49)][1:] == pairs
    assert [s.shape for s in method.start(torch.zeros(2, 99), 50)][1:] == [(2, 5, 99), (2, 5, 99), (2, 99, 99)]
    assert task.n > 2 * STEPS  # so its history
    dense = replace(method, start=lambda w, steps: method.start(w, task.n))
    histories, matrices = (train(task, m, trials, [0], **SETTINGS) for m in (method, dense))
    torch.testing.assert_close(histories, matrices, rtol=1e-10, atol=0)


def test_a_screening_is_the_beginning_of_the_training() -> None:
    task, trials = problem(), a_few("rank_one_to_ours")
    whole = train(task, METHODS["rank_one_to_ours"], trials, SEEDS, **SETTINGS)
    begun = train(task, METHODS["rank_one_to_ours"], trials, SEEDS, **SETTINGS, stop_after=2)
    torch.testing.assert_close(begun, whole[:, :, :3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["diagonal_to", "full_to"])
def test_a_diverged_trial_is_infinite_from_there_on_and_leaves_the_others_alone(name: str) -> None:
    task, calm = problem(), a_few(name)[:3]
    wild = {**calm[0], "lr": 1e12, "beta": 1.0}
    both = train(task, METHODS[name], [calm[0], wild, *calm[1:]], SEEDS, **SETTINGS)
    assert both[:, 1].isinf().tolist() == [[False, True, True, True]] * len(SEEDS)
    torch.testing.assert_close(
        both[:, [0, 2, 3]], train(task, METHODS[name], calm, SEEDS, **SETTINGS), rtol=1e-10, atol=0
    )


def test_what_has_diverged_on_one_seed_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its loss is finite, and falls again; a thousand times the first loss is divergence."""
    wild = iter([1.0, 1001.0, 1.0, 1.0])

    def taken(*given: Any) -> Tensor:
        return torch.tensor([[next(wild)], [1.0]], dtype=torch.float64)

    monkeypatch.setattr("to_finetune.paper.members.training_loss", taken)
    losses = train(problem(), METHODS["momentum"], a_few("momentum")[:1], SEEDS, **SETTINGS)
    assert losses.isinf().squeeze(1).tolist() == [[False, True, True, True], [False] * 4]


def test_members_that_do_not_fit_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    task, trials = problem(), a_few("diagonal_to")
    done: list[int] = []
    together = train(task, METHODS["diagonal_to"], trials, SEEDS, **SETTINGS, progress=done.append)
    assert sum(done) == len(trials) * len(SEEDS) * STEPS
    monkeypatch.setattr("to_finetune.paper.members.ELEMENTS", task.n * 5)
    turns = train(task, METHODS["diagonal_to"], trials, SEEDS, **SETTINGS)
    torch.testing.assert_close(turns, together, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adam", "rank_one_to_ours", "full_to_ours"])
def test_the_compiled_step_is_the_same(name: str) -> None:
    if not can_compile("cpu"):
        pytest.skip("torch.compile finds no compiler here")
    task, trials = problem((4,)), a_few(name)
    plain, compiled = (
        train(task, METHODS[name], trials, SEEDS, **SETTINGS, compiled=compiled) for compiled in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=0)


def test_the_loss_of_many_rows_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem((4,), rows=1000)
    w = torch.randn(2, 3, task.n, dtype=torch.float64)
    found = training_loss(task, w, None)
    expected = member_losses(task.layers, w, task.x.expand(2, -1, -1), task.y.expand(2, -1))
    torch.testing.assert_close(found, expected + task.l2 / 2 * w.square().sum(-1))
    rows = torch.tensor([5, 900])
    some = training_loss(replace(task, x=task.x[rows], y=task.y[rows]), w, None)
    torch.testing.assert_close(training_loss(task, w, rows), some)


def test_an_epoch_sees_every_row_once_and_seeds_differ() -> None:
    first, second = (batch_order(22, 4, 12, seed) for seed in (0, 1))
    assert first.shape == (12, 4)
    for epoch in (first[:5], first[5:10]):
        assert len(epoch.unique()) == 20  # two rows do not fill a batch
    assert not torch.equal(first[:5], first[5:10])
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="a batch of 4 is larger than the data, 3 rows"):
        batch_order(3, 4, 1, 0)
