"""The story of `to-finetune reproduce`: run what is not finished yet, then draw everything that is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from to_finetune.errors import UsageError, did_you_mean
from to_finetune.files import write_whole
from to_finetune.machine import machine
from to_finetune.paper import contest, llm, resnet, theory
from to_finetune.paper.cases import CONVEX, FFN, FULL, QUICK, STRONGLY_CONVEX
from to_finetune.paper.data import Classification, Images, load, load_cifar10

CASES = {case.name: case for case in (*STRONGLY_CONVEX, *CONVEX, *FFN)}
JOBS = (*CASES, "resnet18", "resnet50", "llm", "theory")  # each leaves a result file of its name


def reproduce(targets: Sequence[str], data_dir: str | None, output_dir: str, quick: bool, device: str) -> int:
    """Run what the targets need and draw tables, figures and the page; the exit code is 1 where data were missing.

    Raises:
        UsageError: for an unknown target, and where nothing could be run or drawn.
    """
    from to_finetune.paper.page import render

    check_places(data_dir, device)
    console = Console()
    folder = Path(output_dir) / "quick" if quick else Path(output_dir)
    names = [name for name in wanted(targets, device) if not (folder / f"{name}.json").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    run = partial(run_job, data_dir=Path(data_dir) if data_dir else None, folder=folder, quick=quick, device=device)
    missing = run_all(names, run, console)
    if missing and not list(folder.glob("*.json")):
        raise UsageError(" ".join(missing))
    written = render(folder, [f"to-finetune reproduce {' '.join(targets)}" + " --quick" * quick])
    console.print(f"{len(written)} tables, figures and pages in {folder}; open {folder / 'index.html'}.")
    for sentence in missing:
        console.print(f"[yellow]not run:[/yellow] {sentence}", soft_wrap=True)
    return 1 if missing else 0


def check_places(data_dir: str | None, device: str) -> None:
    """Raises UsageError for a folder or a device that is not there."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir} is not a folder.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def wanted(targets: Sequence[str], device: str) -> list[str]:
    """The jobs that the targets stand for, each once."""
    convex, ffn = [case.name for case in CONVEX], [case.name for case in FFN]
    resnets = ["resnet18", "resnet50"] if device.startswith("cuda") else ["resnet18"]
    table2 = [case.name for case in STRONGLY_CONVEX]
    table3 = [*convex, *ffn, *resnets]
    groups = {
        "all": [*table2, *table3, "llm", "theory"],
        **{"table2": table2, "table3": table3, "table6": ["llm"]},
        **{"figure1": table2, "figure2": convex, "figure3": ffn, "figure4": resnets, "figure5": ["llm"]},
        **{"figure6": ["theory"], "figure7": ["theory"]},
        **{name: [name] for name in JOBS},
    }
    for target in targets:
        if target not in groups:
            raise UsageError(
                f"There is no target {target!r} to reproduce; there are {', '.join(list(groups)[:11])} and the single "
                f"cases {', '.join(JOBS)}.{did_you_mean(target, groups)}"
            )
    return list(dict.fromkeys(name for target in targets for name in groups[target]))


def run_all(names: list[str], run: Callable[..., None], console: Console) -> list[str]:
    """Run the jobs with a line for each; returns the sentences of those whose data are missing."""
    missing: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        current = progress.add_task("", left="", total=1)
        for i, name in enumerate(names):

            def show(what: str, done: int, total: int, i: int = i, name: str = name) -> None:
                description = f"{name}: {what}"
                if progress.tasks[0].description != description:
                    progress.reset(current, description=description, total=total)
                progress.update(current, advance=done, left=f"{len(names) - i - 1} cases behind it")

            began = time.perf_counter()
            try:
                run(name, show)
            except UsageError as error:
                if str(error) not in missing:
                    missing.append(str(error))
                continue
            console.print(f"{name} [dim]{time.perf_counter() - began:.0f} s, {i + 1} of {len(names)}[/dim]")
        progress.remove_task(current)
    return missing


def run_job(
    name: str, show: contest.Progress, *, data_dir: Path | None, folder: Path, quick: bool, device: str
) -> None:
    """Run one job and write its result whole, with the machine and the seconds that it took."""
    began = time.perf_counter()
    size = "quick" if quick else "full" if device.startswith("cuda") else "reduced"

    def line(text: str) -> None:
        show(text, 0, 1)

    result: dict[str, Any]
    if name in CASES:
        data = dataset(CASES[name].dataset, data_dir, quick)
        result = contest.run(CASES[name], on(data, device), QUICK if quick else FULL, show)
    elif name == "theory":
        result = theory.run(quick, line)
    elif name == "llm":
        result = llm.run(data_dir, folder, quick, line)
    else:
        images = stand_in_images() if quick else load_cifar10(data_dir)[0]
        depth = int(name.removeprefix("resnet"))
        result = resnet.run(depth, images, resnet.PROTOCOLS[size], torch.device(device), folder, line)
    result |= {"machine": machine(), "seconds": round(time.perf_counter() - began, 1)}
    write_whole(folder / f"{name}.json", json.dumps(result) + "\n")


@cache
def dataset(name: str, data_dir: Path | None, quick: bool) -> Classification:
    """The data, read once; for a quick trial the digits that come with scikit-learn stand in."""
    if not quick:
        return load(name, data_dir)
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)
    return Classification(name, x, y, 10, f"scikit-learn's 1,797 digits stand in for {name}: a trial, not a result")


def stand_in_images() -> Images:
    """The digits as 32 x 32 images."""
    digits = dataset("digits", None, True)
    x = (digits.x.view(-1, 1, 8, 8) * 255).to(torch.uint8)
    return Images(x.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1), digits.y)


def on(data: Classification, device: str) -> Classification:
    return data._replace(x=data.x.to(device), y=data.y.to(device))
