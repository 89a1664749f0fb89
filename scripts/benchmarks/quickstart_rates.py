"""Compare learning rates for the quick start: each optimizer at four of them on its task.

    python scripts/benchmarks/quickstart_rates.py runs/quickstart

The folder is one that scripts/quickstart.py has written. Writes quickstart_rates.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from to_finetune import finetune
from to_finetune.files import write_json
from to_finetune.machine import machine

HERE = Path(__file__).parent
RECIPE = HERE.parent.parent / "configs" / "recipes" / "quickstart.yaml"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "base").is_dir():
        parser.error(f"{folder} is no folder of the quick start's")
    runs = []
    for optim in ("adamw_torch", "diagonal_to", "rank_one_to"):
        for rate in RATES:
            with tempfile.TemporaryDirectory() as output_dir:
                flags = (
                    f"--config {RECIPE} --model_name_or_path {folder}/base --optim {optim} --learning_rate {rate} "
                    f"--dataset_name {folder}/instructions_train.jsonl --output_dir {output_dir} "
                    f"--eval_dataset_name {folder}/instructions_test.jsonl --report_to none"
                )
                if finetune.main(flags.split()):
                    raise SystemExit(1)
                results = json.loads((Path(output_dir) / "run.json").read_text())["results"]
            runs.append({"optim": optim, "learning_rate": rate, "eval_loss": round(results["eval_loss"], 5)})
    write_json(HERE / "quickstart_rates.json", {"machine": machine(), "runs": runs}, indent=1)


if __name__ == "__main__":
    main()
