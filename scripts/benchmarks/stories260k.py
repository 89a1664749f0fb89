"""TO beside AdamW and momentum on a small pretrained Llama: equal grids of rates, three seeds, one JSON of results.

    python scripts/benchmarks/stories260k.py --model stories260k --data alpaca_data.json

Runs configs/recipes/stories260k.yaml through `finetune.py` once a method, rate and seed, and writes stories260k.json
beside this file. Finished runs are kept: interrupt it and start it again. `--table` prints the table of the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from to_finetune import finetune
from to_finetune.files import write_whole
from to_finetune.machine import machine

HERE = Path(__file__).parent
RECIPE = HERE.parent.parent / "configs" / "recipes" / "stories260k.yaml"
RESULTS = HERE / "stories260k.json"
SEEDS = (1, 2, 3)
METHODS: dict[str, tuple[str, str | None, tuple[float, ...]]] = {
    "AdamW": ("adamw_torch", None, (1e-3, 3e-3, 5e-3, 1e-2)),
    "momentum, rms gradients": ("diagonal_to", "alpha=0.0", (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "Diagonal TO": ("diagonal_to", None, (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "RankOne TO": ("rank_one_to", None, (2e-3, 4e-3, 8e-3, 1.6e-2)),
}
MEASURES = ("eval_loss", "train_loss_mean", "train_loss_first_fifth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--data", help="Alpaca's JSON file")
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    options = parser.parse_args()
    results: dict[str, Any] = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine(), "runs": []}
    )
    if not options.table:
        if not (options.model and options.data):
            parser.error("--model and --data are needed")
        run_all(options.model, options.data, results)
    print(table(results["runs"]))


def run_all(model: str, data: str, results: dict[str, Any]) -> None:
    """Add every run that is missing to `results`, and to its file as soon as it is done."""
    done = {(run["method"], run["learning_rate"], run["seed"]) for run in results["runs"]}
    for seed in SEEDS:
        for method, (optim, optim_args, rates) in METHODS.items():
            for rate in rates:
                if (method, rate, seed) not in done:
                    outcome = run(model, data, optim, optim_args, rate, seed)
                    results["runs"].append({"method": method, "learning_rate": rate, "seed": seed, **outcome})
                    write_whole(RESULTS, json.dumps(results, indent=1) + "\n")


def run(model: str, data: str, optim: str, optim_args: str | None, rate: float, seed: int) -> dict[str, float]:
    """One fine-tuning run; returns its losses."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--config {RECIPE} --model_name_or_path {model} --dataset_name {data} --output_dir {folder} "
        flags += f"--optim {optim} --learning_rate {rate} --seed {seed} --report_to none"
        code = finetune.main([*flags.split(), *(["--optim_args", optim_args] if optim_args else [])])
        if code:
            raise SystemExit(code)
        outcome = json.loads((Path(folder) / "run.json").read_text())["results"]
    return {key: round(outcome[key], 5) for key in MEASURES}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, each method's best held-out rate in bold."""
    cases = defaultdict(list)
    for one in runs:
        cases[one["method"], one["learning_rate"]].append(one)
    best: dict[str, float] = {}
    for method in {method for method, _ in cases}:
        means = {r: statistics.mean(x["eval_loss"] for x in rows) for (m, r), rows in cases.items() if m == method}
        best[method] = min(means, key=means.__getitem__)
    lines = [
        "| method | lr | held-out loss | mean training loss | first 40 steps | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for (method, rate), rows in cases.items():
        cells = []
        for measure in MEASURES:
            values = [row[measure] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        mark = "**" if best[method] == rate else ""
        lines.append(f"| {method} | {mark}{rate:g}{mark} | {' | '.join(cells)} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
