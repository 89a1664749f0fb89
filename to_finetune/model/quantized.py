"""A frozen base in 8 or 4 bits (bitsandbytes), of which the part that trains stays in its own dtype."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from to_finetune.errors import UsageError

Quantization = Literal["8bit", "4bit"]


def quantize_frozen(
    quantization: Quantization, model: PreTrainedModel, compute_dtype: torch.dtype
) -> BitsAndBytesConfig:
    """Quantise the linear layers, but those of which a weight or a bias trains, and the output head; 4 bits are nf4.

    Args:
        model: with its trained parameters chosen; its weights are not looked at and may be on the meta device.
        compute_dtype: that the 4-bit layers compute in; LLM.int8() computes in its input's.

    Raises:
        UsageError: without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"load_in_{quantization} needs bitsandbytes: pip install 'to-finetune[quantized]'.")
    head = model.get_output_embeddings()
    kept = [
        name
        for name, module in model.named_modules()
        if module is head or any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    return BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        # Taken as regular expressions from a name's start and as words at its end: anchored, each finds one module.
        llm_int8_skip_modules=[f"^{re.escape(name)}$" for name in kept],
    )


def keep_bits_still(model: Any) -> None:
    """Make a quantised model one that a Trainer takes, and whose frozen weights no forward pass rewrites."""
    model.is_quantized = (
        False  # says the Trainer's check; what trains is not quantised, `select_trainable` sees to that
    )
    compute_dtype = getattr(model.config.quantization_config, "bnb_4bit_compute_dtype", None)
    for module in model.modules():
        # For an evaluation on some CPUs it would pack the weights anew, and then they let no gradient through.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if compute_dtype and is_quantized_linear(module) and module.bias is not None:
            module.bias.data = module.bias.data.to(compute_dtype)  # as its first forward pass would


def is_quantized_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor) and not weight.is_floating_point()
