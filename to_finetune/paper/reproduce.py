"""`to-finetune reproduce`: run the jobs that are not finished yet, then draw all results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from to_finetune.errors import RunError, UsageError, did_you_mean
from to_finetune.files import check_place, write_whole
from to_finetune.machine import machine
from to_finetune.paper import contest, llm, page, resnet, theory
from to_finetune.paper.cases import CONVEX, FFN, FULL, QUICK, STRONGLY_CONVEX
from to_finetune.paper.data import Classification, Images, load, load_cifar10

CASES = {case.name: case for case in (*STRONGLY_CONVEX, *CONVEX, *FFN)}
JOBS = (*CASES, "resnet18", "resnet50", "llm", "theory")  # each writes a result file of its name
DEVICES = ("cpu", "cuda")


def reproduce(targets: Sequence[str], data_dir: str | None, output_dir: str, quick: bool, device: str) -> int:
    """Run the jobs of the targets and draw tables, figures and the page; return 1 if a job was not done, else 0.

    Raises:
        UsageError: for an unknown target, folder or device, for a damaged result, and if nothing can be done: without
            data, or with only results of another protocol.
        RunError: if a job failed and there is no result.
    """
    names = wanted(targets, device)
    check_places(data_dir, device)
    console = Console()
    folder = Path(output_dir) / "quick" if quick else Path(output_dir)
    check_place("--output_dir", folder / "index.html")
    missing, failures = to_do(names, folder, quick, device)
    if len(failures) == len(names):
        raise UsageError(" ".join(map(str, failures)))
    folder.mkdir(parents=True, exist_ok=True)
    run = partial(run_job, data_dir=Path(data_dir) if data_dir else None, folder=folder, quick=quick, device=device)
    failures += run_all(missing, run, console)
    if failures and not list(folder.glob("*.json")):
        kind = next((type(error) for error in failures if isinstance(error, RunError)), UsageError)
        raise kind(" ".join(map(str, failures)))
    written = page.render(folder)
    console.print(f"{len(written)} tables, figures and pages in {folder}; open {folder / 'index.html'}.")
    for error in failures:
        console.print(Text.assemble(("not done:", "yellow"), f" {error}"), soft_wrap=True)
    return 1 if failures else 0


def wanted(targets: Sequence[str], device: str) -> list[str]:
    """Return the jobs that the targets stand for, each once."""
    table2, convex, ffn = ([case.name for case in cases] for cases in (STRONGLY_CONVEX, CONVEX, FFN))
    resnets = ["resnet18", "resnet50"] if device.startswith("cuda") else ["resnet18"]
    table3 = [*convex, *ffn, *resnets]
    groups = {
        "all": [*table2, *table3, "llm", "theory"],
        **{"table2": table2, "table3": table3, "table6": ["llm"]},
        **{"figure1": table2, "figure2": convex, "figure3": ffn, "figure4": resnets, "figure5": ["llm"]},
        **{"figure6": ["theory"], "figure7": ["theory"]},
    }
    every = groups | {name: [name] for name in JOBS}
    for target in targets:
        if target not in every:
            raise UsageError(
                f"There is no target {target!r} to reproduce; there are {', '.join(groups)} and the single jobs "
                f"{', '.join(JOBS)}.{did_you_mean(target, every)}"
            )
    return list(dict.fromkeys(name for target in targets for name in every[target]))


def check_places(data_dir: str | None, device: str) -> None:
    """Raise UsageError for a folder that does not exist or a device that cannot be used."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir} is not a folder.")
    try:
        if torch.device(device).type not in DEVICES:
            raise RuntimeError(f"it takes {' and '.join(DEVICES)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {error or type(error).__name__}") from error


def protocol(name: str, quick: bool, device: str) -> dict[str, Any]:
    """Return the protocol of a job, as its result records it."""
    if name == "theory":
        return {"name": "quick" if quick else "full"}
    if name == "llm":
        return llm.described(llm.QUICK if quick else llm.FULL)
    if name.startswith("resnet"):
        return asdict(resnet_protocol(quick, device))
    return asdict(QUICK if quick else FULL)


