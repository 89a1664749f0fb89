"""Measure Llama-7B's recipes on a GPU: planned memory, measured memory, and tokens per second.

    python scripts/benchmarks/recipes.py [--recipes llama-7b-last2 ...] [--at_once 1]

Each recipe runs as it stands, in its own process, on a Llama-7B with random weights and on rows that fill 8 x 512
tokens, but for only four steps of two such batches. Needs the GPU to itself, 14 GB of disk, and bitsandbytes for the
4-bit recipes; writes recipes-<GPU>.json beside this file. "Planned" is what every run prints, without CUDA's own
context; "measured" is the most that torch had allocated during training. Recipes that run at once share the GPU: their
memory is their own, their speed is not. Results of recipes that are not run again are kept. `--table` prints the
existing results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_llama import build_tokenizer

from to_finetune.files import write_json
from to_finetune.machine import file_word, machine

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "recipes").glob("llama-7b-*.yaml"))}
LLAMA_7B = LlamaConfig(vocab_size=32_000)  # its other sizes are transformers' defaults
ROWS, LENGTH, STEPS = 8, 512, 4
FLAGS = f"""--gradient_accumulation_steps 2 --max_steps {STEPS} --val_set_size 0 --eval_strategy no --save_strategy no
    --logging_steps 1 --report_to tensorboard"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--at_once", type=int, default=1, help="recipes that share the GPU")
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    options = parser.parse_args()
    name = file_word(torch.cuda.get_device_name()) if torch.cuda.is_available() else "*"
    output = HERE / f"recipes-{name}.json"
    if not options.table:
        if not torch.cuda.is_available():
            parser.error("it needs a GPU; --table prints what one has left")
        with TemporaryDirectory() as folder:
            write_inputs(Path(folder))
            with ThreadPoolExecutor(options.at_once) as pool:
                runs = dict(zip(options.recipes, pool.map(partial(run, Path(folder)), options.recipes), strict=True))
        about = {"machine": machine(), "at_once": options.at_once}
        before = json.loads(output.read_text())["recipes"] if output.exists() else {}
        done = {recipe: about | run for recipe, run in runs.items() if "error" not in run or recipe not in before}
        write_json(output, {"tokens": [ROWS, LENGTH], "recipes": before | done}, indent=1)
    for path in sorted(HERE.glob(output.name)):
        print(table(json.loads(path.read_text())))


def write_inputs(folder: Path, config: LlamaConfig = LLAMA_7B) -> None:
    """Write a Llama with random bfloat16 weights, a byte-level tokenizer, and rows that are longer than a batch's."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    torch.cuda.empty_cache()
    rows = ({"text": f"{i:03d} " * LENGTH} for i in range(2 * ROWS * STEPS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_tokenizer([], vocab_size=0).save_pretrained(folder / "model")  # no merges, so that each byte is a token


def run(folder: Path, recipe: str) -> dict[str, Any]:
    """Run a recipe; return its bytes and tokens per second, or its error."""
    out = folder / recipe
    command = [sys.executable, "scripts/finetune.py", "--config", str(RECIPES[recipe]), *FLAGS.split()]
    command += ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl")]
    done = subprocess.run([*command, "--output_dir", str(out)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{recipe} failed:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return {"error": done.stderr.strip().splitlines()[-1]}
    record = json.loads((out / "run.json").read_text())
    planned, measured = record["memory"]["planned"], record["memory"]["measured"]
    return {
        "trained_weights": record["subset"]["weights"],
        "planned_bytes": planned,
        "planned_without_context": sum(planned.values()) - planned["context"],
        "measured_bytes": measured,
        "tokens_per_second": round(2 * ROWS * LENGTH / median(step_seconds(out)), 1),
        "losses": [row["loss"] for row in history(out)],
    }


def history(out: Path) -> list[dict[str, Any]]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


def step_seconds(out: Path) -> list[float]:
    """Return the seconds of all steps but the first two, from the times at which their losses were logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = out.glob("**/events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    times = [event.wall_time for event in events.Scalars("train/loss")]
    return [after - before for before, after in pairwise(times[1:])]


def table(results: dict[str, Any]) -> str:
    lines = ["| recipe | trained weights | planned, GB | measured, GB | tokens/s |", "|---|---|---|---|---|"]
    for name, x in results["recipes"].items():
        if "error" in x:
            lines.append(f"| `{name}` | {x['error']} | | | |")
            continue
        planned, measured = x["planned_without_context"] / 1e9, x["measured_bytes"] / 1e9
        speed = f"{x['tokens_per_second']:,.0f}"
        lines.append(f"| `{name}` | {x['trained_weights']:,} | {planned:.1f} | {measured:.1f} | {speed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
