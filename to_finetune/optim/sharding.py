"""Sharded weights: which run of which parameter this process holds under DTensor and DeepSpeed's ZeRO.

Every path of a step works on `Member`s, plain tensors local to this process. This module finds out which parameters
they are pieces of and which processes hold the rest; the sums over whole parameters are in `blocks`. DeepSpeed replaces
the parameters that the optimizer was given by flat partitions; the mapping back is read from attributes that DeepSpeed
sets on those parameters for its own use.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from to_finetune.optim.state import blocks_of, exponents_name, new_state, pack, unpack_

Shards = tuple[ProcessGroup, ...]  # the processes that a parameter is sharded over; empty if each holds all of it


@dataclass(slots=True, eq=False)
class Member:
    """A run of one parameter's flattened weights, with gradient and state: all of the parameter, or a shard of it.

    Attributes:
        position: the parameter's index among all that the optimizer was given.
        p, grad, state: this process's, plain tensors; the state's 0-dim counters are the owner's.
        owner: the tensor in the parameter group whose state this is.
        numel: the number of weights of the whole parameter.
        first: the index of the run's first weight in the flattened parameter; None if its weights are scattered.
        shards: the processes that hold the rest.
    """

    position: int
    p: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    owner: Tensor
    numel: int
    first: int | None = 0
    shards: Shards = ()

    @property
    def is_flat(self) -> bool:
        """Whether it is part of a flat DeepSpeed partition."""
        return self.p is not self.owner and not isinstance(self.owner, DTensor)


class Given(NamedTuple):
    """The parameters of a group as the optimizer was given them, before DeepSpeed replaces them."""

    begin: int  # index of the first one among all of the optimizer's
    ids: list[int]
    refs: dict[int, weakref.ref[Tensor]]  # by index, of those that DeepSpeed may still replace
    shapes: list[torch.Size]
    options: dict[str, Any]  # of the group, without lr, which a schedule changes

    def original(self, index: int) -> Tensor | None:
        """Return the parameter that was given, if it is known and still alive."""
        return self.refs[index]() if index in self.refs else None

    @property
    def originals(self) -> list[Any]:
        """Those parameters that DeepSpeed may have replaced."""
        return [p for ref in self.refs.values() if (p := ref()) is not None]

    def position(self, p: Tensor) -> int:
        return self.begin + next(i for i, ref in self.refs.items() if ref() is p)

    def is_of(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that were given, with the same shapes."""
        return list(map(id, params)) == self.ids and [shape_of(p) for p in params] == self.shapes


class Run(NamedTuple):
    """Where a parameter's run lies in the tensor that holds it: ``length`` elements from ``start`` on."""

    position: int
    numel: int  # of the whole parameter
    first: int | None
    start: int
    length: int

    @property
    def here(self) -> slice:
        """Its place in the tensor that holds it."""
        return slice(self.start, self.start + self.length)

    @property
    def there(self) -> slice:
        """Its place in the flattened parameter."""
        assert self.first is not None
        return slice(self.first, self.first + self.length)


class Layout(NamedTuple):
    """The runs that an owner holds: one, or a flat partition's many."""

    runs: list[Run]
    shards: Shards
    is_flat: bool = False  # a DeepSpeed partition
    is_part: bool = False  # other weights of the group are stepped separately

    def exponents(self) -> int:
        """Return how many blocks of 32 the runs touch."""
        return sum(self._blocks())

    def split(self, exponents: Tensor) -> Sequence[Tensor]:
        """Split exponents into those of each run."""
        return exponents.split(self._blocks())

    def _blocks(self) -> list[int]:
        return [blocks_of(run.first or 0, run.length) for run in self.runs]


def given(params: Sequence[Tensor], begin: int, options: dict[str, Any]) -> Given:
    """Record these parameters without keeping them alive."""
    # torch cannot swap a tensor's contents (FSDP2's model.to() does) while there is a weak reference to it.
    refs = {i: weakref.ref(p) for i, p in enumerate(params) if not isinstance(p, DTensor)}
    return Given(begin, list(map(id, params)), refs, list(map(shape_of, params)), options)


def shape_of(p: Tensor) -> torch.Size:
    """Return a parameter's shape, which ZeRO-3 hides."""
    return getattr(p, "ds_shape", p.shape)


