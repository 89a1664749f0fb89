"""The memory of a run on each GPU: weights, gradients, state, activations, buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from to_finetune.layers import layer_list, layer_of
from to_finetune.optim import DiagonalTO, RankOneTO
from to_finetune.planning.dry_run import DryRun, Weight, dry_run
from to_finetune.planning.settings import Settings
from to_finetune.planning.state import StateBytes, state_bytes

# Assumptions, in bytes or elements.
CUDA_CONTEXT = 700_000_000  # the driver's context, cuBLAS' workspace and loaded kernels; varies with GPU and versions
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default, allocated whole in backward however small the model
GATHERED = 1_050_000_000  # elements; the most that ZeRO-3 gathers: max_live_parameters plus the prefetch bucket
PERSISTENT = 100_000  # elements; ZeRO-3 keeps smaller tensors whole

PARTS = ("frozen", "trained", "gradients", "state", "activations", "buffers", "context")


@dataclass(frozen=True)
class Plan:
    """The bytes of a run on each GPU (printed in decimal units), the largest share if processes hold different ones.

    Attributes:
        settings: the planned settings.
        total_weights, trained_weights: counts, over all processes.
        frozen: the frozen weights.
        trained: the trained weights, with the 32-bit copies that DeepSpeed keeps.
        gradients: of the trained weights.
        state: the optimizer's state.
        activations: the most that a step needs beyond the parts above, in the backward pass or the optimizer's step.
        buffers: the model's own, and the layout's communication buffers.
        context: the CUDA context, an assumption.
        host: CPU memory of each process: offloaded state, or paged state of bitsandbytes.
        saved: the trained weights on disk, of all processes.
        flops_per_token: over forward, backward and recomputation.
    """

    settings: Settings
    total_weights: int
    trained_weights: int
    frozen: int
    trained: int
    gradients: int
    state: int
    activations: int
    buffers: int
    context: int
    host: int
    saved: int
    flops_per_token: float

    @property
    def total(self) -> int:
        """Peak bytes on each GPU."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes that add up to `total`, by attribute name."""
        return {name: getattr(self, name) for name in PARTS}

    def fits(self, budget: int) -> bool:
        """Return whether the run fits in `budget` bytes on each GPU."""
        return self.total <= budget


def plan(settings: Settings) -> Plan:
    """Plan the memory of a run.

    Raises:
        UsageError: for a pattern that matches nothing.
        CannotSay: for an optimizer or a model whose needs cannot be worked out without data.
    """
    work = settings.work
    run = dry_run(work, settings.passes, settings.accumulation > 1)
    trained = [w for w in run.weights if w.trained]
    state = state_bytes(settings, *_stepped(settings, trained))
    offloaded = settings.is_offloaded
    masters = 4 * _share(settings, sum(w.numel for w in trained)) if settings.is_deepspeed else 0
    gradients = _gradient_bytes(settings, trained)
    kept = gradients if settings.passes in ("ddp", "zero1") else 0  # included in the dry run's peak
    return Plan(
        settings=settings,
        total_weights=sum(w.numel for w in run.weights),
        trained_weights=sum(w.numel for w in trained),
        frozen=sum(_frozen_bytes(settings, w) for w in run.weights if not w.trained),
        trained=_trained_bytes(settings, trained) + (0 if offloaded else masters),
        gradients=gradients,
        state=0 if offloaded else state.held - state.paged,
        activations=max(run.peak - kept, 0 if offloaded else _step_bytes(settings, state, masters)),
        buffers=run.buffers + _communication_bytes(settings, run, trained),
        context=CUDA_CONTEXT if work.device != "cpu" else 0,
        host=_host_bytes(settings, state, masters),
        saved=_saved_itemsize(settings) * sum(w.numel for w in trained),
        flops_per_token=run.flops / (work.rows * work.length),
    )


def _step_bytes(settings: Settings, state: StateBytes, masters: int) -> int:
    """Return what the optimizer's step needs; DeepSpeed's adds 32-bit gradients, but has freed the reduce bucket."""
    if not settings.is_deepspeed:
        return state.in_step
    return state.in_step + masters - REDUCE_BUCKET * _loaded_itemsize(settings)


