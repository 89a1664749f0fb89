"""Weights and state by parameter name, in torch's distributed checkpoint: any layout can load what any other saved.

Each process writes its own runs of the flattened parameters and reads those that it needs, no matter how they were
saved: by one process, DDP, FSDP2 or DeepSpeed's ZeRO, on any number of processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from to_finetune.optim.full import FullTO
from to_finetune.optim.optimizer import TrainableOptimizer
from to_finetune.optim.sharding import Member, gathered, refresh_model, reshard
from to_finetune.optim.state import exponents_name, pack, unpack_
from to_finetune.optim.stateful import COUNTERS

Folder = str | os.PathLike[str]
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # added by torch.compile and FSDP's activation checkpointing


def save_state(model: nn.Module, optimizer: TrainableOptimizer, folder: Folder, *, weights: bool = True) -> None:
    """Write the optimizer's state, and the weights that it trains, to `folder`. All processes must call it.

    Args:
        model: the model whose parameters the optimizer was given, wrapped or not.
        optimizer: DiagonalTO or RankOneTO. Its hyper-parameters are not saved.
        folder: the same on all processes, and a new one each time: an incomplete checkpoint cannot be loaded.
        weights: whether to save the weights too; False if they are saved elsewhere (`whole_weights`).

    Raises:
        RuntimeError: for FullTO, and for weights sharded along a dimension other than the first.
    """
    with _quiet():
        dcp.save(_Contents(model, optimizer, weights).values, checkpoint_id=folder)


def load_state(model: nn.Module, optimizer: TrainableOptimizer, folder: Folder, *, weights: bool = True) -> None:
    """Load what `save_state` wrote, in any layout and on any number of processes. All processes must call it.

    Args:
        model, optimizer: in their current form: sharded, prepared by accelerate, or plain; under DeepSpeed the engine.
        folder: as given to `save_state`.
        weights: as given to `save_state`.

    Raises:
        RuntimeError: as for `save_state`, and for a checkpoint that is incomplete or has other weights or another
            format of state.
    """
    if not Path(folder, ".metadata").is_file():
        raise RuntimeError(f"{os.fspath(folder)} holds no checkpoint that was written to its end.")
    contents = _Contents(model, optimizer, weights)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, value in contents.values.items():
        found = saved.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise RuntimeError(f"{os.fspath(folder)} holds no {key!r}: it is of other weights or of another optimizer.")
        if found.size != value.size() or found.properties.dtype != value.dtype:
            raise RuntimeError(
                f"{os.fspath(folder)}: {key!r} has {found.size.numel()} numbers of {found.properties.dtype}, not "
                f"{value.numel()} of {value.dtype}: other weights, or another state_dtype."
            )
    with _quiet():
        dcp.load(contents.values, checkpoint_id=folder)
    with torch.no_grad():
        for take in contents.after_loading:
            take()
    optimizer.forget_last_step()
    if weights:
        refresh_model(model, contents.members)


def whole_weights(model: nn.Module, optimizer: TrainableOptimizer) -> dict[str, Tensor]:
    """Gather the trained weights by name, whole and on the CPU, on process 0; the others get an empty dict.

    All processes must call it. Under DeepSpeed they are its 32-bit master weights.
    """
    parameters = named(model)
    names = optimizer.names(parameters)
    here: dict[int, list[Member]] = {}
    for member in optimizer.held():
        here.setdefault(member.position, []).append(member)
    weights = {}
    for position, (first, *others) in sorted(here.items()):
        pieces = [(_run(member), member.p.detach().reshape(-1)) for member in (first, *others)]
        whole = gathered(first.numel, pieces, first.p, first.shards)
        if whole is not None:
            p = parameters[names[position]]
            weights[names[position]] = whole.view(getattr(p, "ds_shape", p.shape))
    return weights


@torch.no_grad()
def load_weights(model: nn.Module, optimizer: TrainableOptimizer, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the trained weights, in any layout. All processes must call it.

    Raises:
        RuntimeError: if a trained tensor is missing or has another size.
    """
    names = optimizer.names(named(model))
    members = optimizer.held()
    for member in members:
        tensor = weights.get(names[member.position])
        if tensor is None or tensor.numel() != member.numel:
            raise RuntimeError(f"There is no {names[member.position]!r} of {member.numel} weights to load.")
        member.p.copy_(tensor.reshape(-1)[_run(member)].view_as(member.p))
    optimizer.forget_last_step()
    refresh_model(model, members)


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by their names without the wrappers around the model or parts of it.

    Those that FSDP2 has sharded are shards, also after an evaluation, which leaves some whole.
    """
    reshard(model)
    parameters: dict[str, Tensor] = {bare(name): p for name, p in model.named_parameters()}
    while parameters and all(name.startswith("module.") for name in parameters):  # added by DDP, or DeepSpeed's engine
        parameters = {name.removeprefix("module."): p for name, p in parameters.items()}
    return parameters


def bare(name: str) -> str:
    """Return a parameter's name without the wrappers around parts of the model."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _run(member: Member) -> slice:
    """Return the member's place in the flattened parameter."""
    if member.first is None:
        raise RuntimeError("Weights that are sharded by another dimension than the first cannot be saved or loaded.")
    return slice(member.first, member.first + member.p.numel())