def resnet_protocol(quick: bool, device: str) -> resnet.Protocol:
    return resnet.PROTOCOLS["quick" if quick else "full" if device.startswith("cuda") else "reduced"]


def to_do(names: Sequence[str], folder: Path, quick: bool, device: str) -> tuple[list[str], list[Exception]]:
    """Return the jobs without a result, and an error for each that has a result of another protocol.

    Raises:
        UsageError: for a damaged result.
    """
    missing, failures = list[str](), list[Exception]()
    for name in names:
        path = folder / f"{name}.json"
        found = page.read(path, itemgetter("protocol"))
        if found is None:
            missing.append(name)
        elif found != json.loads(json.dumps(protocol(name, quick, device))):
            failures.append(
                UsageError(f"{path} was made by another protocol: move it away, or give another --output_dir.")
            )
    return missing, failures


def run_all(names: list[str], run: Callable[..., None], console: Console) -> list[Exception]:
    """Run the jobs and print a line for each; return the errors of those that failed, each message once."""
    failures = dict[str, Exception]()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        current = progress.add_task("", left="", total=1)
        for i, name in enumerate(names):

            def show(what: str, done: int, total: int, i: int = i, name: str = name) -> None:
                description = f"{name}: {what}"
                if progress.tasks[0].description != description:
                    progress.reset(current, description=description, total=total)
                progress.update(current, advance=done, left=f"{len(names) - i - 1} jobs behind it")

            began = time.perf_counter()
            try:
                run(name, show)
            except (UsageError, RunError) as error:
                failures.setdefault(str(error), error)
                continue
            console.print(f"{name} [dim]{time.perf_counter() - began:.0f} s, {i + 1} of {len(names)}[/dim]")
        progress.remove_task(current)
    return list(failures.values())


def run_job(
    name: str, show: contest.Progress, *, data_dir: Path | None, folder: Path, quick: bool, device: str
) -> None:
    """Run one job and write its result atomically, with the flags, the machine and the seconds that it took."""
    began = time.perf_counter()

    def line(text: str) -> None:
        show(text, 0, 1)

    result: dict[str, Any]
    if name in CASES:
        data = dataset(CASES[name].dataset, data_dir, quick)
        data = data._replace(x=data.x.to(device), y=data.y.to(device))
        result = contest.run(CASES[name], data, QUICK if quick else FULL, show)
    elif name == "theory":
        result = theory.run(quick, line)
    elif name == "llm":
        result = llm.run(data_dir, folder, quick, line)
    else:
        images = stand_in_images() if quick else load_cifar10(data_dir)
        depth = int(name.removeprefix("resnet"))
        result = resnet.run(depth, images, resnet_protocol(quick, device), torch.device(device), folder, line)
    flags = " --data_dir DATA" * (data_dir is not None) + " --quick" * quick + f" --device {device}" * (device != "cpu")
    seconds = {"seconds": round(time.perf_counter() - began, 1)}
    write_whole(folder / f"{name}.json", json.dumps(seconds | result | {"flags": flags, "machine": machine()}) + "\n")


@lru_cache(maxsize=1)
def dataset(name: str, data_dir: Path | None, quick: bool) -> Classification:
    """Load the data, once for consecutive cases; for a quick trial scikit-learn's digits stand in."""
    if not quick:
        return load(name, data_dir)
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)
    return Classification(name, x, y, 10, f"scikit-learn's 1,797 digits stand in for {name}: a trial, not a result")


def stand_in_images() -> Images:
    """Return the digits as 32 x 32 images."""
    digits = dataset("digits", None, True)
    x = (digits.x.view(-1, 1, 8, 8) * 255).to(torch.uint8)
    return Images(x.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1), digits.y)
