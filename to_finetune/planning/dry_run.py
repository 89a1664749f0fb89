"""Dry-run a training step on fake tensors, to find its peak memory and its FLOPs.

The real model class runs forward and backward on tensors that have shapes and dtypes but no data, with the autocast,
frozen weights and gradient checkpointing of a run. Autograd saves and frees the same tensors as it would on a GPU, so
the largest sum of live bytes at any moment is the peak, for any architecture.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, shape_wrapper
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from to_finetune.errors import UsageError
from to_finetune.model.adapters import lora_config, with_adapters
from to_finetune.model.quantized import frozen_linears
from to_finetune.model.skeleton import without_zero3
from to_finetune.model.subset import keep_trained_in_float32, select_trainable
from to_finetune.planning.settings import CannotSay, Lora, Workload

aten = torch.ops.aten
GPU_BLOCK = 512  # bytes; the CUDA caching allocator rounds sizes up to a multiple of it


@dataclass(frozen=True)
class Weight:
    """A parameter as one GPU would hold it unsharded.

    Attributes:
        itemsize: bytes per element.
        quantized_rows: the rows in which bitsandbytes would hold it, of a frozen linear layer; 0 if it would not.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    quantized_rows: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class DryRun:
    """The memory and arithmetic of one micro-batch.

    Attributes:
        weights: the model's parameters, tied ones once.
        buffers: bytes of the model's buffers.
        peak: the most bytes of activations and kept gradients at any moment.
        flops: of matrix products and attention, over forward, backward and recomputation.
    """

    weights: tuple[Weight, ...]
    buffers: int
    peak: int
    flops: int


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live storages that were created under it, as an allocator would, and counts FLOPs.

    Attributes:
        live, peak: current and peak bytes.
        flops: of matrix products and attention.
    """

    def __init__(self, existing: Sequence[Tensor] = (), gpu: bool = False) -> None:
        """Leave out the tensors in `existing`; with `gpu`, count memory as on a CUDA device."""
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._gpu = gpu
        self._existing = [t.untyped_storage() for t in existing]  # kept alive: their addresses must not be reused
        self._known: dict[int, Any] = dict.fromkeys(storage._cdata for storage in self._existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := _FLOPS.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        scratch = 0
        if self._gpu and func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            scratch = 4 * args[1].numel()  # CUDA's kernels accumulate the gradient of the queries in float32
        self.peak = max(self.peak, self.live + scratch)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            size = -(-size // GPU_BLOCK) * GPU_BLOCK if self._gpu else size
            self.live += size
            self._known[key] = weakref.ref(storage, partial(self._free, key, size))

    def _free(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._known[key]


@lru_cache(maxsize=256)
def dry_run(work: Workload, passes: str, accumulating: bool) -> DryRun:
    """Run one micro-batch forward and backward on fake tensors.

    Args:
        work: the micro-batch.
        passes: a layout, from `Settings.passes`.
        accumulating: whether gradients of an earlier micro-batch already exist.

    Raises:
        UsageError: for a pattern that matches nothing.
        CannotSay: if the model's operations cannot run without data.
    """
    try:
        with without_zero3(), FakeTensorMode():
            return _dry_run(work, passes, accumulating)
    except UsageError:
        raise
    except Exception as error:  # a model's code may fail on fake tensors in any way
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise CannotSay(f"{work.model.name}: a training step cannot be run without data ({reason}).") from error


def _dry_run(work: Workload, passes: str, accumulating: bool) -> DryRun:
    sharded = passes != "ddp"
    model = _model(work, sharded)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    if passes in ("fsdp2", "zero2"):
        for p in trained:
            p.register_post_accumulate_grad_hook(_drop_gradient)  # its shard is counted separately
    elif accumulating:
        for p in trained:
            p.grad = torch.empty_like(p)
    gradients = [p.grad for p in trained if p.grad is not None]
    masked = work.attention in _WITH_MASKS  # flash attention keeps joined rows apart, like those of a batch
    shape = (1, work.rows * work.length) if work.joined and masked else (work.rows, work.length)
    batch = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}
    autocast = work.mixed_precision and passes in ("ddp", "fsdp2")  # DeepSpeed casts the model instead
    precision = torch.autocast("cpu", getattr(torch, str(work.mixed_precision))) if autocast else nullcontext()
    there = [*gradients, *batch.values()]
    live = LiveBytes([*parameters, *buffers, *there], gpu=work.device != "cpu")
    live.live = live.peak = sum(t.nbytes for t in there)
    with _kernels_of(work.device), live:
        with precision:
            loss = _loss(model, batch)
        loss.backward()
    return DryRun(
        weights=tuple(_weights(model)),
        buffers=sum(t.nbytes for t in buffers),
        peak=live.peak,
        flops=live.flops,
    )


def _model(work: Workload, sharded: bool) -> Any:
    """Build the model as `prepare_model` does, or in its compute dtype if the layout shards it; on fake tensors."""
    attention = work.attention if work.attention in _WITH_MASKS else _FLASH
    computing = getattr(torch, work.mixed_precision) if sharded and work.mixed_precision else None
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(work.model.config),
        dtype=computing or getattr(torch, work.loaded_dtype),
        attn_implementation=attention,
        trust_remote_code=work.model.trust_remote_code,
    )
    if work.lora:
        model = _with_adapters(model, work.lora, computing or torch.float32)
    else:
        select_trainable(model, work.unfrozen_parameters)
    if work.mixed_precision and not sharded:
        keep_trained_in_float32(model)
    if work.quantization:
        for module in frozen_linears(model).values():
            quantized = partial(_quantized_linear, module, work.quantization == "8bit")
            module.forward = quantized  # type: ignore[method-assign]
    model.train()
    if work.checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.disable_input_require_grads()  # as `ShortBackward` does
    return model


def _with_adapters(model: nn.Module, lora: Lora, dtype: torch.dtype) -> Any:
    """Add adapters as a run does, first on the meta device because peft cannot move fake tensors."""
    targets = lora.targets and list(lora.targets)
    with unset_fake_temporarily(), torch.device("meta"):
        adapted = with_adapters(model, lora_config(lora.rank, lora.rank, lora.dropout, targets))
    for module in adapted.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype))
    return adapted


def _weights(model: nn.Module) -> Iterator[Weight]:
    rows = {id(module.weight): len(_matrix(module)) for module in frozen_linears(model).values()}
    for name, p in model.named_parameters():
        yield Weight(name, tuple(p.shape), p.element_size(), p.requires_grad, rows.get(id(p), 0))


def _matrix(module: nn.Linear | Conv1D) -> Tensor:
    """Return its weight, (outputs, inputs)."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute the loss as TRL's SFTTrainer does: the head in tiles, never the logits of all tokens at once."""
    from trl.trainer.utils import add_fused_lm_head

    headed = model.get_base_model() if hasattr(model, "peft_config") else model
    add_fused_lm_head(headed, outputs=("log_probs", "entropy", "is_top1"))
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def _drop_gradient(p: Tensor) -> None:
    p.grad = None


@contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """Patch TRL's head to work in place, as its Triton kernels do on a GPU; its CPU code makes copies."""
    from trl.kernels import chunked_logprob

    in_place: dict[str, Any] = dict.fromkeys(("_forward_tile", "_backward_tile"), lambda *args, **kwargs: None)
    if hasattr(aten.addmm, "dtype_out"):  # from torch 2.8 on; before, TRL makes copies on a GPU too
        # In acc's float32, since torch before 2.13 does not support products of mixed dtypes on fake tensors.
        in_place["_addmm_fp32"] = lambda acc, a, b: torch.addmm(acc, _like(a, acc), _like(b, acc), out=acc)
    before = {name: getattr(chunked_logprob, name) for name in in_place}
    try:
        if device != "cpu":
            vars(chunked_logprob).update(in_place)
        yield
    finally:
        vars(chunked_logprob).update(before)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """Return a tensor of x's shape and other's dtype that stores a single element."""
    return other.new_empty(()).expand(x.shape)


def _flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


_WITH_MASKS = (None, "eager", "sdpa")
# Flash attention saves what torch's own attention saves, without a mask; a plan must not depend on it being installed.
_FLASH = "to_finetune_maskless"  # a name with "flash" in it would be looked up on the hub
AttentionInterface.register(_FLASH, _flash)


class _QuantizedProduct(torch.autograd.Function):
    """The memory use of bitsandbytes' product with a frozen quantised matrix; no dequantised weight is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_int8: bool) -> Tensor:
        ctx.weight, ctx.x = weight, x if is_int8 else None  # LLM.int8() keeps its input alive without using it
        if is_int8:
            codes = torch.empty_like(x, dtype=torch.int8)
            products = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.int32)
            out = nn.functional.linear(x, weight, bias)
            del codes, products
            return out
        return nn.functional.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ torch.empty_like(ctx.weight, dtype=grad.dtype), None, None, None


def _quantized_linear(module: nn.Linear | Conv1D, is_int8: bool, x: Tensor) -> Tensor:
    return _QuantizedProduct.apply(x, _matrix(module), module.bias, is_int8)


def _addmm_flop(acc: Any, a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# torch's table, with the operations and overloads that it lacks.
_FLOPS = flop_registry | {
    aten.addmm: shape_wrapper(_addmm_flop),
    aten.addmm_: shape_wrapper(_addmm_flop),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