class _Contents:
    """This process's part of a checkpoint: views of weights and state, or copies where the stored form differs."""

    def __init__(self, model: nn.Module, optimizer: TrainableOptimizer, weights: bool) -> None:
        if isinstance(optimizer, FullTO):
            raise RuntimeError("FullTO's state changes its shape with the steps: torch.save its state_dict() instead.")
        self.values: dict[str, Tensor] = {}
        self.after_loading: list[Callable[[], Any]] = []
        names = optimizer.names(named(model))
        self.members = optimizer.held()
        for member in self.members:
            name = names[member.position]
            if weights:
                self._add(name, member, member.p)
            for key, value in member.state.items():
                if key in COUNTERS:
                    self._add_counter(f"{name}.{key}", key, value, optimizer.state[member.owner])
                elif value.dtype == torch.int8:
                    self._add_int8(f"{name}.{key}", member, value, member.state[exponents_name(key)])
                elif not key.endswith(exponents_name("")):
                    self._add(f"{name}.{key}", member, value)

    def _add(self, key: str, member: Member, value: Tensor) -> None:
        runs = self.values.setdefault(key, Runs(member.numel, value))
        assert isinstance(runs, Runs)
        if value.numel():
            flat = value.detach().reshape(-1)
            runs.hold(_run(member).start, flat)
            if not value.is_contiguous():  # then flat is a copy
                self.after_loading.append(lambda: value.copy_(flat.view_as(value)))

    def _add_int8(self, key: str, member: Member, codes: Tensor, exponents: Tensor) -> None:
        first = member.first or 0
        packed = pack(codes.reshape(-1), exponents, first)
        self._add(key, member, packed)
        self.after_loading.append(lambda: unpack_(codes, exponents, packed, first))

    def _add_counter(self, key: str, name: str, value: Tensor, state: dict[str, Tensor]) -> None:
        count = self.values.setdefault(key, value.clone())

        def take() -> None:
            state[name] = count.clone()

        self.after_loading.append(take)


class Runs(Tensor):
    """A flattened tensor of which this process holds some runs, as torch's distributed checkpoint expects it."""

    runs: dict[int, Tensor]

    @staticmethod
    def __new__(cls, numel: int, like: Tensor) -> Runs:
        self: Runs = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=like.dtype, device=like.device)
        self.runs = {}
        return self

    def hold(self, first: int, run: Tensor) -> None:
        self.runs[first] = run

    def _chunks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        for first, run in self.runs.items():
            yield ChunkStorageMetadata(torch.Size((first,)), run.size()), run

    def __create_write_items__(self, fqn: str, of: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(run), self.size()),
            )
            for chunk, run in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._chunks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.runs[index.offset[0]]

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a tensor of which only some runs are here")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings that there is only one process, and that it uses a deprecated part of itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        yield
