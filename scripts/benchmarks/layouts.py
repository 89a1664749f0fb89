"""How far every layout ends from one process, on CPU processes: the README's table, as layouts.json beside this file.

    python scripts/benchmarks/layouts.py

Two minutes on two cores. The same runs as tests/layouts/test_trajectory.py, which asserts what is measured here.
`--table` prints the table again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from machine import machine

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.layouts.training import LAYOUTS, OPTIMIZERS, STATES, launch, trajectories
from to_finetune.training.record import write_whole

FILE = Path(__file__).with_suffix(".json")
WORLDS = (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    if not parser.parse_args().table:
        with tempfile.TemporaryDirectory() as folder:
            found = {world: launch(trajectories, world, Path(folder) / str(world)) for world in WORLDS}
        write_whole(FILE, json.dumps({"machine": machine(), "results": found}, indent=1) + "\n")
    print(table(json.loads(FILE.read_text())["results"]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Layouts as rows, optimizers and state formats as columns; each cell the largest deviation of all its runs."""
    largest: dict[tuple[str, str, str], float] = defaultdict(float)
    for found in results.values():
        for key, values in found.items():
            layout, optimizer, state = key.split()
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


if __name__ == "__main__":
    main()
