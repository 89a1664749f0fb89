"""The fused path: all tensors of a group in one call that reads and writes every number once.

A step has at most two passes over memory, each one launch for all tensors. The first (`reduce`) takes the sums that a
block needs before it can move, over the new gradient alone: those over weights and state were accumulated while the
previous step wrote them. Then a few operations on one number a tensor, as `rules` has them; then the second pass
(`update`) moves weights and state. Nothing waits for a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from to_finetune.optim.kernels.batch import (
    ERROR,
    FACTOR,
    FORMATS,
    GG,
    KEY,
    OWN,
    PEAK,
    UB,
    UG,
    UU,
    VW,
    WW,
    Batch,
    Carried,
    Member,
    as_vector,
    make_batch,
    may_read,
    rows,
    signed_decay_and_sign,
    to_device,
)
from to_finetune.optim.rules import RankOneSums, guard_room, rank_one_scalars, relative, rms_factor
from to_finetune.optim.schedules import decoupled_decay, rates_at
from to_finetune.optim.state import state_key


@cache
def kernels_for(device_type: str) -> ModuleType | None:
    """The kernels of a kind of device, or None; where there could be some, one warning says what is missing."""
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


def split(
    variant: str, group: Mapping[str, Any], members: list[Member], names: Sequence[str]
) -> tuple[list[Batch], list[Member]]:
    """The members whose device, layout and formats the kernels know, in batches of the same, and the others."""
    alike: dict[Any, tuple[ModuleType | None, list[Member]]] = {}
    others = []
    first, *rest = names
    for member in members:
        p, state = member.p, member.state
        kind = (p.get_device(), p.dtype, member.grad.dtype, state[first].dtype, type(p))
        if kind not in alike:
            alike[kind] = (_kernels(p, kind[1:4]), [])
        kernels, batch = alike[kind]
        contiguous = p.is_contiguous() and state[first].is_contiguous() and state[rest[0]].is_contiguous()
        if kernels is None or not contiguous or not state[rest[-1]].is_contiguous():
            others.append(member)
        else:
            batch.append(member)
    if others and group["scope"] == "group":  # a block is not cut in two
        return [], members
    batches = ((kernels, batch) for kernels, batch in alike.values() if kernels is not None and batch)
    return [make_batch(kernels, variant, group, batch, names) for kernels, batch in batches], others


def _kernels(p: Tensor, formats: Sequence[torch.dtype]) -> ModuleType | None:
    """Those for weights like p, with these formats of weights, gradients and state."""
    if isinstance(p, DTensor) or not all(x in FORMATS for x in formats):
        return None
    return kernels_for(p.device.type)


def measure(batches: Sequence[Batch], carried: Mapping[Tensor, Carried]) -> None:
    """The first pass, where one is needed: fills in each batch's `held` and `sums`."""
    for batch in batches:
        known = carried.get(batch.params[0]) if batch.needs_weight_sums else None
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


def step(batches: Sequence[Batch], skip: Tensor | None, carried: dict[Tensor, Carried]) -> list[Tensor]:
    """The second pass over all batches of a group, at the rates of the steps that their state counts.

    Args:
        batches: measured, and not yet counted.
        skip: 0-dim bool; where it is true nothing changes.
        carried: receives what the next step need not measure again.

    Returns:
        The sums of each batch, (tensors, 8) float64; ERROR, GG and PEAK are those of this step.
    """
    scalars = [_scalars(batch) for batch in batches]
    _add_block_scalars([pair for pair in zip(batches, scalars, strict=True) if pair[0].sums is not None])
    found = []
    for batch, own in zip(batches, scalars, strict=True):
        if batch.measures_itself and (batch.needs_gradient_sums or batch.needs_weight_sums):
            sums = batch.kernels.measure_and_update(batch, own, batch.needs_weight_sums, batch.held)
        else:
            skip_here = None if skip is None else skip.to(own.device)
            sums = batch.kernels.update(batch, own, batch.needs_weight_sums, skip_here)
        increment_version(batch.params)
        if batch.needs_weight_sums:
            after = sums if skip is None else torch.where(skip.to(own.device), batch.sums, sums)  # type: ignore[arg-type]
            carried[batch.params[0]] = Carried(batch, after)
        if batch.sums is not None and batch.group["grad_scale"] is not None:
            sums[:, PEAK] = batch.sums[:, PEAK] * (sums[:, GG] / batch.sums[:, GG]).sqrt()  # of the scaled gradient
        found.append(sums)
    return found


def _scalars(batch: Batch) -> Tensor:
    """The rates of each tensor, (tensors, 10) float32; sets the keys of its random bits."""
    group, device = batch.group, batch.table.device
    taken = as_vector(batch.states, "step")
    lr_on_device = isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu"
    if may_read(group, taken) and not lr_on_device:
        steps = taken.tolist()
        rates = {step: [float(x) for x in _columns(group, int(step))] for step in set(steps)}
        alike = len(rates) == 1
        scalars = rows(rates[steps[0]], batch) if alike else to_device(torch.tensor([rates[x] for x in steps]), device)
        taken = to_device(taken, device)
    else:
        taken = taken.to(device, non_blocking=True).double()
        columns = (torch.as_tensor(x).double() for x in _columns(group, taken))
        scalars = torch.stack([taken * 0 + x for x in columns], dim=1).float()
    if any(number != FORMATS[torch.float32] for number in (batch.formats[1], batch.formats[3])):
        batch.table[:, KEY] = state_key(group["seed"], taken.long(), batch.table[:, KEY])
    return scalars


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


def _add_block_scalars(measured: Sequence[tuple[Batch, Tensor]]) -> None:
    """Write what depends on the blocks' sums into the scalars: the gradient's scale, and the variant's own."""
    products = []
    for batch, own in measured:
        assert batch.sums is not None
        ug = batch.sums[:, UG]
        if batch.group["grad_scale"] == "rms":
            factor = rms_factor(batch.sums[:, GG].sqrt(), batch.numels()).float()
            own[:, FACTOR] *= factor
            ug = ug * factor
        products.append(torch.stack([*batch.sums[:, [VW, WW, UU, UB]].unbind(1), ug, batch.numels()]))
    if measured and measured[0][0].group["scope"] == "group":
        device = products[0].device
        total = torch.stack([x.sum(1).to(device) for x in products]).sum(0)
        products = [total.to(x.device).unsqueeze(1).expand_as(x) for x in products]
    for (batch, own), (vw, ww, uu, ub, ug, n) in zip(measured, products, strict=True):
        alpha, room = own[:, OWN], own[:, OWN + 1]
        if batch.is_rank_one:
            blocks = RankOneSums(*(x.float() for x in (vw, ww, uu, ub, ug, n)))
            gains = rank_one_scalars(blocks, alpha, room, batch.group["relative_alpha"])
            own[:, OWN:] = torch.stack(gains, dim=1)
        elif batch.group["relative_alpha"]:
            own[:, OWN] = relative(alpha, (ww / n).float())
