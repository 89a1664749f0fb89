"""`to-finetune report`: the page of a run, or of several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from to_finetune.runs import REPORT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write the page of a run again, or one that compares several; the first is the baseline."
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that finetune.py has written")
    parser.add_argument(
        "--output_file",
        type=Path,
        metavar="PAGE",
        help="the HTML file; default: report.html in the run's folder, or comparison.html beside the first one's",
    )


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from to_finetune.report.page import write_report

    first = arguments.runs[0]
    default = first / REPORT if len(arguments.runs) == 1 else first.resolve().parent / "comparison.html"
    page = arguments.output_file or default
    write_report(arguments.runs, page)
    Console(soft_wrap=True).print(f"{page} is the page.", markup=False, highlight=False)
    return 0
