"""How many processes run, and whether the launcher was asked for more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from to_finetune.errors import UsageError


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
