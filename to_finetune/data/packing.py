"""Whether a model keeps apart the examples that are packed into one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from to_finetune.errors import UsageError

LEAK = 0.03  # of the largest logit; another context changes it by 0.2 and more, outliers of an 8-bit base by up to 0.01


@torch.no_grad()
def check_packing(model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
    """Raise if the second example of a row sees the first, so that its logits depend on it.

    Most models of `transformers` find the borders by the positions, which restart at each example, and mask or split
    the attention there; in every release some models (OPT, Mamba) silently do not.

    Args:
        model: a causal language model, called twice with eight tokens.
        collate: makes a batch of rows with `input_ids`, `labels` and `seq_lengths`, as the run's does.

    Raises:
        UsageError: when it does.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    logits = []
    for first in ([0, 1, 2, 3], [4, 5, 6, 7]):
        tokens = [*first, 0, 1, 2, 3]
        batch = collate([{"input_ids": tokens, "labels": tokens, "seq_lengths": [4, 4]}])
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        del inputs["labels"]
        logits.append(model(**inputs, use_cache=False).logits[0, 4:].float())
    model.train(training)
    if (logits[0] - logits[1]).abs().max() > LEAK * logits[0].abs().max():
        attention = getattr(model.config, "_attn_implementation", None)
        raise UsageError(
            f"packing: with attn_implementation={attention!r} this {type(model).__name__} lets packed examples see "
            "each other. Leave --packing and --padding_free out, or try --attn_implementation flash_attention_2."
        )
