"""Loading the base model and its tokenizer, and a fine-tuned model in one call."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import align_special_tokens

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.model.adapters import with_adapters
from to_finetune.model.quantized import Quantization, check_reading, keep_bits_still, quantize_frozen
from to_finetune.model.skeleton import skeleton_of
from to_finetune.model.trained import adapter_config, holds_adapters, load_trained, read_trained

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def load_model(
    model_name_or_path: str,
    revision: str | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub.

    Args:
        dtype: of the weights; "auto" for the dtype that they are stored in.
        quantization_config: from `quantize_frozen`; None to load the weights as they are.

    Raises:
        UsageError: in one sentence, when there is no such model, or it does not support the attention or the bits.
    """
    check_folder(model_name_or_path)
    # An explicit None would override the configuration of a base that is stored quantised.
    quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
    with _in_one_sentence(model_name_or_path, attn_implementation):
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **quantized,
        )
    if getattr(model, "is_quantized", False):
        check_reading(model)
        keep_bits_still(model)
    return model


def load_tokenizer(
    model_name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of a model.

    Raises:
        UsageError: when there is none, or it has no end-of-sequence token.
    """
    check_folder(model_name_or_path)
    with _in_one_sentence(model_name_or_path, None):
        tokenizer = AutoTokenizer.from_pretrained(
            model_name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer.eos_token is None:
        raise UsageError(f"model_name_or_path={model_name_or_path!r}: its tokenizer has no end-of-sequence token.")
    return tokenizer


def load_config(
    model_name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Load a model's configuration from a hub name, a folder with a config.json, or such a file.

    Raises:
        UsageError: when there is none.
    """
    if not Path(model_name_or_path).is_file():
        check_folder(model_name_or_path)
    with _in_one_sentence(model_name_or_path, None):
        return AutoConfig.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code)


def without_weights(
    model_name_or_path: str,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the model on the meta device: its names and shapes, without reading or allocating weights.

    Raises:
        UsageError: as `load_model`.
    """
    config = load_config(model_name_or_path, revision, trust_remote_code)
    with _in_one_sentence(model_name_or_path, attn_implementation):
        return skeleton_of(config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)


def load_finetuned(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the fine-tuned model of a run or of one of its checkpoints: the base with the trained part.

    Args:
        dtype: of the weights, including the trained ones; "auto" for the base's own. Adapters are always float32.
        quantization: of the weights that did not train; None for none, even if the run had one.

    Returns:
        The model, of the base's class or, for a run with adapters, wrapped in peft's `PeftModel`; and the run's
        tokenizer.

    Raises:
        UsageError: when the folder holds no trained weights, or the base does not exist.
    """
    model, tokenizer = load_base(folder, dtype, quantization, trust_remote_code)
    load_trained(model, folder)
    return model, tokenizer


def load_base(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load what `load_finetuned` does, but without the trained part: adapters are new and have no effect."""
    tensors, base = read_trained(folder)
    quantization_config = None
    if quantization is not None:
        skeleton = without_weights(*base, trust_remote_code=trust_remote_code)
        for name, p in skeleton.named_parameters():
            p.requires_grad_(name in tensors)
        quantization_config = quantize_frozen(quantization, skeleton, skeleton.dtype if dtype == "auto" else dtype)
    is_own = (Path(folder) / "tokenizer_config.json").is_file()
    tokenizer: Any = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if is_own
        else load_tokenizer(*base, trust_remote_code)
    )
    model: Any = load_model(*base, dtype, None, trust_remote_code, quantization_config)
    if holds_adapters(folder):
        model = with_adapters(model, adapter_config(folder))
    if is_own:
        align_special_tokens(model, tokenizer)  # the run may have taught another EOS token
    return model, tokenizer


@contextmanager
def _in_one_sentence(name: str, attn_implementation: str | None) -> Iterator[None]:
    """Convert an error of Hugging Face's while loading a model to a `UsageError` of one sentence."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, SafetensorError) as error:
        reason = shorten(str(error), 400)
        if attn_implementation and re.search("attn_implementation|attention|kernels", reason, re.IGNORECASE):
            near = did_you_mean(attn_implementation, ATTENTION)
            raise UsageError(f"attn_implementation={attn_implementation!r} is not available.{near} {reason}") from error
        raise UsageError(
            f"model_name_or_path={name!r} cannot be loaded as a causal language model: {reason}"
        ) from error


def check_folder(name: str) -> None:
    """Raise if a path holds no model, before Hugging Face takes it for a name on the hub."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model_name_or_path={name!r} holds no config.json, so it is no model.")
        return
    in_folder = path.parent.name and path.parent.is_dir()
    if path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or in_folder:
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UsageError(f"model_name_or_path={name!r}: no such folder.{did_you_mean(name, siblings)}")
