"""The base model and its tokenizer, and a fine-tuned model in one call."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import shorten

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.model.trained import load_trained, read_trained


def load_model(
    model_name_or_path: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder or the hub.

    Raises:
        UsageError: when there is no such model, in one sentence.
    """
    _check_folder(model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 400)
        raise UsageError(
            f"model_name_or_path={model_name_or_path!r} cannot be loaded as a causal language model: {reason}"
        ) from error
    if tokenizer.eos_token is None:
        raise UsageError(f"model_name_or_path={model_name_or_path!r}: its tokenizer has no end-of-sequence token.")
    return model, tokenizer


def load_finetuned(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fine-tuned model of a run or of one of its checkpoints: the base, with the trained tensors on it.

    Raises:
        UsageError: when the folder holds no trained weights, or the base is not there.
    """
    _, base = read_trained(folder)
    model, tokenizer = load_model(base.model_name_or_path, base.revision, dtype)
    load_trained(model, folder)
    if (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def _check_folder(name: str) -> None:
    """Refuse a path that holds no model, before Hugging Face takes it for a name on the hub."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model_name_or_path={name!r} holds no config.json, so it is no model.")
        return
    in_folder = path.parent.name and path.parent.is_dir()
    if path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or in_folder:
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UsageError(f"model_name_or_path={name!r}: no such folder.{did_you_mean(name, siblings)}")
