"""Planning the memory of a run from its flags."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from copy import copy
from textwrap import shorten
from typing import Any

from to_finetune.errors import UsageError
from to_finetune.model.load import without_weights
from to_finetune.planning import (
    LAYOUTS,
    CannotSay,
    Choice,
    Lora,
    Plan,
    Settings,
    Workload,
    load_blueprint,
    plan,
)
from to_finetune.training.arguments import ArgumentsElsewhere, FinetuneArguments, ModelArguments
from to_finetune.training.flags import check_base
from to_finetune.training.layout import asks_for_fsdp
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import settle_length
from to_finetune.training.sft import TOSFTTrainer

# Flags that change the memory of a step in ways that a dry run does not know.
UNKNOWN = ("torch_compile", "use_liger_kernel", "activation_offloading", "label_smoothing_factor")


def parse_for_plan(argv: Sequence[str], other_flags: Collection[str] = ()) -> tuple[ModelArguments, FinetuneArguments]:
    """Parse the flags of a run that may be elsewhere: the data need not be named, and no GPU is queried.

    Raises:
        UsageError: as `parse_arguments` and `check_base`, and for a layout given by --deepspeed or --fsdp.
    """
    model_args, _, args = parse_arguments(["--dataset_name", "any", *argv], ArgumentsElsewhere, other_flags)
    check_base(model_args, args)
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name):
            raise UsageError(f"{name} is planned as a layout: use --layout, one of {', '.join(LAYOUTS)}.")
    return model_args, args


def settings_of(
    model_args: ModelArguments,
    args: FinetuneArguments,
    layout: str = "ddp",
    processes: int = 1,
    rows: int | None = None,
) -> Settings:
    """Return the settings that a run is planned from.

    Args:
        layout: one of `LAYOUTS`.
        processes: over all machines.
        rows: of the training data; None if unknown, when epochs do not determine the number of steps.

    Raises:
        UsageError: for a model or a subset that does not exist.
        CannotSay: for flags whose memory is not known.
    """
    for flag in UNKNOWN:
        if value := getattr(args, flag, None):
            raise CannotSay(f"{flag}={value} changes what a step holds; what it is then is not known.")
    if args.max_length is None:
        raise CannotSay("max_length is not set, so that rows can have any length.")
    name, revision, trust = model_args.model_name_or_path, model_args.model_revision, args.trust_remote_code
    optimizer, options = _optimizer(args)
    skeleton = without_weights(name, revision, trust_remote_code=trust)
    settle_length(skeleton, args)
    patterns = None if model_args.use_peft else model_args.patterns(skeleton)
    return Settings(
        Workload(
            load_blueprint(name, revision, trust),
            None if patterns is None else tuple(patterns),
            rows=args.per_device_train_batch_size,
            length=args.max_length,
            joined=args.padding_free or (args.packing and args.packing_strategy.startswith("bfd")),
            mixed_precision=args.autocast_dtype,
            dtype=model_args.dtype,  # type: ignore[arg-type]
            checkpointing=bool(args.gradient_checkpointing),
            attention=model_args.attn_implementation,
            quantization=model_args.quantization,
            lora=_lora(model_args) if model_args.use_peft else None,
            device="cpu" if args.use_cpu else "cuda",
        ),
        accumulation=args.gradient_accumulation_steps,
        optimizer=optimizer,
        optimizer_options=options,
        layout=layout,
        processes=processes,
        max_steps=steps(args, processes, rows),
    )


def steps(args: FinetuneArguments, processes: int, rows: int | None) -> int | None:
    """Return the number of optimizer steps as Hugging Face counts them; None if it depends on unknown `rows`."""
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        return None
    batches = rows / (args.per_device_train_batch_size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def choice_of(model_args: ModelArguments) -> Choice:
    """Return how to express another number of last layers in place of these flags."""
    modules = model_args.unfrozen_modules
    return Choice(None if modules is None else tuple(modules), as_patterns=model_args.unfrozen_parameters is not None)


def plan_live(model_args: ModelArguments, args: FinetuneArguments) -> Plan | str:
    """Return the plan of the run that this process is part of, or why there is none: planning must not stop a run."""
    try:
        return plan(settings_of(model_args, args, _live_layout(args), args.world_size))
    except Exception as error:  # whatever it is, the run's own checks decide
        return shorten(str(error) or type(error).__name__, 300)


def _live_layout(args: FinetuneArguments) -> str:
    """Return the layout in which accelerate has set this process up.

    Raises:
        CannotSay: for a layout that is not in `LAYOUTS`.
    """
    if args.n_gpu > 1:
        raise CannotSay(f"One process drives {args.n_gpu} GPUs: start one for each, as `to-finetune train` does.")
    if args.device.type not in ("cpu", "cuda"):
        raise CannotSay(f"What a step needs on {args.device.type} is not known.")
    layout = "ddp"
    if args.deepspeed_plugin is not None:
        offload = "_offload" if args.deepspeed_plugin.hf_ds_config.is_offload() else ""
        layout = f"zero{args.deepspeed_plugin.zero_stage}{offload}"
    elif asks_for_fsdp(args):
        layout = "fsdp2"
        for variable, planned in (("FSDP_OFFLOAD_PARAMS", "false"), ("FSDP_RESHARD_AFTER_FORWARD", "true")):
            if os.environ.get(variable, planned).lower() != planned:
                raise CannotSay(f"FSDP2 is planned with {variable}={planned} alone.")
    if layout not in LAYOUTS:
        raise CannotSay(f"The layout {layout} is not planned.")
    return layout


def _lora(model_args: ModelArguments) -> Lora:
    targets = model_args.lora_target_modules
    return Lora(model_args.lora_r, None if targets is None else tuple(targets), model_args.lora_dropout)


def _optimizer(args: FinetuneArguments) -> tuple[Any, dict[str, Any]]:
    args = copy(args)
    args.learning_rate = args.learning_rate or 0.0  # its value takes no memory
    try:
        return TOSFTTrainer.get_optimizer_cls_and_kwargs(args)
    except Exception as error:  # an optimizer that is not installed, or that needs the model
        raise CannotSay(f"optim={args.optim}: its state is not known ({shorten(str(error), 200)}).") from error
