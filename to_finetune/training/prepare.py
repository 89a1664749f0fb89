"""From arguments to what a run needs: the model with its trained subset, the data, the trainer."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from datasets import Dataset
from jinja2 import TemplateError
from peft import PeftConfig
from rich.console import Console, Group
from rich.text import Text
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from to_finetune.data import load_data
from to_finetune.data.formats import MESSAGES, TURNS
from to_finetune.data.packing import check_packing
from to_finetune.data.statistics import notes, statistics, table
from to_finetune.data.template import check_marked, set_chat_template
from to_finetune.errors import UsageError
from to_finetune.model.adapters import adapter_subset, lora_config, with_adapters
from to_finetune.model.load import load_model, load_tokenizer, without_weights
from to_finetune.model.quantized import quantize_frozen
from to_finetune.model.subset import Subset, keep_trained_in_float32, select_trainable
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.flags import check_base, check_data_flags, check_losses
from to_finetune.training.optimizers import recommended_learning_rate
from to_finetune.training.sft import TOSFTTrainer


def prepare_model(model_args: ModelArguments, args: FinetuneArguments, is_trained: bool = True) -> tuple[Any, Subset]:
    """Load the base model with all but the trained subset frozen, or with adapters; return it with the subset.

    Args:
        is_trained: False for a model as it was loaded: mixed precision then widens none of its weights.

    Raises:
        UsageError: for an invalid model, choice of weights or adapters, or combination of flags; before any weight is
            loaded.
    """
    mixed = args.autocast_dtype
    dtype = getattr(torch, model_args.dtype or mixed or "float32")
    base, revision = model_args.model_name_or_path, model_args.model_revision
    attention, trust = model_args.attn_implementation, args.trust_remote_code
    skeleton, subset, patterns, lora = _without_weights(model_args, args)

    quantization_config = None
    if model_args.quantization:
        compute_dtype = getattr(torch, mixed) if mixed else dtype
        quantization_config = quantize_frozen(model_args.quantization, skeleton, compute_dtype)
    model: Any = load_model(base, revision, dtype, attention, trust, quantization_config)
    if lora:
        set_seed(args.seed)  # of the adapters' initial weights
        return with_adapters(model, lora), subset
    select_trainable(model, patterns)
    if mixed and is_trained:
        keep_trained_in_float32(model)
    return model, subset


def settle(model_args: ModelArguments, args: FinetuneArguments) -> None:
    """Set what was not given and depends on the model: a TO's rate for what trains, and `max_length`.

    Raises:
        UsageError: as `prepare_model`, even if all was given; and as `settle_length`.
    """
    skeleton, *_ = _without_weights(model_args, args)
    if args.learning_rate is None:
        args.learning_rate = recommended_learning_rate(skeleton)
    settle_length(skeleton, args)


def settle_length(skeleton: Any, args: FinetuneArguments) -> None:
    """Lower the default `max_length` to the model's context; another one may exceed it if no positions are learned.

    Raises:
        UsageError: for a length for which the model has no positions.
    """
    context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if context is None or args.max_length is None or args.max_length <= context:
        return
    if args.max_length == FinetuneArguments.max_length:
        args.max_length = context
        return
    words = skeleton.get_input_embeddings()
    if any(isinstance(module, nn.Embedding) and module is not words for module in skeleton.modules()):
        raise UsageError(f"max_length={args.max_length} is not valid: at most {context}, for which the model learned.")


def _without_weights(
    model_args: ModelArguments, args: FinetuneArguments
) -> tuple[Any, Subset, list[str] | None, PeftConfig | None]:
    """Return the base model on the meta device, and what trains in it: the subset, with its patterns or adapters."""
    check_base(model_args, args)
    skeleton = without_weights(
        model_args.model_name_or_path,
        model_args.model_revision,
        model_args.attn_implementation,
        args.trust_remote_code,
    )
    patterns = model_args.patterns(skeleton)
    if not model_args.use_peft:
        return skeleton, select_trainable(skeleton, patterns), patterns, None
    lora = lora_config(
        model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout, model_args.lora_target_modules
    )
    return skeleton, adapter_subset(with_adapters(skeleton, lora)), patterns, lora


def prepare_data(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments) -> tuple[Any, Any, Any]:
    """Return the tokenizer with its chat template, training and held-out rows; set in `args` which tokens are learned.

    Raises:
        UsageError: for an invalid tokenizer, invalid data or flags for them; before anything is tokenized.
    """
    check_data_flags(data_args, args)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code)
    data = load_data(
        data_args.dataset_name,
        data_args.dataset_train_split,
        weights=data_args.dataset_weights,
        streaming=data_args.dataset_streaming,
        config=data_args.dataset_config,
        eval_name=data_args.eval_dataset_name,
        eval_split=data_args.dataset_test_split,
        val_set_size=data_args.val_set_size,
        text_column=args.dataset_text_field,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    say(data.notes, args)
    if isinstance(data.train, Dataset) and len(data.train) > 20_000:
        datasets.enable_progress_bars()  # tokenizing takes long enough to want them
    if data.held_out is None and (args.eval_strategy != "no" or args.eval_on_start):
        flag = "eval_on_start=True" if args.eval_on_start else f"eval_strategy={args.eval_strategy.value!r}"
        raise UsageError(f"{flag} needs --eval_dataset_name or --val_set_size.")

    if data.form in (MESSAGES, TURNS) or args.chat_template_path is not None:
        eos_token = set_chat_template(tokenizer, args.chat_template_path)
        args.chat_template_path = None  # it has been applied
        if args.eos_token is None and eos_token != tokenizer.eos_token:
            args.eos_token = eos_token
    if args.assistant_only_loss is None:
        args.assistant_only_loss = data.form == MESSAGES
    if args.assistant_only_loss and data.form in (MESSAGES, TURNS):
        check_marked(tokenizer)
    check_losses(data.form, args)
    return tokenizer, data.train, data.held_out


def prepare_trainer(
    model: Any, tokenizer: Any, args: FinetuneArguments, train_dataset: Any, eval_dataset: Any
) -> TOSFTTrainer:
    """Return the trainer; creating it tokenizes the data.

    Raises:
        UsageError: for settings and data that TRL and Hugging Face reject; for a model in which packed examples would
            see each other.
    """
    try:
        trainer = TOSFTTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
        if trainer.padding_free and args.process_index == 0 and not is_deepspeed_zero3_enabled():  # weights are sharded
            with trainer.compute_loss_context_manager():
                check_packing(trainer.model, trainer.data_collator)
    except TemplateError as error:
        raise UsageError(f"the chat template: {error}") from error
    except RuntimeError as error:
        if "to be installed" in str(error):  # what reports to it
            raise UsageError(f"report_to={args.report_to}: {error}") from error
        if "assistant_only_loss" not in str(error):
            raise
        raise UsageError(
            "assistant_only_loss: a conversation has no assistant's turn, so that nothing of it would be learned. Take "
            "it out of the data, or learn every turn with --assistant_only_loss false."
        ) from error
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    return trainer


def prepare_preview(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments) -> TOSFTTrainer:
    """Return a run's trainer for a look at its data, with a tiny model in place of the base.

    Raises:
        UsageError: as `prepare_data` and `prepare_trainer`.
    """
    base, revision, trust = model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code
    settle_length(without_weights(base, revision, model_args.attn_implementation, trust), args)
    tokenizer, *rows = prepare_data(model_args, data_args, args)
    args.push_to_hub = False  # the Trainer would create the repository
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    stand_in = LlamaForCausalLM(config)
    return prepare_trainer(stand_in, tokenizer, args, *rows)


def data_report(trainer: TOSFTTrainer) -> Group:
    """Return a table of the data and of how much is learned, and a sentence on packing and on each likely problem."""
    args: Any = trainer.args
    tokenizer: Any = trainer.processing_class
    keeps = "end" if args.truncation_mode == "keep_end" else "start"
    if args.packing and args.packing_strategy != "bfd":
        keeps = "all"
    names = {"train": "training", "eval": "held-out"}
    parts = {names[key]: statistics(rows, tokenizer, args.max_length, keeps) for key, rows in trainer.uncut.items()}
    said = [
        Text(note, "yellow") for name, part in parts.items() for note in notes(name, part, tokenizer, args.max_length)
    ]
    packs, training = trainer.train_dataset, parts["training"]
    if not isinstance(packs, Dataset):
        said.append(Text(f"The training data are a stream, of which the first {training.rows:,} rows are counted."))
    elif args.packing:
        full = training.tokens / (len(packs) * args.max_length)
        said.append(
            Text(
                f"The {training.rows:,} training rows are packed into {len(packs):,} of {args.max_length:,} tokens, "
                f"{full:.0%} full."
            )
        )
    return Group(table(parts), *said, "")


def say(sentences: list[str], args: FinetuneArguments) -> None:
    """Print what a user should know before the run, on process 0."""
    console = Console(quiet=not args.should_log)
    for sentence in sentences:
        console.print(Text(sentence, style="yellow"))
