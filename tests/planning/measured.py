"""Real training steps on the CPU, and what they allocate."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from to_finetune.model import select_trainable
from to_finetune.model.adapters import lora_config, with_adapters
from to_finetune.planning import Workload


def allocated_at_most(function: Callable[[], Any]) -> int:
    """The largest growth of what the CPU's allocator has given out, kernels' scratch included, while it runs; bytes.

    From the allocator's own reports to torch's profiler, as `torch.cuda.max_memory_allocated` is on a GPU.
    """
    gc.collect()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with torch.backends.mkldnn.flags(enabled=False), profiler:  # whose scratch for bfloat16 depends on the processor
        function()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    reports = sorted((event.start_ns(), i, event) for i, event in enumerate(events) if event.name() == "[memory]")
    return max(itertools.accumulate(event.nbytes() for _, _, event in reports))


def real_model(work: Workload) -> Any:
    """As `prepare_model` and the Trainer make it, with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        work.model.config,
        dtype=getattr(torch, work.loaded_dtype),
        attn_implementation=work.attention,
    )
    if work.lora:
        targets = work.lora.targets and list(work.lora.targets)
        model = with_adapters(model, lora_config(work.lora.rank, 32, work.lora.dropout, targets))
    else:
        select_trainable(model, work.unfrozen_parameters)
    if work.mixed_precision:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    if work.checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.disable_input_require_grads()
    base = model.get_base_model() if work.lora else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def quantize(model: Any, quantization: str) -> None:
    """Put bitsandbytes' layers in place of the frozen linear ones, but the head."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, old in list(model.named_modules()):
        if type(old) is not nn.Linear or old.weight.requires_grad or old is model.get_output_embeddings():
            continue
        shape = (old.in_features, old.out_features)
        if quantization == "4bit":
            new: Any = Linear4bit(*shape, bias=False, compute_dtype=torch.float32)
            new.weight = Params4bit(old.weight.data, False, quant_type="nf4", compress_statistics=False)
        else:
            new = Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = Int8Params(old.weight.data, requires_grad=False)
        model.set_submodule(name, new.to("cpu"))
    model.train()


def trained_parameters(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """Of the state, tensors that parameters share once."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def base_bytes(model: nn.Module) -> int:
    """Of the frozen weights, with the scales and the codes of bitsandbytes."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    nf4 = [p.quant_state for p in frozen if getattr(p, "quant_state", None)]
    rows = [module for module in model.modules() if hasattr(getattr(module, "state", None), "SCB")]
    int8 = [module.weight.SCB if module.state.SCB is None else module.state.SCB for module in rows]  # moved when used
    return sum(t.nbytes for t in (*frozen, *(t for q in nf4 for t in (q.absmax, q.code)), *int8))


def loss_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """As TRL's SFTTrainer computes it."""
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    return -model(**batch, fused_lm_head=True).log_probs.sum() / 100


def take_gradients(model: Any, work: Workload) -> Callable[[], None]:
    """A micro-batch's forward and backward, of rows of which one is padded."""
    vocabulary = work.model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (work.rows, work.length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    precision = torch.autocast("cpu", getattr(torch, str(work.mixed_precision))) if work.mixed_precision else None

    def run() -> None:
        with precision or nullcontext():
            loss = loss_of(model, ids, mask)
        loss.backward()

    return run
