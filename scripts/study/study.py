"""Compare TO with well-tuned optimizers: small pretrained Llamas, four trained parts, Alpaca's instructions.

    python scripts/study/study.py DATA_DIR [--cells 1M/last2 5M/lora ...] [--methods adamw diagonal_to ...]
    python scripts/study/study.py DATA_DIR --cells 100M/last2 --methods adamw momentum_factored diagonal_to_factored \
        diagonal_to_default     # on a GPU, in about ten minutes

Each method of a cell (a base model and a trained part) is tuned alike on seed 0: three values of lr, a factor of three
apart; more at an end while the best is there; then two between, next to the best; then three times and a third of the
best. The best by held-out loss is trained on three other seeds. Every run does what `finetune.py` does with the same
flags, without its pages. Each run adds a line to results/CELL.jsonl and is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import base_models
import datasets
import torch
import transformers
from optimizers import IdeaTO, MuonAndAdamW
from torch import nn
from torch.optim import Optimizer
from transformers import PrinterCallback, ProgressCallback

from to_finetune.data import load_data
from to_finetune.errors import RunError
from to_finetune.files import write_whole
from to_finetune.machine import machine
from to_finetune.training.callbacks import StopOnNonFinite
from to_finetune.training.optimizers import unwrapped
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import prepare_data, prepare_model, prepare_trainer
from to_finetune.training.sft import TOSFTTrainer

RESULTS = Path(__file__).parent / "results"
AGAIN = (RESULTS / "again", RESULTS / "third")  # for base models pretrained a second and a third time
TUNING_SEED, SEEDS = 0, (1, 2, 3)
STEP = math.sqrt(3)  # between neighbouring values of lr
WIDENINGS = 4  # at most
PARTS = {
    "last2": "--unfrozen_last_layers 2",
    "qv": "--unfrozen_modules q_proj v_proj",
    "all": "",
    "lora": "--use_peft true --lora_r 8 --lora_alpha 16 --lora_dropout 0 --lora_target_modules all-linear",
}
MAX_LENGTH = {"stories260k": 192, "1M": 128, "5M": 128}  # tokens; stories260k's are half as long
CELLS = [f"{model}/{part}" for model in MAX_LENGTH for part in PARTS]
ON_GPU = "100M/last2"  # its model is pretrained there, in a few minutes
MAX_LENGTH["100M"] = 128
PROTOCOL = """--dataset_train_split train[:4000] --val_set_size 200 --per_device_train_batch_size 8
    --per_device_eval_batch_size 32 --max_steps 100 --lr_scheduler_type cosine --warmup_steps 3 --max_grad_norm 1.0
    --weight_decay 0 --logging_steps 1 --save_strategy no --report_to none --disable_tqdm true --use_cpu true
    --dtype float32"""


class Method(NamedTuple):
    title: str
    optim: str
    lr: float | None  # the middle of the initial values on stories260k; None for the toolkit's default, untuned
    options: str = ""


EXACT = "relative_alpha=False,grad_scale=None"
METHODS = {
    "adamw": Method("AdamW", "adamw_torch", 3e-3),
    "diagonal_to_default": Method("Diagonal TO, untuned", "diagonal_to", None),
    "diagonal_to_factored": Method("Diagonal TO, factored", "diagonal_to", 6e-3, "grad_scale=factored"),
    "diagonal_to": Method("Diagonal TO, rms", "diagonal_to", 6e-3, "grad_scale=rms"),
    "momentum_factored": Method("Momentum, factored", "diagonal_to", 6e-3, "alpha=0.0,grad_scale=factored"),
    "momentum_rms": Method("Momentum, rms", "diagonal_to", 6e-3, "alpha=0.0,grad_scale=rms"),
    "rank_one_to_factored": Method("RankOne TO, factored", "rank_one_to", 6e-3, "grad_scale=factored"),
    "rank_one_to": Method("RankOne TO, rms", "rank_one_to", 6e-3, "grad_scale=rms"),
    "sgd": Method("SGD with momentum", "sgd", 0.1, "momentum=0.9"),
    "adafactor": Method("Adafactor", "adafactor", 3e-3),
    "lion": Method("Lion", "lion_32bit", 3e-4),
    "muon": Method("Muon", "muon", 3e-3),
    "diagonal_to_exact": Method("Diagonal TO, the paper's", "diagonal_to", 1.0, f"alpha=0.1,gamma_max=None,{EXACT}"),
    "diagonal_to_relative": Method("Diagonal TO, relative alpha alone", "diagonal_to", 1.0, "grad_scale=None"),
    "diagonal_to_rms": Method("Diagonal TO, rms alone", "diagonal_to", 6e-3, "relative_alpha=False,grad_scale=rms"),
    "rank_one_to_exact": Method(
        "RankOne TO, the paper's", "rank_one_to", 1.0, f"alpha=0.01,gamma_max=None,scope=group,{EXACT}"
    ),
    "rank_one_to_relative": Method("RankOne TO, relative alpha alone", "rank_one_to", 1.0, "grad_scale=None"),
    "rank_one_to_rms": Method("RankOne TO, rms alone", "rank_one_to", 6e-3, "relative_alpha=False,grad_scale=rms"),
}
IDEAS: dict[str, dict[str, Any]] = {  # options of `IdeaTO`
    "centred on the start": {"centre": "start"},
    "centred on the running mean": {"centre": "mean"},
    "the rates without the slope": {"slope": False},
    "alpha by rows": {"rows": True},
    "gradient by rows": {"scale": "rows"},
    "gradient by rows and columns": {"scale": "factored"},
    "gradient by running rows and columns": {"scale": "running"},
    "warm beta": {"warm": True},
    "momentum on the step": {"momentum": 0.5},
    "clipped residual": {"clip": 2.0},
}
METHODS |= {name: Method(f"Diagonal TO, {name}", "idea", 6e-3, json.dumps(idea)) for name, idea in IDEAS.items()}
RATES = {  # of the estimate, other than the recommended ones
    "alpha 0.1": "alpha=0.1",
    "alpha 1.0": "alpha=1.0",
    "beta 0.05": "beta=0.05",
    "beta 0.2": "beta=0.2",
    "alpha and beta decaying": "schedule=exponential,alpha_decay=0.98",  # to 0.13 of what they were in 100 steps
}
METHODS |= {
    f"factored, {name}": Method(f"Diagonal TO, factored, {name}", "diagonal_to", 6e-3, f"{rates},grad_scale=factored")
    for name, rates in RATES.items()
}
ASIDE = {*IDEAS, *(f"factored, {name}" for name in RATES)}  # run only on request, and shown in the cells' tables alone
START = {
    "stories260k": 1.0,
    "1M": 0.5,
    "5M": 0.3,
    "100M": 0.1,
    "lora": 2.0,
}  # factors of the middle: a guess, since the grid is widened as needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="has alpaca_data.json, user_oriented_instructions.jsonl, ...")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder of their own for other base models")
    parser.add_argument("--cells", nargs="+", choices=[*CELLS, ON_GPU], default=CELLS, metavar="CELL")
    names = ", ".join(map(repr, METHODS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[name for name in METHODS if name not in ASIDE],
        metavar="METHOD",
        help=names,
    )
    arguments = parser.parse_args()
    base_models.check_data(arguments.data_dir, "alpaca_data.json", "user_oriented_instructions.jsonl")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    for cell in arguments.cells:
        runs = Runs(cell, arguments.data_dir, arguments.results)
        for method in arguments.methods:
            compare(runs, method)


def compare(runs: Runs, method: str) -> None:
    """Tune a method in a cell, and run it on the judging seeds."""
    is_tuned = METHODS[method].lr is not None
    best = tune(runs, method) if is_tuned else None
    if best is None and is_tuned:
        print(f"{runs.cell} {method}: every rate diverges")
        return
    for seed in SEEDS:
        runs.loss(method, best, seed)


def tune(runs: Runs, method: str) -> int | None:
    """Return the exponent of the best lr, which is ``middle * STEP**exponent``; None if every run diverged."""
    tried = {k: runs.loss(method, k) for k in (-2, 0, 2)}

    def best() -> int:
        return min(tried, key=lambda k: (tried[k], k))  # if all diverge, the lowest

    for _ in range(WIDENINGS):
        ends = {min(tried): min(tried) - 2, max(tried): max(tried) + 2}
        if best() not in ends:
            break
        further = ends[best()]
        tried[further] = runs.loss(method, further)
    middle = best()
    if math.isinf(tried[middle]):
        return None
    tried |= {k: runs.loss(method, k) for k in (middle - 1, middle + 1)}
    while not {best() - 2, best() + 2} <= tried.keys():
        middle = best()
        tried |= {k: runs.loss(method, k) for k in (middle - 2, middle + 2)}
    return best()


class Runs:
    """The runs of a cell: finished ones are lines of its file, missing ones are run when needed."""

    def __init__(self, cell: str, data_dir: Path, results: Path) -> None:
        self.cell, self.data_dir = cell, data_dir
        self.model, self.part = cell.split("/")
        self.base = base_models.make(self.model, data_dir)
        self.protocol = " ".join(PROTOCOL.split())
        if cell == ON_GPU:
            self.protocol = self.protocol.replace("--use_cpu true", "--bf16 true")
        self.path = results / f"{self.model}-{self.part}.jsonl"
        bits = hashlib.sha256((self.base / "model.safetensors").read_bytes()).hexdigest()[:16]
        head = {"cell": cell, "base_sha256": bits, "protocol": self.protocol, "part": PARTS[self.part]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            write_whole(self.path, json.dumps({**head, "machine": machine()}) + "\n")
        found = self.path.read_text(encoding="utf-8")
        text = found[: found.rfind("\n") + 1]
        if text != found:  # the last line was not written to its end
            write_whole(self.path, text)
        first, *lines = [json.loads(line) for line in text.splitlines()]
        if {key: first[key] for key in head} != head:
            raise SystemExit(f"error: {self.path} has runs of another protocol or base model: see --results.")
        self.done = {(run["method"], METHODS[run["method"]].lr and run["lr"], run["seed"]): run for run in lines}

    def loss(self, method: str, exponent: int | None, seed: int = TUNING_SEED) -> float:
        """Return the held-out loss of a run, infinite if it diverged; without an exponent, at the default rate."""
        middle, lr = METHODS[method].lr, None
        if middle is not None and exponent is not None:
            lr = float(f"{middle * START[self.model] * START.get(self.part, 1.0) * STEP**exponent:.3g}")
        key = method, lr, seed
        if key not in self.done:
            began = time.perf_counter()
            flags = f"{self.protocol} {PARTS[self.part]} --max_length {MAX_LENGTH[self.model]}"
            result = train(flags, self.base, self.data_dir, METHODS[method], lr, seed)
            run = {"method": method, "seed": seed, **result}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            self.done[key] = run
            seconds = time.perf_counter() - began
            print(f"{self.cell} {method} lr {run['lr']:g} seed {seed}: {run['alpaca']} in {seconds:.0f} s", flush=True)
        return self.done[key]["alpaca"] or math.inf


def train(protocol: str, base: Path, data_dir: Path, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """Run once; return its rate, held-out losses (None if it diverged), each step's training loss, time and memory."""
    with TemporaryDirectory() as folder:
        flags = f"""{protocol} --model_name_or_path {base}
            --dataset_name {data_dir / "alpaca_data.json"} --seed {seed} --output_dir {folder}
            --optim {"adamw_torch" if method.optim in ("muon", "idea") else method.optim}"""
        options = [] if lr is None else ["--learning_rate", str(lr)]
        if method.options and method.optim != "idea":
            options += ["--optim_args", method.options]
        trainer = prepare([*flags.split(), *options], data_dir)
        if method.optim in ("muon", "idea"):
            trainer.optimizer = named(method, trainer.model, trainer.args.learning_rate)
            trainer.engagement.expected = type(trainer.optimizer)
        try:
            trainer.train()
            losses = trainer.evaluate()
        except RunError as error:
            if "diverged" not in str(error):
                raise
            losses = {}
    history = trainer.state.log_history
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    seconds = next((row["train_runtime"] for row in history if "train_runtime" in row), None)
    finite = all(math.isfinite(loss) for loss in losses.values())
    return {
        "lr": trainer.args.learning_rate,
        "alpaca": round(losses["eval_alpaca_loss"], 5) if losses and finite else None,
        "user": round(losses["eval_user_loss"], 5) if losses and finite else None,
        "curve": [round(row["loss"], 4) for row in history if "loss" in row and math.isfinite(row["loss"])],
        "seconds_a_step": seconds and round(seconds / trainer.state.max_steps, 4),
        "state_bytes_a_weight": round(state_bytes(unwrapped(trainer.optimizer)) / trained, 2),
    }


