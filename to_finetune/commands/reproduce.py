"""`to-finetune reproduce`: the paper's experiments, tables and figures."""

from __future__ import annotations

import argparse

from to_finetune.paper import targets
from to_finetune.signals import sigterm_interrupts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run experiments of the paper and draw its tables and figures. What is finished is kept."
    parser.epilog = "\n".join(f"  {name:12} {about}" for name, about in targets.ABOUT.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="what to reproduce, of those listed below")
    parser.add_argument("--data_dir", help="a folder with upstream's files; without it the sets are downloaded")
    parser.add_argument("--output_dir", default="runs/paper", help="where results, tables and figures go (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute's trial of the command on stand-in data")
    parser.add_argument("--device", default="cpu", help="where the members of a case are trained (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from to_finetune.paper.reproduce import reproduce

    with sigterm_interrupts():  # else a process that trains the Llama would be left running
        return reproduce(
            arguments.targets, arguments.data_dir, arguments.output_dir, quick=arguments.quick, device=arguments.device
        )
