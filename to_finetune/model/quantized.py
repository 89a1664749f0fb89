"""A frozen base in 8 or 4 bits (bitsandbytes); the part that trains stays in its own dtype."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from to_finetune.errors import UsageError

Quantization = Literal["8bit", "4bit"]


def quantize_frozen(
    quantization: Quantization, model: PreTrainedModel, compute_dtype: torch.dtype
) -> BitsAndBytesConfig:
    """Return a configuration that quantises the linear layers; 4 bits are nf4.

    The output head and layers whose weight or bias trains are not quantised.

    Args:
        model: with its trained parameters chosen; its weights are not read and may be on the meta device.
        compute_dtype: of the 4-bit layers; LLM.int8() computes in its input's dtype.

    Raises:
        UsageError: without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"load_in_{quantization} needs bitsandbytes: pip install 'to-finetune[quantized]'.")
    frozen = frozen_linears(model)
    kept = [name for name, module in model.named_modules() if _is_linear(module) and name not in frozen]
    return BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        # Matched as regular expressions at a name's start and as plain suffixes: anchored, each finds one module.
        llm_int8_skip_modules=[f"^{re.escape(name)}$" for name in kept],
    )


def frozen_linears(model: Any) -> dict[str, nn.Linear | Conv1D]:
    """Return what is quantised, by name: linear layers that are not the head and of which nothing trains."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and not any(p.requires_grad for p in module.parameters())
    }


def _is_linear(module: nn.Module) -> bool:
    """Whether Hugging Face quantises such a module; GPT-2's Conv1D is a linear layer with (inputs, outputs) weights."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def check_reading(model: nn.Module) -> None:
    """Raise if bitsandbytes misreads a matrix, as 0.50 does 4-bit rows of 16, 32 or 48 mod 64 on AVX-512 CPUs.

    Raises:
        UsageError: naming the matrix.
    """
    for name, module in model.named_modules():
        in_4_bits = is_quantized_linear(module) and hasattr(module.weight, "quant_state")
        if in_4_bits and module.weight.device.type == "cpu" and not _reads_rows_of(module.in_features):
            raise UsageError(
                f"load_in_4bit: bitsandbytes misreads {name!r} on this CPU, as it does 4-bit rows of "
                f"{module.in_features}, which is no multiple of 64. Choose load_in_8bit, or a GPU."
            )


@cache
def _reads_rows_of(columns: int) -> bool:
    """Whether the CPU reads the rows of a 4-bit matrix as it reads the same codes in one long row."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    rows, one_row = (dequantize_4bit(*quantize_4bit(x, quant_type="nf4")) for x in (weight, weight.flatten()))
    return torch.equal(rows.flatten(), one_row.flatten())


def keep_bits_still(model: Any) -> None:
    """Make a Trainer accept a quantised model, and keep forward passes from rewriting its frozen weights."""
    model.is_quantized = False  # for the Trainer's check; `select_trainable` ensures that what trains is not quantised
    compute_dtype = getattr(model.config.quantization_config, "bnb_4bit_compute_dtype", None)
    for module in model.modules():
        # On some CPUs it would repack the weights for an evaluation, and they would then pass no gradient on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if compute_dtype and is_quantized_linear(module) and module.bias is not None:
            module.bias.data = module.bias.data.to(compute_dtype)  # as its first forward pass would


def is_quantized_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor) and not weight.is_floating_point()