def named(method: Method, model: nn.Module, lr: float) -> Optimizer:
    """Build an optimizer that Hugging Face has no name for."""
    if method.optim == "muon":
        return MuonAndAdamW(model, lr)
    return IdeaTO((p for p in model.parameters() if p.requires_grad), lr, **json.loads(method.options))


def prepare(flags: Sequence[str], data_dir: Path) -> TOSFTTrainer:
    """Build the trainer of a run, with two held-out sets: Alpaca's own and the user-oriented instructions."""
    model_args, data_args, args = parse_arguments(flags)
    tokenizer, rows, held_out = prepare_data(model_args, data_args, args)
    model, _ = prepare_model(model_args, args)
    user = load_data([str(user_oriented(data_dir))]).train
    trainer = prepare_trainer(model, tokenizer, args, rows, {"alpaca": held_out, "user": user})
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StopOnNonFinite())
    return trainer


def user_oriented(data_dir: Path) -> Path:
    """Return the file of the user-oriented instructions as rows in Alpaca's format, writing it if needed."""
    path = base_models.MODELS_DIR / "user_oriented.jsonl"
    if path.exists():
        return path
    lines = (data_dir / "user_oriented_instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{"instruction": row["instruction"], **row["instances"][0]} for row in map(json.loads, lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def state_bytes(optimizer: Optimizer) -> int:
    if isinstance(optimizer, MuonAndAdamW):
        return sum(x.nbytes for x in optimizer.state_tensors())
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))


if __name__ == "__main__":
    main()