def _share(settings: Settings, count: int) -> int:
    return -(-count // settings.processes)


def _rows_share(settings: Settings, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of FSDP2's first shard, the largest."""
    return (_share(settings, shape[0]), *shape[1:]) if shape else ()


def _stepped(settings: Settings, trained: Sequence[Weight]) -> tuple[list[tuple[int, ...]], torch.dtype]:
    """Return the shapes and the dtype of the weights that one process's optimizer updates."""
    if settings.layout == "fsdp2":
        return [_rows_share(settings, w.shape) for w in trained], _dtype(_trained_itemsize(settings))
    if not settings.is_deepspeed:
        return [w.shape for w in trained], _dtype(trained[0].itemsize)
    shapes, left = list[tuple[int, ...]](), _share(settings, sum(w.numel for w in trained))
    for w in trained:  # a flat partition: consecutive weights, cut at the share
        shapes.append((min(left, w.numel),))
        left -= shapes[-1][0]
        if not left:
            break
    return shapes, torch.float32


def _dtype(itemsize: int) -> torch.dtype:
    return torch.float32 if itemsize == 4 else torch.bfloat16


def _loaded_itemsize(settings: Settings) -> int:
    work = settings.work
    name = work.mixed_precision if settings.is_deepspeed and work.mixed_precision else work.loaded_dtype
    return getattr(torch, name).itemsize


def _trained_itemsize(settings: Settings) -> int:
    """Return the trained weights' itemsize: 4 with mixed precision or adapters, unless DeepSpeed casts them."""
    work = settings.work
    kept = (work.mixed_precision or work.lora) and not settings.is_deepspeed
    return 4 if kept else _loaded_itemsize(settings)


def _saved_itemsize(settings: Settings) -> int:
    """Return the trained weights' itemsize on disk; DiagonalTO and RankOneTO save DeepSpeed's 32-bit copies."""
    by_name = settings.optimizer in (DiagonalTO, RankOneTO)
    return 4 if settings.is_deepspeed and by_name else _trained_itemsize(settings)


def _frozen_bytes(settings: Settings, w: Weight) -> int:
    if settings.work.quantization and w.quantized_rows:
        return _quantized_bytes(w, settings.work.quantization)
    return _held_bytes(settings, w, _loaded_itemsize(settings))


def _trained_bytes(settings: Settings, trained: Sequence[Weight]) -> int:
    return sum(_held_bytes(settings, w, _trained_itemsize(settings)) for w in trained)


def _held_bytes(settings: Settings, w: Weight, itemsize: int) -> int:
    """Return the bytes of one weight between steps; `itemsize` applies if it is sharded."""
    if settings.layout == "fsdp2":
        return itemsize * torch.Size(_rows_share(settings, w.shape)).numel()
    if settings.layout.startswith("zero3"):
        return itemsize * (_share(settings, w.numel) + (w.numel if w.numel < PERSISTENT else 0))
    return w.numel * w.itemsize


def _quantized_bytes(w: Weight, quantization: str) -> int:
    """Return the bytes of bitsandbytes' int8 (a float32 scale per row) or nf4 (one per 64 elements, and 16 codes)."""
    if quantization == "8bit":
        return w.numel + 4 * w.quantized_rows
    return -(-w.numel // 2) + 4 * -(-w.numel // 64) + 64


def _gradient_bytes(settings: Settings, trained: Sequence[Weight]) -> int:
    if settings.is_offloaded:
        return 0
    if settings.layout == "fsdp2":
        return _trained_bytes(settings, trained)
    if settings.layout in ("zero2", "zero3"):
        return _trained_itemsize(settings) * _share(settings, sum(w.numel for w in trained))
    return sum(w.numel * w.itemsize for w in trained)


def _communication_bytes(settings: Settings, run: DryRun, trained: Sequence[Weight]) -> int:
    """Return the bytes of the layout's communication buffers; DDP and FSDP2 have none on one GPU."""
    itemsize = _loaded_itemsize(settings)
    if settings.is_deepspeed:
        gathered = min(GATHERED, sum(w.numel for w in run.weights)) if settings.layout.startswith("zero3") else 0
        received = max(w.numel for w in trained) if settings.is_offloaded else 0
        return itemsize * (REDUCE_BUCKET + gathered + received)
    if settings.processes == 1:
        return 0
    if settings.layout == "fsdp2":
        return _unsharded_bytes(settings, run)
    return sum(w.numel * w.itemsize for w in trained)  # DDP's buckets


def _unsharded_bytes(settings: Settings, run: DryRun) -> int:
    """Bound what FSDP2 holds unsharded: two layers and their all-gather buffer, gradients and their reduce buffer.

    The head stays unsharded from forward to backward.
    """
    itemsize = getattr(torch, settings.work.mixed_precision or settings.work.loaded_dtype).itemsize
    prefix, _ = layer_list({w.name: w.numel for w in run.weights})
    layers, gradients = Counter[int](), Counter[int]()
    rest = 0
    for w in run.weights:
        layer = layer_of(w.name, prefix)
        if layer is None:
            rest = max(rest, w.numel)
        else:
            layers[layer] += w.numel
            gradients[layer] += w.numel * w.trained
    whole = 3 * max(layers.values(), default=0) + 2 * max(gradients.values(), default=0)
    return itemsize * (whole + rest)


def _host_bytes(settings: Settings, state: StateBytes, masters: int) -> int:
    """Return the bytes in CPU memory: state, 32-bit weights and gradients, and 16-bit ones in transit."""
    if not settings.is_offloaded:
        return state.paged
    return state.held + 2 * masters + masters // 4 * _loaded_itemsize(settings)
