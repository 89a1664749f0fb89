"""Measure how far finetune.py ends from a plain run under the files of configs/accelerate, on the GPUs at hand.

    python scripts/benchmarks/layouts_gpu.py

Trains the last two layers of a tiny Llama for six steps of four rows, once for each of RUNS and each layout, all
layouts at once; needs deepspeed. Writes layouts-<GPU>.json beside this file; `--table` prints the existing results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from to_finetune.files import write_json
from to_finetune.machine import file_word, machine

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LAYOUTS = [path.stem for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml")) if path.stem != "multi_node"]
ROWS = 4
RUNS = {
    "diagonal, float32": "--optim diagonal_to",
    "diagonal, int8": "--optim diagonal_to --optim_args state_dtype=int8",
    "rank_one, float32": "--optim rank_one_to",
    "diagonal, float32, --bf16": "--optim diagonal_to --bf16 true",
}
FLAGS = """--unfrozen_last_layers 2 --max_steps 6 --save_steps 3 --logging_steps 1 --report_to none --bf16 false
    --weight_decay 0.1 --learning_rate 1e-3"""
LAUNCHED = """import json, os, sys
from accelerate.state import AcceleratorState
from to_finetune.finetune import main
for flags in json.loads(os.environ["RUNS"]):
    if main(flags):
        sys.exit(1)
    AcceleratorState._reset_state()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    options = parser.parse_args()
    name = file_word(torch.cuda.get_device_name()) if torch.cuda.is_available() else "*"
    output = HERE / f"layouts-{name}.json"
    if not options.table:
        if not torch.cuda.is_available():
            parser.error("it needs a GPU; --table prints what one has left")
        with TemporaryDirectory() as folder:
            results = measure(Path(folder))
        about = {"machine": machine(), "processes": torch.cuda.device_count()}
        write_json(output, {**about, "results": results}, indent=1)
    for path in sorted(HERE.glob(output.name)):
        print(table(json.loads(path.read_text())["results"]))


def measure(folder: Path) -> dict[str, Any]:
    """Return, by layout and run, the largest weight difference from the plain run and the number of sharded tensors."""
    subprocess.run([sys.executable, "scripts/tiny_llama.py", str(folder / "tiny")], cwd=ROOT, check=True)
    (folder / "runs.py").write_text(LAUNCHED)
    started = {layout: start(folder, layout, i) for i, layout in enumerate(["plain", *LAYOUTS])}
    for layout, process in started.items():
        if process.wait():
            raise SystemExit(f"error: {layout} failed:\n{(folder / f'{layout}.log').read_text()[-3000:]}")
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        for run in RUNS:
            theirs, ours = (load_file(folder / where / run / "trained.safetensors") for where in ("plain", layout))
            record = json.loads((folder / layout / run / "run.json").read_text())
            found.setdefault(layout, {})[run] = {
                "deviation": max(float((ours[key] - theirs[key]).abs().max()) for key in theirs),
                "sharded_tensors": record["proofs"].get("sharded_tensors", 0),
            }
    return found


def start(folder: Path, layout: str, number: int) -> subprocess.Popen[bytes]:
    """Start the runs of a layout, one after another; "plain" is a process without a launcher."""
    processes = 1 if layout == "plain" else torch.cuda.device_count()
    data = ["--model_name_or_path", f"{folder}/tiny/model", "--dataset_name", f"{folder}/tiny/instructions_train.jsonl"]
    data += ["--per_device_train_batch_size", str(ROWS // processes), *FLAGS.split()]
    runs = [[*data, *options.split(), "--output_dir", str(folder / layout / run)] for run, options in RUNS.items()]
    command = [sys.executable, str(folder / "runs.py")]
    if layout != "plain":
        launcher = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{layout}.yaml"]
        launcher += ["--num_processes", str(processes), "--main_process_port", str(29600 + number)]
        command[1:1] = launcher
    environment = {**os.environ, "RUNS": json.dumps(runs), "PYTHONPATH": str(ROOT)}
    with (folder / f"{layout}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def table(results: dict[str, Any]) -> str:
    lines = ["| layout | " + " | ".join(RUNS) + " |", "|---|" + "---|" * len(RUNS)]
    for layout, runs in results.items():
        cells = (runs[run]["deviation"] for run in RUNS)
        lines.append(f"| {layout} | " + " | ".join("0" if x == 0 else f"{x:.1e}" for x in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