def layout_of(p: Tensor, index: int, known: Given) -> Layout:
    """Return the layout of p, the `index`-th tensor of its group: which runs of the given parameters it holds.

    Raises:
        RuntimeError: if a wrapper has replaced the parameters in an unsupported way.
    """
    if isinstance(p, DTensor):
        return _layout_of_dtensor(p, known.begin + index)
    if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
        raise RuntimeError("The weights are sharded by FSDP's first version, which hides them; use FSDP2.")
    if index < len(known.ids) and known.ids[index] == id(p):
        known.refs.pop(index, None)  # nothing will replace it any more
        return _whole(p, known.begin + index)
    originals = known.originals
    if any(hasattr(q, "_z3_optimizer") for q in originals):
        return _layout_of_zero3(p, originals, known)
    if any(hasattr(q, "_hp_mapping") for q in originals):
        return _layout_of_zero(originals, known)
    if index < len(known.shapes) and known.shapes[index].numel() == p.numel():  # moved to another device, or cast
        return _whole(p, known.begin + index)
    raise RuntimeError(
        "The optimizer's weights were replaced by others of another size, and nothing says what they hold. "
        "Under DeepSpeed use a ZeRO stage from 1 to 3, from the first step on; elsewhere replace them by Parameters."
    )


def stand_ins(params: Sequence[Tensor], known: Given) -> Sequence[Tensor]:
    """Return a group's parameters, or DeepSpeed's partitions, which ZeRO-3 puts into the group only during a step."""
    zero = next((q._z3_optimizer for q in known.originals if hasattr(q, "_z3_optimizer")), None)
    if params or zero is None:
        return params
    own = set(known.ids)
    return [
        flat
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        if id(group[0]) in own
    ]


def reshard(model: nn.Module) -> None:
    """Make shards the parameters again of what FSDP2 has left whole, as it does with the root after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_parameter(p: Tensor) -> Tensor:
    """Return all of a parameter that FSDP2 or ZeRO-3 may have sharded; all processes must call it.

    Of a weight that trains under ZeRO, these are DeepSpeed's 32-bit master weights.
    """
    if isinstance(p, DTensor):
        return p.full_tensor().detach()
    if p.requires_grad and (hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")):
        from deepspeed.utils import safe_get_full_fp32_param

        if (whole := safe_get_full_fp32_param(p)) is not None:
            return whole.detach().clone()
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p.detach()


def refresh_model(model: Any, members: Sequence[Member]) -> None:
    """Copy DeepSpeed's partitions, after a change from outside, into the model's weights on all processes."""
    if not any(member.is_flat for member in members):
        return
    zero = getattr(model, "optimizer", None)
    if zero is None:
        raise RuntimeError("Under DeepSpeed the model must be the engine, as accelerator.prepare returns it.")
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def members_of(layout: Layout, p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> list[Member]:
    """Return the members that p consists of."""
    if isinstance(p, DTensor):
        if isinstance(grad, DTensor) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        views = {name: local(x) for name, x in state.items()}
        run = layout.runs[0]
        return [Member(run.position, local(p), local(grad), views, p, run.numel, run.first, layout.shards)]
    if not layout.is_flat:
        run = layout.runs[0]
        return [Member(run.position, p, grad, state, p, run.numel)]
    members, block = [], 0
    for run in layout.runs:
        blocks = blocks_of(run.first or 0, run.length)
        views = cut(state, run.start, run.length, block, blocks)
        block += blocks
        members.append(Member(run.position, p[run.here], grad[run.here], views, p, run.numel, run.first, layout.shards))
    return members


def cut(state: Mapping[str, Tensor], start: int, count: int, block: int, blocks: int) -> dict[str, Tensor]:
    """Return views of the state of `count` weights from `start` on, whose int8 blocks are `blocks` from `block` on."""
    views = {}
    for name, x in state.items():
        if x.dim() == 0:
            views[name] = x
        elif name.endswith(exponents_name("")):
            views[name] = x[block : block + blocks]
        else:
            views[name] = x.view(-1)[start : start + count]
    return views


def packed_state(layout: Layout, p: Tensor, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return p's state with `names` as int16 (`state.pack`), of p's shape and sharded as p is."""
    packed = {name: x for name, x in state.items() if not name.endswith(exponents_name(""))}
    for name in names:
        codes = local(state[name]).reshape(-1)
        whole = torch.zeros_like(codes, dtype=torch.int16)
        for run, exponents in zip(layout.runs, layout.split(state[exponents_name(name)]), strict=True):
            whole[run.here] = pack(codes[run.here], exponents, run.first or 0)
        packed[name] = _like(p, whole.view_as(local(p)))
    return packed


