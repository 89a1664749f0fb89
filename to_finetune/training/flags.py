"""Flags that exclude each other, that a run could not obey, or that it would fail over after it has begun."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_liger_kernel_available

from to_finetune.data.formats import MESSAGES, TEXT
from to_finetune.errors import UsageError, at_least_one
from to_finetune.training.arguments import DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.layout import asks_for_fsdp
from to_finetune.training.optimizers import OPTIMIZERS, parse_optim_args

PLAIN = ("adamw", "ademamix", "adagrad", "lion", "rmsprop", "sgd")  # optimizers that need no model to be made


def check_base(model_args: ModelArguments, args: FinetuneArguments) -> None:
    """Raise if flags of the base and of adapters exclude each other, or would do nothing."""
    flags = [f.name for f in fields(model_args) if f.name.startswith("unfrozen_")]
    unfrozen = [flag for flag in flags if getattr(model_args, flag) is not None]
    if model_args.use_peft and unfrozen:
        raise UsageError(f"use_peft trains adapters and freezes all weights, so leave {unfrozen[0]} out.")
    if not model_args.use_peft:
        for f in fields(model_args):
            if f.name.startswith("lora_") and getattr(model_args, f.name) != f.default:
                raise UsageError(f"{f.name}={getattr(model_args, f.name)} needs --use_peft true.")
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(model_args, name)]
    if not bits:
        return
    if len(bits) == 2:
        raise UsageError("load_in_8bit and load_in_4bit exclude each other: choose one.")
    if not model_args.use_peft and not unfrozen:
        raise UsageError(
            f"{bits[0]} holds what is frozen, and everything would train: say what trains with --unfrozen_last_layers, "
            "--unfrozen_modules or --unfrozen_parameters, or train adapters with --use_peft true."
        )
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if zero3 or asks_for_fsdp(args):
        raise UsageError(
            f"{bits[0]} under {'ZeRO-3' if zero3 else 'FSDP'}: quantised weights cannot be shared out; use ddp.yaml or "
            "zero2.yaml of configs/accelerate."
        )


def check_flags(args: FinetuneArguments) -> None:
    """Raise for the first flag that would be ignored, do harm, or fail late; the learning rate must be known.

    Raises:
        UsageError: with what to do instead.
    """
    at_least_one(eval_accumulation_steps=args.eval_accumulation_steps, pad_to_multiple_of=args.pad_to_multiple_of)
    by_steps = args.save_strategy == args.eval_strategy == IntervalStrategy.STEPS
    batches = args.accelerator_config
    needs_workers = args.dataloader_persistent_workers or getattr(args, "dataloader_multiprocessing_context", None)
    steps = {name: getattr(args, name) for name in ("save_steps", "eval_steps", "logging_steps")}
    negative = [f"{name}={number:g}" for name, number in steps.items() if (number or 0) < 0]
    recomputes = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    unknown = sorted(set(recomputes) - {*inspect.signature(checkpoint).parameters, "preserve_rng_state"})
    adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
    given = [name for name in adam if getattr(args, name) != getattr(FinetuneArguments, name)]
    for is_wrong, sentence in (
        (
            args.bf16_full_eval or args.fp16_full_eval,
            "bf16_full_eval and fp16_full_eval would round the trained weights themselves before they are saved. An "
            "evaluation takes the precision of the training: --bf16 true.",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True would begin again on weights that have moved. `to-finetune plan --memory SIZE` "
            "finds the batch size before the run.",
        ),
        (
            args.load_best_model_at_end and by_steps and args.save_steps != args.eval_steps,
            f"load_best_model_at_end=True needs a checkpoint of each evaluation: save_steps={args.save_steps:g} is not "
            f"eval_steps={args.eval_steps or args.logging_steps:g}.",
        ),
        (
            args.enable_jit_checkpoint,
            "enable_jit_checkpoint=True is not taken: every run saves a checkpoint on SIGTERM and SIGINT by itself.",
        ),
        (negative, f"{', '.join(negative)}: not valid, at least 0."),
        (
            args.activation_offloading and args.device.type == "cpu",
            "activation_offloading=True needs a GPU, from which to offload.",
        ),
        (
            args.model_init_kwargs,
            f"model_init_kwargs={args.model_init_kwargs!r} is not taken: --dtype, --attn_implementation and "
            "--model_revision say how the model is loaded.",
        ),
        (
            args.fp16 and args.device.type == "cpu",
            "fp16=True does nothing on a CPU; --bf16 true and float32 work there.",
        ),
        (
            batches.split_batches or "num_steps" in (batches.gradient_accumulation_kwargs or {}),
            "accelerator_config: split_batches and gradient_accumulation_kwargs would change the rows of a step. Use "
            "--per_device_train_batch_size and --gradient_accumulation_steps.",
        ),
        (
            args.hub_revision is not None or args.hub_strategy != "every_save" or args.hub_always_push,
            "hub_revision, hub_strategy and hub_always_push are not taken: a run is pushed once, at its end, to main.",
        ),
        (
            args.dataloader_num_workers < (1 if needs_workers else 0),
            f"dataloader_num_workers={args.dataloader_num_workers} is not valid: at least 0, and at least 1 with "
            "dataloader_persistent_workers or dataloader_multiprocessing_context.",
        ),
        (
            not 0 <= args.label_smoothing_factor <= 1,
            f"label_smoothing_factor={args.label_smoothing_factor:g} is not valid: between 0 and 1.",
        ),
        (
            (args.neftune_noise_alpha or 0) < 0,
            f"neftune_noise_alpha={args.neftune_noise_alpha} is not valid: at least 0.",
        ),
        (unknown, f"gradient_checkpointing_kwargs: torch.utils.checkpoint takes no {', '.join(unknown)}."),
        (
            args.deepspeed and "RANK" not in os.environ and not find_spec("mpi4py"),
            f"deepspeed={args.deepspeed} needs a launcher, for one process too: torchrun --nproc_per_node 1 ...",
        ),
        (
            args.use_liger_kernel and not is_liger_kernel_available(),
            "use_liger_kernel=True needs the library: pip install liger-kernel.",
        ),
        (
            given and args.optim in OPTIMIZERS,
            f"{', '.join(given)}: {args.optim} has none; its options are --optim_args.",
        ),
    ):
        if is_wrong:
            raise UsageError(sentence)
    _check_optimizer_and_scheduler(args)


def without_effect(args: FinetuneArguments) -> list[str]:
    """Return a sentence for each flag that was given but does nothing beside the others, as in an overridden recipe."""
    saves, evaluates = args.save_strategy != SaveStrategy.NO, args.eval_strategy != IntervalStrategy.NO
    follows_loss = args.lr_scheduler_type.value in ("reduce_lr_on_plateau", "greedy")
    warms_up = args.lr_scheduler_type.value != "constant" and not follows_loss
    compares = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST or follows_loss
    by_length = args.train_sampling_strategy == "group_by_length"
    rules = (
        (args.eval_strategy == IntervalStrategy.STEPS, "--eval_strategy steps", ("eval_steps",)),
        (evaluates, "--eval_strategy steps or epoch", ("eval_delay",)),
        (args.save_strategy == SaveStrategy.STEPS, "--save_strategy steps", ("save_steps",)),
        (saves, "a --save_strategy", ("save_total_limit", "save_only_model")),
        (args.logging_strategy == IntervalStrategy.STEPS, "--logging_strategy steps", ("logging_steps",)),
        (warms_up, "an --lr_scheduler_type that warms up, such as constant_with_warmup", ("warmup_steps",)),
        (compares, "--load_best_model_at_end true or --save_strategy best", ("metric_for_best_model",)),
        (args.push_to_hub, "--push_to_hub true", ("hub_model_id", "hub_private_repo")),
        (args.packing, "--packing true", ("packing_strategy",)),
        (by_length, "--train_sampling_strategy group_by_length", ("length_column_name",)),
        (args.loss_type != "dft", "another --loss_type than dft", ("label_smoothing_factor",)),
    )
    sentences = []
    for is_met, needed, names in rules:
        for name in names:
            value = getattr(args, name)
            if not is_met and value not in (getattr(FinetuneArguments, name), None):
                shown = f"{value:g}" if isinstance(value, float) else value
                sentences.append(f"{name}={shown} does nothing: it needs {needed}.")
    return sentences


def check_data_flags(data_args: DataArguments, args: FinetuneArguments) -> None:
    """Raise if flags of the data exclude each other, or would do nothing, or harm."""
    if data_args.dataset_streaming and args.max_steps <= 0:
        raise UsageError("dataset_streaming=True needs --max_steps: how long a stream is, is not known.")
    if args.dataset_kwargs:
        raise UsageError(f"dataset_kwargs={args.dataset_kwargs!r}: the rows are texts, which have to be prepared.")
    if args.packing and args.truncation_mode == "keep_end":
        raise UsageError("truncation_mode='keep_end' does nothing with --packing true, which keeps the start.")
    if args.eval_packing and not (args.packing or args.padding_free):
        raise UsageError("eval_packing=True needs --packing true: else packed held-out rows would see each other.")


def check_losses(form: str, args: FinetuneArguments) -> None:
    """Raise if a flag would make the run learn other tokens than it says."""
    if args.completion_only_loss and form in (MESSAGES, TEXT):
        instead = "--assistant_only_loss" if form == MESSAGES else "nothing of the kind"
        raise UsageError(f"completion_only_loss=True needs prompts and completions; for {form} there is {instead}.")
    if args.packing and args.packing_strategy == "wrapped" and form != TEXT:
        raise UsageError(
            f"packing_strategy='wrapped' cuts {form} anywhere and lets them see each other: use bfd, or bfd_split."
        )


def check_rows(rows: Any, args: FinetuneArguments) -> None:
    """Raise if `dataloader_drop_last` drops all of the prepared training rows.

    Raises:
        UsageError: with their number.
    """
    a_batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(rows, Dataset) and len(rows) < a_batch:
        raise UsageError(f"dataloader_drop_last=True leaves none: a batch takes {a_batch} rows, there are {len(rows)}.")


def _check_optimizer_and_scheduler(args: FinetuneArguments) -> None:
    """Build both once for a dummy weight, as the Trainer will for the model's."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=args.learning_rate or 0.0)
    if args.optim.startswith(PLAIN):
        try:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = cls([weight], **options)
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(f"optim={args.optim}: {error}") from error
        taken = (*options, "beta1", "beta2", "beta3")  # ademamix's become one argument
        if dropped := [key for key in parse_optim_args(args.optim_args) if key not in taken]:
            raise UsageError(f"optim_args: Hugging Face gives {args.optim} no {dropped[0]!r}.")
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        kind = f"lr_scheduler_type={args.lr_scheduler_type.value}, lr_scheduler_kwargs={args.lr_scheduler_kwargs}"
        raise UsageError(f"{kind}: {error}") from error
