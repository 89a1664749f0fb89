"""Merging a run's trained part and its base into one ordinary model, which is verified before it gets its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from to_finetune.errors import RunError, UsageError, did_you_mean
from to_finetune.files import check_place
from to_finetune.model.load import load_finetuned
from to_finetune.model.run import find_run
from to_finetune.model.trained import Base, read_trained

TOKENS = 64  # whose logits are compared


class Merged(NamedTuple):
    """The written model, and what was compared to verify it."""

    folder: Path
    base: Base
    quantized: str | None  # "4bit" or "8bit" if the run's base was quantised; it is merged in full precision
    trained: int  # tensors
    trained_dtype: torch.dtype  # as the run saved them
    dtype: torch.dtype  # of the written model
    bytes: int
    logits: int  # compared: the written model gives them bit for bit as the one in memory
    adapter_difference: float | None  # of adapters: largest change of a logit, relative to the largest


def merge(
    run: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write the base of `run`, with its trained part, to `output_dir`, in the format of `from_pretrained`.

    Needs the memory of the base in `dtype` and of the trained part only once: the model is freed before the written one
    is read back. Adapters are added in float32 and rounded once.

    Args:
        run: a run's folder, one of its checkpoints, or any folder with peft's adapters.
        output_dir: must not exist, or be empty.
        dtype: None for the dtype that the base is stored in.

    Raises:
        UsageError: for a run that has no trained part or trained everything, a base that does not exist or is itself
            quantised, and an `output_dir` that is not empty.
        RunError: when merging adapters changes the logits too much, or the written model gives other logits than the
            one in memory; nothing is left behind.
    """
    folder, output = Path(run), Path(output_dir).resolve()
    found = find_run(str(run))
    if found is None:
        siblings = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        what = "holds nothing that was trained" if folder.is_dir() else "is no folder"
        raise UsageError(f"{str(run)!r} {what}.{did_you_mean(str(run), siblings) if not folder.is_dir() else ''}")
    if found.part == "whole":
        raise UsageError(f"{str(run)!r} trained everything, and is an ordinary model already: nothing to merge.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UsageError(f"output_dir={str(output_dir)!r} is not empty; choose a new folder.")
    check_place("output_dir", output)
    tensors, base = read_trained(folder)
    model, tokenizer = load_finetuned(folder, dtype or "auto", trust_remote_code=trust_remote_code)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError(f"The base {base.model_name_or_path!r} is itself quantised: no full weights to merge with.")

    difference = None
    in_memory = _logits(model)
    if isinstance(model, PeftModel):
        beside_base, model = in_memory, model.merge_and_unload()
        in_memory = _logits(model)
        difference = ((in_memory - beside_base).abs().max() / beside_base.abs().max()).item()
        if not difference < (1e-3 if model.dtype == torch.float32 else 0.1):
            is_tied = getattr(model.config, "tie_word_embeddings", False)
            on_tied = is_tied and any(part in name for name in tensors for part in ("lora_embedding", "lm_head."))
            because = " The base's head is its embedding, and the adapters are of one of the two." if on_tied else ""
            raise RunError(
                f"Merging the adapters changed the logits by {difference:.1%} of the largest; not written.{because}"
            )
    dtype = model.dtype
    with _new_folder(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model
        written = _logits(
            AutoModelForCausalLM.from_pretrained(partial, dtype=dtype, trust_remote_code=trust_remote_code)
        )
        if not torch.equal(written, in_memory):
            raise RunError(f"What was written does not give the logits of the model in memory; {output} is not kept.")
        size = sum(file.stat().st_size for file in partial.iterdir())
    return Merged(
        folder=output,
        base=base,
        quantized=found.quantization,
        trained=len(tensors),
        trained_dtype=next(iter(tensors.values())).dtype,
        dtype=dtype,
        bytes=size,
        logits=written.numel(),
        adapter_difference=difference,
    )


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Return the logits of `TOKENS` tokens from all over the vocabulary, (TOKENS, vocabulary), float32."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(TOKENS)[None] * vocabulary // TOKENS
    return model.eval()(tokens.to(model.device), use_cache=False).logits[0].float()


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` at the end; on an error it is removed."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a merge that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
