"""How many processes run and how they share the weights, and whether that is what was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from transformers import TrainingArguments

from to_finetune.errors import UsageError
from to_finetune.training.optimizers import OPTIMIZERS


def check_processes(running: int) -> None:
    """Refuse a launch that asked `accelerate launch` for more processes than run.

    On the CPU, ``accelerate launch --cpu --num_processes 2`` starts one process and says nothing.

    Raises:
        UsageError: with the command that starts them.
    """
    parent = psutil.Process().parent()
    asked = processes_asked_for(parent.cmdline() if parent else [])
    if asked is not None and asked > running:
        raise UsageError(
            f"accelerate launch was asked for {asked} processes, but {running} runs: on the CPU it starts only one. "
            f"Use: torchrun --nproc_per_node {asked} finetune.py ..."
        )


def check_layout(args: TrainingArguments, state: Any, is_sharded: bool, optimizer: Any) -> None:
    """Refuse a run that would not be sharded, or not stepped, as it was asked for, or that a TO cannot step.

    Args:
        args: of the run.
        state: accelerate's.
        is_sharded: whether FSDP or DeepSpeed is at work.
        optimizer: the one that the Trainer was given, if any.

    Raises:
        UsageError: with what to change.
    """
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() == "true" and not is_sharded:
            raise UsageError(
                f"{name} was asked for, and accelerate does without it on {args.device.type}: every process would hold "
                "all of the model. Use configs/accelerate/ddp.yaml there, or torchrun without a configuration."
            )
    if optimizer is not None and getattr(state, "deepspeed_plugin", None) is not None:
        raise UsageError(
            "Under DeepSpeed Hugging Face drops the optimizer of optimizers=(...) and makes another; name it with "
            "optim= and optim_args=, or give optimizer_cls_and_kwargs=."
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if args.optim in OPTIMIZERS and plugin is not None and plugin.fsdp_version != 2:
        raise UsageError("The Trainable Optimizers need FSDP2: set fsdp_version: 2 in accelerate's fsdp_config.")


def check_clipping(engine: Any, args: TrainingArguments) -> None:
    """Refuse DeepSpeed's own clipping, which is to norm 1 where its JSON says nothing.

    Raises:
        UsageError: where it is not max_grad_norm.
    """
    if engine.gradient_clipping() != (args.max_grad_norm or 0.0):
        raise UsageError(
            f"DeepSpeed clips gradients to norm {engine.gradient_clipping()}, and max_grad_norm is "
            f'{args.max_grad_norm}: set "gradient_clipping": "auto" in its JSON.'
        )


def processes_asked_for(command: Sequence[str]) -> int | None:
    """The number of processes that an ``accelerate launch`` command line, or its configuration file, asks for."""
    names = [Path(item).name for item in command]
    launchers = {"accelerate-launch", "accelerate.commands.launch"}
    if not (launchers & set(names) or {"accelerate", "launch"} <= set(names)):
        return None
    options: dict[str, str] = {}
    for item, following in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = item.partition("=")
        options.setdefault(flag.replace("_", "-"), value if equals else following)
    if "--num-processes" in options:
        return int(options["--num-processes"])
    config_file = options.get("--config-file", default_config_file)
    if not Path(config_file).is_file():
        return None
    return load_config_from_file(config_file).num_processes
