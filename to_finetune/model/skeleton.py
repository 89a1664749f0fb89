"""A model without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed


def skeleton_of(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the causal language model of `config` on the meta device: its names and shapes, without weights.

    Args:
        options: of `AutoModelForCausalLM.from_config`.

    Raises:
        ValueError: for a configuration that is not a causal language model's.
    """
    with without_zero3(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Keep DeepSpeed's ZeRO-3 from sharding a model that is created within the context, as it has no weights."""
    live = hf_deepspeed._hf_deepspeed_config_weak_ref
    try:
        hf_deepspeed._hf_deepspeed_config_weak_ref = None
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = live
