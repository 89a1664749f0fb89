"""How a run's processes share the weights: checks that a run gets the layout that was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from to_finetune.errors import UsageError


def check_processes(running: int) -> None:
    """Raise if `accelerate launch` was asked for more processes than are running.

    On the CPU, ``accelerate launch --cpu --num_processes 2`` silently starts one process.

    Raises:
        UsageError: with the command that starts them.
    """
    command: list[str] = []
    with suppress(psutil.Error):  # another user's process may not be readable
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    asked = processes_asked_for(command)
    if asked is not None and asked > running:
        raise UsageError(
            f"accelerate launch was asked for {asked} processes, but {running} runs: on the CPU it starts only one. "
            f"Use: torchrun --nproc_per_node {asked} finetune.py ..."
        )


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether Hugging Face's flag or accelerate's configuration asks for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_layout(args: TrainingArguments, state: Any, is_sharded: bool, optimizer: Any) -> None:
    """Raise if a run would not get the sharding or optimizer asked for, or uses FSDP's first version.

    Args:
        args: of the run.
        state: accelerate's state.
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
    if is_sharded and args.optim == OptimizerNames.ADAFACTOR:
        raise UsageError("adafactor factors whole matrices, which FSDP and DeepSpeed cut: use DDP, or another optim.")
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError("FSDP's first version is not supported: set fsdp_version: 2 in accelerate's fsdp_config.")


def check_clipping(engine: Any, args: TrainingArguments) -> None:
    """Raise unless DeepSpeed clips to `max_grad_norm`: without an entry in its JSON, it clips to norm 1.

    Raises:
        UsageError: with the entry to set in the JSON.
    """
    if engine.gradient_clipping() != (args.max_grad_norm or 0.0):
        raise UsageError(
            f"DeepSpeed clips gradients to norm {engine.gradient_clipping()}, and max_grad_norm is "
            f'{args.max_grad_norm}: set "gradient_clipping": "auto" in its JSON.'
        )


def processes_asked_for(command: Sequence[str]) -> int | None:
    """Return the number of processes that an ``accelerate launch`` command or its configuration file asks for."""
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
