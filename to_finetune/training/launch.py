"""Starting a run's processes, by accelerate or torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from to_finetune.errors import UsageError, at_least_one
from to_finetune.signals import on_stop


def command_for(
    flags: Sequence[str], processes: int | None, config: str | None, gpus: int, shards: bool = False
) -> list[str]:
    """Return the command that starts a run.

    Args:
        flags: of finetune.py.
        processes: None for one per GPU, or one on the CPU.
        config: a configuration file of accelerate's, or None.
        gpus: the number of GPUs to use; 0 for the CPU.
        shards: whether the flags ask for DeepSpeed or FSDP, which need a launcher for one process too.

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
    if shards or (count > 1 and not gpus):  # accelerate would silently start one
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
