"""Measure on CPU processes how far every layout ends from a single process: the README's table.

    python scripts/benchmarks/layouts.py

Takes two minutes on two cores, and writes layouts.json beside this file. The runs are those of
tests/layouts/test_trajectory.py, which asserts what is measured here. `--table` prints the table again. `--scale`
computes what RankOne's sums add to the messages of a step in runs too large to measure here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.layouts.training import LAYOUTS, OPTIMIZERS, STATES, launch
from to_finetune.files import write_json
from to_finetune.machine import machine
from to_finetune.optim.blocks import SUMS

FILE = Path(__file__).with_suffix(".json")
WORLDS = (2, 4)
MODELS = (("Llama-7B", 6_738_415_616, 291), ("Llama-70B", 68_976_648_192, 723))  # weights and tensors, all trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    parser.add_argument("--scale", action="store_true", help="print the arithmetic of large runs")
    options = parser.parse_args()
    if options.scale:
        print(scale())
        return
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            found = [launch(["trajectories"], world, Path(folder) / str(world)) for world in WORLDS]
        results = {key: value for part in found for key, value in part["trajectories"].items()}
        write_json(FILE, {"machine": machine(), "results": results}, indent=1)
    print(table(json.loads(FILE.read_text())["results"]))


def table(results: dict[str, Any]) -> str:
    """Tabulate the largest deviation in each cell: layouts as rows, optimizers and state formats as columns."""
    largest: dict[tuple[str, str, str], float] = defaultdict(float)
    for key, values in results.items():
        _, layout, optimizer, state = key.split()
        cell = layout, optimizer.split("-")[0], state
        largest[cell] = max(largest[cell], values.get("deviation", 0.0))
    columns = [(variant, state) for variant in dict.fromkeys(x.split("-")[0] for x in OPTIMIZERS) for state in STATES]
    lines = [
        "| layout | " + " | ".join(f"{variant}, {state}" for variant, state in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for layout in LAYOUTS:
        cells = (largest[layout, variant, state] for variant, state in columns)
        lines.append(f"| {layout} | " + " | ".join("0" if x == 0 else f"{x:.1e}" for x in cells) + " |")
    return "\n".join(lines)


def scale() -> str:
    """Tabulate what a process sends per step: 16-bit gradients and the sums of all tensors, both by ring all-reduce."""
    lines = ["| weights | processes | gradients | sums | sums / gradients |", "|---|---|---|---|---|"]
    for name, weights, tensors in MODELS:
        for processes in (8, 64, 1024):
            share = 2 * (processes - 1) / processes
            gradients, sums = 2 * weights * share, SUMS * 8 * tensors * share
            lines.append(
                f"| {name}, {tensors} tensors | {processes:,} | {gradients / 1e9:.1f} GB | {sums / 1e3:.1f} kB | "
                f"{sums / gradients:.1e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