def unpacked_state(layout: Layout, p: Tensor, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Undo `packed_state`: return the int8 state."""
    unpacked = dict(state)
    for name in names:
        if state[name].dtype != torch.int16:
            raise ValueError(
                f"The state {name!r} to load is {state[name].dtype}, not int8, which state_dtype asks for."
            )
        packed = local(state[name]).reshape(-1)
        new = new_state(p, name, torch.int8, layout.exponents())
        target = local(new[name])
        codes = target.reshape(-1)
        for run, exponents in zip(layout.runs, layout.split(new[exponents_name(name)]), strict=True):
            unpack_(codes[run.here], exponents, packed[run.here], run.first or 0)
        target.copy_(codes.view_as(target))  # codes is a copy if target is not contiguous
        unpacked |= new
    return unpacked


def _like(p: Tensor, part: Tensor) -> Tensor:
    """Return this process's part as a tensor that is sharded as p is."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def local(x: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def all_reduce(x: Tensor, shards: Shards, op: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
    """Return x reduced over these processes, on x's device."""
    for group in shards:
        devices = [device.type for device in group._device_types]
        # NCCL cannot reduce tensors in the CPU's memory.
        there = x.contiguous() if x.device.type in devices else x.to(devices[0])
        dist.all_reduce(there, op, group)
        x = there.to(x.device)
    return x


def gathered(numel: int, pieces: Iterable[tuple[slice, Tensor]], like: Tensor, shards: Shards) -> Tensor | None:
    """Gather the flat tensor whose pieces the processes hold, on process 0 and its CPU; None on the others.

    Args:
        numel: the size of the whole tensor.
        pieces: this process's pieces, each with its place.
        like: a tensor of the dtype and on the device of the pieces.
        shards: the processes that hold pieces; all must call it.
    """
    exact = torch.int32 if like.dtype == torch.int16 else like.dtype  # NCCL cannot sum int16
    whole = torch.zeros(numel, dtype=exact, device=like.device)
    for place, piece in pieces:
        whole[place] = piece.to(exact)
    whole = all_reduce(whole, shards)
    return whole.to(like.dtype).cpu() if not dist.is_initialized() or dist.get_rank() == 0 else None


def _whole(p: Tensor, position: int) -> Layout:
    return Layout([Run(position, p.numel(), 0, 0, p.numel())], ())


def _layout_of_dtensor(p: DTensor, position: int) -> Layout:
    """A shard of the first dimension, as FSDP2 makes it, is one run of the flattened weights; others are scattered."""
    mesh = p.device_mesh
    sharded = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if any(p.placements[i].is_partial() for i in sharded):
        raise RuntimeError("A parameter whose value is a sum over processes (Partial) cannot be stepped.")
    first: int | None = 0
    if sharded:
        first = None
        if len(sharded) == 1 and p.placements[sharded[0]].is_shard(0):
            (i,) = sharded
            rows = p.shape[0]
            row = min(rows, -(-rows // mesh.size(i)) * mesh.get_local_rank(i))
            first = row * (p.numel() // rows) if rows else 0
    run = Run(position, p.numel(), first, 0, local(p).numel())
    return Layout([run], tuple(mesh.get_group(i) for i in sharded))


def _layout_of_zero(originals: Sequence[Any], known: Given) -> Layout:
    """Return the layout of ZeRO-1 and 2: this process's partition of the group's concatenated parameters."""
    runs = []
    for q in originals:
        here = getattr(q, "_hp_mapping", None)
        if here is None:
            runs.append(Run(known.position(q), q.numel(), 0, 0, 0))
        else:
            lies, is_from = here.hp_fragment_address, here.lp_fragment_address
            runs.append(Run(known.position(q), q.numel(), is_from.start, lies.start, lies.numel))
    processes = next(q._dp_group for q in originals if hasattr(q, "_dp_group"))
    return Layout(runs, (processes,), is_flat=True)


def _layout_of_zero3(p: Tensor, originals: Sequence[Any], known: Given) -> Layout:
    """Return the layout of ZeRO-3: this process's equal share of each of a sub-group's parameters, concatenated."""
    zero = next(q._z3_optimizer for q in originals if hasattr(q, "_z3_optimizer"))
    sub_group = next(i for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if flat is p)
    processes = zero._get_sub_group_process_group(sub_group)
    rank = dist.get_rank(processes)
    runs = []
    for q in zero.fp16_groups[sub_group]:
        _, start, share = zero.grad_position[zero.get_param_id(q)]
        first = min(rank * share, q.ds_numel)
        runs.append(Run(known.position(q), q.ds_numel, first, start, min(share, q.ds_numel - first)))
    return Layout(runs, (processes,), is_flat=True, is_part=len(runs) < sum(q.requires_grad for q in originals))
