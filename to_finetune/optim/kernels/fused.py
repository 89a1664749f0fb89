"""The fused path: all tensors of a group in one call that reads and writes every number once.

A step makes at most two passes over memory, each one launch for all tensors. The first (`reduce`) computes the sums
that a block needs before it can move, over the new gradient alone: those over weights and state were accumulated while
the previous step wrote them. A few operations on one number per tensor follow, as in `rules`; then the second pass
(`update`) updates weights and state. Nothing waits for a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from to_finetune.optim.blocks import ERROR, WW, Totals, keep_for_graphs, to_device
from to_finetune.optim.kernels.batch import (
    FACTOR,
    FORMATS,
    OWN,
    Batch,
    Carried,
    make_batch,
    may_read,
    rows,
    signed_decay_and_sign,
)
from to_finetune.optim.rules import RankOneSums, guard_room, rank_one_scalars, relative
from to_finetune.optim.schedules import decoupled_decay, rates_at
from to_finetune.optim.sharding import Member


@cache
def kernels_for(device_type: str) -> ModuleType | None:
    """Return the kernels for a type of device, or None; if they fail to load, warn once what is missing."""
    try:
        if device_type == "cpu":
            from to_finetune.optim.kernels import cpu

            cpu.library()
            return cpu
        if device_type == "cuda":
            from to_finetune.optim.kernels import gpu

            return gpu
    except (RuntimeError, ImportError) as error:
        warnings.warn(
            f"The Trainable Optimizer's fused kernels are not available ({error}), and its steps take several times "
            f"as long. To have them, install {'g++ or clang++' if device_type == 'cpu' else 'triton'}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def may_fuse(group: Mapping[str, Any]) -> bool:
    """Whether a group allows these kernels."""
    return group["fused"] is not False and not group["foreach"]


def split(
    variant: str, group: Mapping[str, Any], members: list[Member], names: Sequence[str], may_skip: bool
) -> tuple[list[Batch], list[Member]]:
    """Return batches of members whose device, layout and formats the kernels support, and the other members."""
    alike: dict[Any, tuple[ModuleType | None, list[Member]]] = {}
    others = []
    for member in members:
        p, state = member.p, member.state
        dtype = state[names[0]].dtype
        kind = (p.get_device(), p.dtype, member.grad.dtype, dtype, type(p), member.shards)
        if kind not in alike:
            alike[kind] = (kernels_like(p, kind[1:4]), [])
        kernels, batch = alike[kind]
        scattered = member.first is None and (p.dtype != torch.float32 or dtype != torch.float32)  # rounds by index
        if kernels is None or scattered or not (p.is_contiguous() and all(state[x].is_contiguous() for x in names)):
            others.append(member)
        else:
            batch.append(member)
    batches = ((kernels, batch) for kernels, batch in alike.values() if kernels is not None and batch)
    return [make_batch(kernels, variant, group, batch, names, may_skip) for kernels, batch in batches], others


def kernels_like(p: Tensor, formats: Sequence[torch.dtype]) -> ModuleType | None:
    """Return the kernels for p's device and these formats of weights, gradients and state, or None."""
    if isinstance(p, FakeTensor) or not all(x in FORMATS for x in formats):
        return None
    return kernels_for(p.device.type)


def measure(batches: Sequence[Batch], carried: Mapping[int, Carried]) -> None:
    """Do the first pass, where one is needed: fill in each batch's `held` and `sums`."""
    for batch in batches:
        known = carried.get(batch.members[0].position) if batch.needs_weight_sums and batch.may_carry else None
        if known is not None and known.holds_for(batch):
            batch.held = known.sums
        unknown = batch.needs_weight_sums and batch.held is None
        if batch.measures_itself or not (batch.needs_gradient_sums or batch.needs_weight_sums):
            continue
        if batch.needs_gradient_sums or unknown:
            batch.sums = batch.kernels.reduce(batch, unknown)
            if batch.held is not None:
                batch.sums[:, WW:ERROR] = batch.held[:, WW:ERROR]
        else:
            batch.sums = batch.held


def step(batch: Batch, skip: Tensor | None, carried: dict[int, Carried]) -> Tensor:
    """Do the second pass, at the rates for the step counts in the batch's state.

    Args:
        batch: measured; its step is not yet counted.
        skip: 0-dim bool; if true, nothing changes.
        carried: receives the sums that the next step need not compute again, by the position of the batch's first
            member.

    Returns:
        The sums, (members, 8) float64; ERROR and GG are this step's, and so is PEAK if the batch measures itself.
    """
    own = _scalars(batch)
    keeps = batch.needs_weight_sums and batch.may_carry
    if batch.measures_itself and (batch.needs_gradient_sums or batch.needs_weight_sums):
        sums = batch.kernels.measure_and_update(batch, own, batch.needs_weight_sums, batch.held)
    else:
        if batch.totals is not None:
            _add_block_scalars(own, batch, batch.totals)
        sums = batch.kernels.update(batch, own, keeps, None if skip is None else skip.to(own.device))
    increment_version(batch.params)
    if keeps:
        known = carried.get(batch.members[0].position)
        after = sums if skip is None else torch.where(skip.to(own.device), batch.sums, sums)  # type: ignore[arg-type]
        if batch.group["capturable"] and known is not None and known.sums.shape == after.shape:
            after = known.sums.copy_(after)  # each replay reads where the last step or replay wrote
            keep_for_graphs(after)
        carried[batch.members[0].position] = Carried(batch, after)
    return sums


def _scalars(batch: Batch) -> Tensor:
    """Return each tensor's scalars, (tensors, 10) float32; set the keys of random bits if the device counts steps."""
    group, device = batch.group, batch.device
    taken, is_readable = batch.steps, may_read(group, batch.steps)
    lr_on_device = isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu"
    if batch.rounds and not is_readable:
        batch.set_keys(taken.to(device, non_blocking=True))
    if group["schedule"] == "constant" and not lr_on_device:
        return rows([float(x) for x in _columns(group, 0)], batch)
    if is_readable and not lr_on_device:
        steps = taken.tolist()
        rates = {step: [float(x) for x in _columns(group, int(step))] for step in set(steps)}
        if len(rates) == 1:
            return rows(rates[steps[0]], batch)
        return to_device(torch.tensor([rates[x] for x in steps], dtype=torch.float32, device="cpu"), device)
    taken = taken.to(device, non_blocking=True).double()
    return torch.stack([taken * 0 + x for x in _columns(group, taken)], dim=1).float()


def _columns(group: Mapping[str, Any], taken: int | Tensor) -> list[float | Tensor]:
    rates = rates_at(taken, group)
    room = guard_room(group["gamma_max"], rates.beta)
    return [
        rates.lr,
        decoupled_decay(group, rates),
        *signed_decay_and_sign(group),
        rates.beta,
        1 - rates.beta,
        rates.alpha,
        torch.inf if room is None else room,
        0.0,
        0.0,
    ]


def _add_block_scalars(own: Tensor, batch: Batch, totals: Totals) -> None:
    """Write the scalars that depend on the blocks' sums: the gradient's scale, and the variant's own scalars."""
    if totals.factor is not None:
        own[:, FACTOR] *= totals.factor.float()
    block = totals.block
    if batch.is_rank_one:
        sums = RankOneSums(*(x.float() for x in block))
        gains = rank_one_scalars(sums, own[:, OWN], own[:, OWN + 1], batch.group["relative_alpha"])
        own[:, OWN:] = torch.stack(gains, dim=1)
    elif batch.group["relative_alpha"]:
        own[:, OWN] = relative(own[:, OWN], (block.ww / block.n).float())
