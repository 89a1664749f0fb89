"""`to-finetune merge`: a run's trained part and its base as an ordinary model."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a run's trained part and its base as one ordinary model, and read it again to be sure."
    parser.add_argument("folder", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a new folder for the model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the base's own)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the base brings along")


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers.utils import logging

    from to_finetune.model.merge import TOKENS, merge
    from to_finetune.units import format_size

    logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    merged = merge(arguments.folder, arguments.output_dir, dtype, arguments.trust_remote_code)

    base, name = merged.base, str(merged.dtype).removeprefix("torch.")
    rounded = f", rounded to {name}" if merged.trained_dtype.itemsize > merged.dtype.itemsize else ""
    rows = {
        "base": base.model_name_or_path + (f" at {base.revision}" if base.revision else ""),
        "trained": f"{merged.trained} tensors of {arguments.folder}{rounded}",
        "written": f"{merged.folder}, {name}, {format_size(merged.bytes)}",
        "checked": f"read again, its {merged.logits:,} logits of {TOKENS} tokens are bit for bit those of the base "
        "with the trained part in memory",
    }
    if merged.adapter_difference is not None:
        rows["adapters"] = f"merging them moved these logits by at most {merged.adapter_difference:.1e} of the largest"
    if merged.quantized:
        rows["note"] = f"trained on the base in {merged.quantized[0]} bits, merged with it in full precision"
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, Text(value))
    Console().print(table)
    return 0
