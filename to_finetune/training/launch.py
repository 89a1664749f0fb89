"""A run's processes and how they share the weights: starting them, and checking that they are what was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import yaml
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from to_finetune.errors import UsageError, at_least_one
from to_finetune.signals import on_stop


def command_for(flags: Sequence[str], processes: int | None, config: str | None, gpus: int) -> list[str]:
    """Return the command that starts a run.

    Args:
        flags: of finetune.py.
        processes: None for one per GPU, or one on the CPU.
        config: a configuration file of accelerate's, or None.
        gpus: the number of GPUs to use; 0 for the CPU.

    Raises:
        UsageError: for an invalid number of processes, and a file that is not a configuration of accelerate's.
    """
    run = ["-m", "to_finetune.finetune", *flags]
    machines = 1 if config is None else _machines(config)
    at_least_one(num_processes=processes)
    if config is not None and not gpus:
        raise UsageError(f"--accelerate_config {config} spreads a run over GPUs, and this one is on the CPU.")
    if gpus and processes and processes > gpus and machines == 1:
        raise UsageError(f"--num_processes {processes} is not valid: at most {gpus}, one for each GPU.")
    count = processes or gpus or 1
    if config is not None:
        how_many = [] if machines > 1 and processes is None else ["--num_processes", str(count)]
        return ["accelerate", "launch", "--config_file", config, *how_many, *run]
    if count > 1 and not gpus:  # accelerate would silently start one
        return ["torchrun", "--standalone", "--nproc_per_node", str(count), *run]
    if count > 1:
        plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # else it warns
        return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(count), *plain, *run]
    if gpus > 1:  # else Hugging Face would drive all of them from one process
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return ["env", f"CUDA_VISIBLE_DEVICES={first}", sys.executable, *run]
    return [sys.executable, *run]


def launch(command: list[str]) -> int:
    """Run a command of `command_for` and return the run's exit code; a single-process run replaces this process.

    Signals are passed on to the run's processes, which then save a checkpoint, and not to their launcher, which would
    kill them after half a minute.
    """
    if command[0] == "accelerate":
        return _launched(partial(launch_command, launch_command_parser().parse_args(command[2:])))
    if command[0] == "torchrun":
        return _launched(partial(torchrun, command[1:]))
    return os.execvp(command[0], command)


def _launched(launcher: Callable[[], Any]) -> int:
    def pass_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    try:
        # Limit torchrun's own handlers to these signals: the others are handled here.
        with on_stop(pass_on), patch_environment(PET_SIGNALS_TO_HANDLE="SIGHUP,SIGQUIT"):
            launcher()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _machines(config: str) -> int:
    """Return the number of machines in a configuration file of accelerate's.

    Raises:
        UsageError: for a file that cannot be read.
    """
    if not Path(config).is_file():
        raise UsageError(f"--accelerate_config {config}: no such file.")
    try:
        return load_config_from_file(config).num_machines
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        reason = shorten(str(error), 200)
        raise UsageError(f"--accelerate_config {config} is no configuration of accelerate's: {reason}") from None


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
