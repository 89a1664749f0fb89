"""`to-finetune preview`: what a run would see and learn, token by token."""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory
from typing import Any

TAKES_FLAGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prepare the data exactly as a run with the same flags does, and show what it would see and learn. Of the "
        "model only the tokenizer is loaded."
    )
    parser.usage = "to-finetune preview [--rows ROWS] FLAGS_OF_A_RUN"
    parser.add_argument("--rows", type=int, default=3, help="examples to show, spread over the data (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    import datasets
    from rich.console import Console

    from to_finetune.data import check_labels, preview
    from to_finetune.errors import UsageError
    from to_finetune.training.parser import parse_arguments
    from to_finetune.training.prepare import data_report, prepare_preview

    if arguments.rows < 0:
        raise UsageError(f"rows={arguments.rows} is not valid: at least 0.")
    datasets.disable_progress_bars()
    with TemporaryDirectory(prefix="to-finetune-preview-") as folder:
        # Nothing is trained, so nothing may be written where a run would be.
        flags = [*arguments.flags, "--output_dir", folder, "--report_to", "none"]
        model_args, data_args, args = parse_arguments(flags, other_flags=vars(arguments))
        trainer = prepare_preview(model_args, data_args, args)
        check_labels(trainer.train_dataset, args.max_length)
        tokenizer: Any = trainer.processing_class
        Console().print(data_report(trainer), preview(trainer.train_dataset, tokenizer, arguments.rows))
    return 0
