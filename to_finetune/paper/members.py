"""Run many trainings at once: every trial of a method with every seed is a member of one batched computation.

The members of a seed see the same mini-batches, so that their products with the inputs are one matrix product; each has
its own weights, state and rates along a leading dimension. A trial is dropped once it has diverged for every seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from to_finetune.paper.methods import Method, Rates, State, Trial, rates
from to_finetune.paper.tuning import points

ELEMENTS = 600_000  # weights stepped together at most: they and their state stay in a processor's cache
STATE_BYTES = 2 << 30  # of the members stepped together, at most
DIVERGED = 1e3  # times the loss at the start

StepFunction = Callable[..., tuple[Tensor, State]]
Layers = list[tuple[int, int]]  # (outputs, inputs with the bias) of each


@dataclass(frozen=True)
class Problem:
    """Empirical risk: mean cross-entropy of a ReLU network or a linear model, plus ``l2/2 ||w||^2`` over all weights.

    x: (rows, features), the last feature 1, whose weights are the biases; y: (rows,) int64, on the same device.
    hidden: the widths of the hidden layers; () is logistic regression.
    """

    x: Tensor
    y: Tensor
    classes: int
    hidden: tuple[int, ...] = ()
    l2: float = 0.0

    @property
    def layers(self) -> Layers:
        widths = (self.x.shape[1] - 1, *self.hidden, self.classes)
        return [(out, inputs + 1) for inputs, out in pairwise(widths)]

    @property
    def n(self) -> int:
        """The number of weights."""
        return sum(out * inputs for out, inputs in self.layers)


def train(
    problem: Problem,
    method: Method,
    trials: list[Trial],
    seeds: list[int],
    *,
    steps: int,
    batch_size: int,
    evaluations: int,
    rows: Tensor | None = None,
    stop_after: int | None = None,
    compiled: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Train each trial with each seed from weights of N(0, 1).

    Args:
        evaluations: the number of evenly spaced losses, the last after the last step; one more is taken at the start.
        rows: the indices of the rows that the loss is taken over; None for the full training loss.
        stop_after: stop after this many evaluations; rates decay as if the training continued.
        compiled: use torch's compiler, which takes seconds and makes a step two to five times faster.
        progress: called with the number of member steps since the last call.

    Returns:
        The losses, (seeds, trials, 1 + evaluations made), in the weights' dtype; infinite once a member has diverged.
    """
    taken_at = points(steps, evaluations)[: (evaluations if stop_after is None else stop_after) + 1]
    start = torch.stack([initial_weights(problem, seed) for seed in seeds])
    batches = torch.stack([batch_order(len(problem.y), batch_size, taken_at[-1], seed) for seed in seeds]).to(
        problem.y.device
    )
    bytes_each = sum(s.nbytes for s in method.start(start[:1].to("meta"), taken_at[-1]))
    together = max(1, min(ELEMENTS // problem.n, STATE_BYTES // bytes_each) // len(seeds))
    take_step: StepFunction = _step
    if compiled and can_compile(problem.x.device.type):
        take_step = torch.compile(_step)
    parts = [
        _train(problem, method, take_step, trials[i : i + together], start, batches, steps, taken_at, rows, progress)
        for i in range(0, len(trials), together)
    ]
    return torch.cat(parts, dim=1)


def initial_weights(problem: Problem, seed: int) -> Tensor:
    """Draw every weight from N(0, 1), (n,): the same on every device and in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problem.n, generator=generator).to(problem.x)


def batch_order(rows: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Return the rows of each step, (steps, batch_size): every epoch reshuffled, its incomplete last batch dropped."""
    if batch_size > rows:
        raise ValueError(f"a batch of {batch_size} is larger than the data, {rows} rows")
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(rows, generator=generator)
        batches.extend(order[: rows // batch_size * batch_size].view(-1, batch_size))
    return torch.stack(batches[:steps])


def member_losses(layers: Layers, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross-entropy of every member on the inputs of its seed.

    Args:
        w: (seeds, trials, n), layer by layer; x: (seeds, rows, features); y: (seeds, rows).

    Returns:
        (seeds, trials).
    """
    seeds, trials, _ = w.shape
    size = x.shape[1]
    weights = w.split([out * inputs for out, inputs in layers], dim=-1)
    (out, inputs), *rest = layers
    z = torch.bmm(x, weights[0].reshape(seeds, trials * out, inputs).mT).view(seeds, size, trials, out)
    for layer, (out, inputs) in zip(weights[1:], rest, strict=True):
        weight = layer.reshape(seeds * trials, out, inputs)
        hidden = z.relu().transpose(1, 2).reshape(seeds * trials, size, inputs - 1)
        z = torch.baddbmm(weight[:, None, :, -1], hidden, weight[:, :, :-1].mT)
        z = z.view(seeds, trials, size, out).transpose(1, 2)
    target = y[:, :, None].expand(seeds, size, trials)
    losses = functional.cross_entropy(z.reshape(-1, out), target.reshape(-1), reduction="none")
    return losses.view(seeds, size, trials).mean(1)


@torch.no_grad()
def training_loss(problem: Problem, w: Tensor, rows: Tensor | None) -> Tensor:
    """Compute the regularised loss of every member over the given rows, or all; w is (seeds, trials, n)."""
    x, y = (problem.x, problem.y) if rows is None else (problem.x[rows], problem.y[rows])
    flat = w.reshape(1, -1, problem.n)
    size = max(64, (4 << 20) // (flat.shape[1] * max(out for out, _ in problem.layers)))
    total = torch.zeros_like(flat[..., 0])
    for i in range(0, len(y), size):
        rows_here = y[None, i : i + size]
        total += member_losses(problem.layers, flat, x[None, i : i + size], rows_here) * rows_here.numel()
    penalty = problem.l2 / 2 * w.square().sum(-1)
    return (total / len(y)).view(w.shape[:2]) + penalty


def _train(
    problem: Problem,
    method: Method,
    take_step: StepFunction,
    trials: list[Trial],
    start: Tensor,
    batches: Tensor,
    steps: int,
    taken_at: list[int],
    rows: Tensor | None,
    progress: Callable[[int], None],
) -> Tensor:
    """Train the trials that are stepped together; start is (seeds, n), batches (seeds, steps, batch_size)."""
    seeds = len(start)
    w = start[:, None].repeat(1, len(trials), 1)
    state = method.start(w.flatten(0, 1), taken_at[-1])
    alive = torch.arange(len(trials), device=w.device)
    losses = w.new_full((seeds, len(trials), len(taken_at)), torch.inf)
    losses[:, :, 0] = training_loss(problem, start[:, None], rows)  # all trials of a seed start alike
    rates_of = rates(trials * seeds, steps, w)
    l2 = w.new_tensor(problem.l2)  # a Python number would be compiled into the step
    for i, (taken, until) in enumerate(pairwise(taken_at)):
        for step in range(taken, until):
            x, y, at = problem.x[batches[:, step]], problem.y[batches[:, step]], torch.tensor(step)
            w, state = take_step(problem.layers, l2, method.update, w, state, x, y, rates_of(at), at)
        progress((until - taken) * seeds * len(alive))
        loss = training_loss(problem, w, rows)
        good = loss.isfinite() & (loss < DIVERGED * losses[:, alive, 0])
        losses[:, alive, i + 1] = loss.where(good & losses[:, alive, i].isfinite(), torch.inf)
        keep = good.any(0)
        if not keep.all():
            progress((taken_at[-1] - until) * seeds * int((~keep).sum()))
            alive, w, state = alive[keep], w[:, keep], _kept(state, keep, seeds)
            if not len(alive):
                break
            rates_of = rates([trials[j] for j in alive.tolist()] * seeds, steps, w)
    return losses


def _step(
    layers: Layers,
    l2: Tensor,
    update: Callable[..., tuple[Tensor, State]],
    w: Tensor,
    state: State,
    x: Tensor,
    y: Tensor,
    rates: Rates,
    step: Tensor,
) -> tuple[Tensor, State]:
    """Take one step of every member; w is (seeds, trials, n), x (seeds, batch, features), y (seeds, batch)."""
    g = torch.func.grad(lambda w: member_losses(layers, w, x, y).sum())(w)  # members are independent
    g = g + l2 * w
    flat, state = update(w.flatten(0, 1), g.flatten(0, 1), state, rates, step)
    return flat.view(w.shape), state


@cache
def can_compile(device: str) -> bool:
    """Return whether torch's compiler finds what it needs, such as a C++ compiler or Triton; warn if it does not."""
    torch._dynamo.config.cache_size_limit = 256  # variants of the step: each method with a few numbers of members
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of many types, some of them platform-specific
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        warnings.warn(f"torch.compile does not work here, steps are slower: {reason}", stacklevel=2)
        return False
    return True


def _kept(state: State, keep: Tensor, seeds: int) -> State:
    """Return the state of the kept trials; members are ordered seed by seed along the first dimension."""
    return tuple(s[keep.repeat(seeds)] for s in state)
