"""`to-finetune push`: a run's trained part and its model card to the hub."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Upload a run to the hub: the trained part, the tokenizer, the recipe, the record without local paths, and a "
        "model card. The token is HF_TOKEN's or that of `hf auth login`."
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--repo_id", required=True, help="where to: me/name")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--merged", action="store_true", help="upload the whole model, its base included")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing; leave what would go in RUN/hub")


def run(arguments: argparse.Namespace) -> int:
    import transformers
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from to_finetune.report.push import push
    from to_finetune.units import format_size

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    pushed = push(arguments.run_folder, arguments.repo_id, arguments.private, arguments.merged, arguments.dry_run)
    verb = "Would go" if arguments.dry_run else "Went"
    table = Table(title=f"{verb} to {arguments.repo_id}", title_justify="left", show_header=False)
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in pushed.sizes.items():
        table.add_row(Text(name), format_size(size))
    table.add_section()
    table.add_row("all", format_size(sum(pushed.sizes.values())), style="bold")
    console = Console()
    console.print(table)
    console.print(f"Look at it in {pushed.where}" if arguments.dry_run else pushed.where, soft_wrap=True, markup=False)
    return 0
