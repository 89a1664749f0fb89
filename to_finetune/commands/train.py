"""`to-finetune train`: a run, started with the right number of processes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

TAKES_FLAGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "to-finetune train [--num_processes N] [--accelerate_config FILE] FLAGS_OF_A_RUN"
    parser.description = (
        "Fine-tune: checks the flags, and starts the run through accelerate, one process on each visible GPU. Takes "
        "all flags of a run, --config among them (`python -m to_finetune.finetune --help` lists them). Ctrl-C saves a "
        "checkpoint. Exit code: the run's."
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="default: one for each visible GPU, one without any"
    )
    parser.add_argument("--accelerate_config", metavar="FILE", help="how they share the weights: configs/accelerate")


def run(arguments: argparse.Namespace) -> int:
    environment = dict(os.environ)
    import torch
    from rich.console import Console
    from rich.text import Text

    from to_finetune import finetune
    from to_finetune.training.arguments import ArgumentsElsewhere
    from to_finetune.training.flags import check_base
    from to_finetune.training.launch import command_for, launch
    from to_finetune.training.parser import parse_arguments
    from to_finetune.training.recipe import without_secrets

    # Checked here, and not in each process: one error, and no GPU is touched.
    model_args, _, args = parse_arguments(arguments.flags, ArgumentsElsewhere, vars(arguments))
    check_base(model_args, args)
    gpus = 0 if args.use_cpu else torch.accelerator.device_count()
    shards = bool(args.deepspeed or args.fsdp)
    command = command_for(arguments.flags, arguments.num_processes, arguments.accelerate_config, gpus, shards)
    Console(soft_wrap=True).print(Text(f"$ {shlex.join(without_secrets(command))}", "dim"))
    os.environ.clear()
    os.environ.update(environment)  # Hugging Face sets variables for some flags
    if command[0] == sys.executable:  # this process will do, which has imported all that the run needs
        sys.argv = [finetune.__file__, *arguments.flags]  # for the record
        return finetune.main()
    return launch(command)
