"""From arguments to what a run needs: the model with its trained subset, the data, the trainer."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from trl.data_utils import is_conversational

from to_finetune.data import load_data
from to_finetune.data.alpaca import CHAT_TEMPLATE
from to_finetune.errors import UsageError
from to_finetune.model import load_model, select_trainable
from to_finetune.model.subset import Subset, keep_trained_in_float32
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.trainer import TOSFTTrainer


def prepare_model(model_args: ModelArguments, args: FinetuneArguments) -> tuple[Any, Any, Subset]:
    """The base model with all but the subset frozen, its tokenizer, and the subset."""
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    model, tokenizer = load_model(
        model_args.model_name_or_path,
        model_args.model_revision,
        getattr(torch, model_args.dtype or mixed or "float32"),
        model_args.attn_implementation,
        args.trust_remote_code,
    )
    subset = select_trainable(model, model_args.unfrozen_parameters)
    if mixed:
        keep_trained_in_float32(model)
    return model, tokenizer, subset


def prepare_data(data_args: DataArguments, args: FinetuneArguments, tokenizer: Any) -> tuple[Any, Any]:
    """The training and held-out rows; for chat messages also the template and the masking that they need."""
    train, held_out = load_data(
        data_args.dataset_name[0],
        data_args.dataset_config,
        data_args.dataset_train_split,
        data_args.eval_dataset_name,
        data_args.dataset_test_split,
        data_args.val_set_size,
    )
    if len(train) > 20_000:
        datasets.enable_progress_bars()  # tokenizing takes long enough to want them
    if tokenizer.chat_template is None and is_conversational(train[0]):
        tokenizer.chat_template = CHAT_TEMPLATE
    if args.assistant_only_loss is None:
        args.assistant_only_loss = "messages" in train.column_names
    if held_out is None and args.eval_strategy != "no":
        raise UsageError(f"eval_strategy={args.eval_strategy.value!r} needs --eval_dataset_name or --val_set_size.")
    return train, held_out


def prepare_trainer(
    model: Any, tokenizer: Any, args: FinetuneArguments, train_dataset: Any, eval_dataset: Any
) -> TOSFTTrainer:
    """The trainer, which tokenizes the data.

    Raises:
        UsageError: for what TRL and Hugging Face refuse in the settings and the data.
    """
    try:
        return TOSFTTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "assistant_only_loss" not in str(error):
            raise
        raise UsageError(str(error)) from error
