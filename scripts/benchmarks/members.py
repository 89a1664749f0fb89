"""Time a case's trials as members of one computation against ordinary trainings one by one, and Full TO's two forms.

    python scripts/benchmarks/members.py

On random data in each of `SHAPES`, runs the first `TRIALS` of a method's grid for `STEPS` steps with two evaluations of
the loss: once as members, and once one by one, in an ordinary loop with `nn.Linear`, autograd and the real optimizer.
The two take turns; the first run, which compiles, is reported separately. Writes members.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from to_finetune.files import write_json
from to_finetune.machine import machine
from to_finetune.optim import DiagonalTO, FullTO, RankOneTO
from to_finetune.paper.members import Problem, batch_order, train
from to_finetune.paper.methods import LR_END, METHODS, Trial

FILE = Path(__file__).with_suffix(".json")
SHAPES = {  # rows, features, classes
    "covtype": (92_962, 98, 7),
    "kdd": (494_021, 116, 2),
    "news20": (11_314, 2000, 20),
    "mnist": (60_000, 784, 10),
}
TRIALS, STEPS, BATCH, ROWS, ROUNDS = 192, 100, 64, 4096, 3
FORM_STEPS = (100, 400)  # of Full TO, in both forms
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p, lr, beta1, beta2: torch.optim.Adam(p, lr, (beta1, beta2)),
    "momentum": lambda p, lr, beta: DiagonalTO(p, lr=lr, alpha=0.0, beta=beta),
    "diagonal_to_ours": partial(DiagonalTO, relative_alpha=True),
    "rank_one_to_ours": partial(RankOneTO, relative_alpha=True, scope="group"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    if not parser.parse_args().table:
        write_json(FILE, {"machine": machine(), "members": members(), "full": full_forms()}, indent=1)
    print_table(json.loads(FILE.read_text()))


def problem(name: str) -> Problem:
    rows, features, classes = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, features + 1, generator=generator)
    x[:, -1] = 1
    return Problem(x, torch.randint(classes, (rows,), generator=generator), classes)


def members() -> list[dict[str, Any]]:
    found = []
    for name in SHAPES:
        task = problem(name)
        rows = torch.arange(ROWS)
        for method_name, make in OPTIMIZERS.items():
            method = METHODS[method_name]
            trials = method.trials(method.lrs)[:TRIALS]
            settings: dict[str, Any] = {
                "steps": STEPS,
                "batch_size": BATCH,
                "evaluations": 1,
                "rows": rows,
                "compiled": True,
            }
            began = time.perf_counter()
            train(task, method, trials, [0], **settings)
            first = time.perf_counter() - began
            together, alone = [], []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                train(task, method, trials, [0], **settings)
                together.append(time.perf_counter() - began)
                began = time.perf_counter()
                for trial in trials:
                    one_training(task, make, trial, rows)
                alone.append(time.perf_counter() - began)
            row = {
                "data": name,
                "method": method_name,
                "weights": task.n,
                "together_s": round(median(together), 3),
                "alone_s": round(median(alone), 3),
                "first_s": round(first, 3),
                "ratio": round(median(alone) / median(together), 1),
            }
            found.append(row)
            print(row, flush=True)
    return found


def one_training(task: Problem, make: Callable[..., Optimizer], trial: Trial, rows: Tensor) -> None:
    """Run one ordinary training from N(0, 1)."""
    (out, inputs) = task.layers[0]
    torch.manual_seed(0)
    network = nn.Linear(inputs, out, bias=False)
    nn.init.normal_(network.weight)
    own = {key: value for key, value in trial.items() if key != "schedule"}
    optimizer = make(network.parameters(), **own)
    decays = trial["schedule"] == "exponential"
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, LR_END ** (decays / STEPS))
    evaluate(network, task, rows)
    for batch in batch_order(len(task.y), BATCH, STEPS, 0):
        optimizer.zero_grad()
        functional.cross_entropy(network(task.x[batch]), task.y[batch]).backward()
        optimizer.step()
        scheduler.step()
    evaluate(network, task, rows)


@torch.no_grad()
def evaluate(network: nn.Module, task: Problem, rows: Tensor) -> Tensor:
    return functional.cross_entropy(network(task.x[rows]), task.y[rows])


def full_forms() -> list[dict[str, Any]]:
    """Measure FullTO on one tensor with as many weights as a case: milliseconds per step and MiB of state, by form."""
    found = []
    for name in SHAPES:
        n = (SHAPES[name][1] + 1) * SHAPES[name][2]
        for steps in FORM_STEPS:
            row: dict[str, Any] = {"data": name, "weights": n, "steps": steps}
            for form in ("history", "matrix"):
                if (n * n * 4 > 8 << 30) if form == "matrix" else (2 * steps >= n):
                    continue  # the matrix does not fit, or the history would turn into it
                w = nn.Parameter(torch.randn(n))
                optimizer = FullTO([w], lr=1e-3, alpha=0.1, beta=0.1, relative_alpha=True)
                if form == "matrix":
                    optimizer.state[w] |= {"step": torch.tensor(0.0), "b": torch.zeros(n), "A": torch.zeros(n, n)}
                times = []
                for _ in range(steps):
                    w.grad = torch.randn(n)
                    began = time.perf_counter()
                    optimizer.step()
                    times.append(time.perf_counter() - began)
                state = sum(x.nbytes for x in optimizer.state[w].values() if isinstance(x, Tensor))
                row[form] = {"ms_a_step": round(1e3 * sum(times) / steps, 3), "state_mib": round(state / 2**20, 2)}
            found.append(row)
            print(row, flush=True)
    return found


def print_table(results: dict[str, Any]) -> None:
    print(
        f"| data | weights | method | {TRIALS} trials together | one by one | times faster |\n|---|---|---|---|---|---|"
    )
    for row in results["members"]:
        times = f"{row['together_s']:.2f} s | {row['alone_s']:.1f} s | {row['ratio']:.0f}"
        print(f"| {row['data']} | {row['weights']} | {METHODS[row['method']].title} | {times} |")
    print("\n| data | weights | steps | history, ms | MiB | matrix, ms | MiB |\n|---|---|---|---|---|---|---|")
    for row in results["full"]:
        cells = [
            f"{row[form]['ms_a_step']} | {row[form]['state_mib']}" if form in row else " | "
            for form in ("history", "matrix")
        ]
        print(f"| {row['data']} | {row['weights']} | {row['steps']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
