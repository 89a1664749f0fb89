"""One run of a sweep, in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from to_finetune.errors import UsageError
from to_finetune.runs import RECORD, last_checkpoint, mapping, read
from to_finetune.signals import on_stop


def train(folder: Path, flags: Sequence[str], on_line: Callable[[str], None]) -> Mapping[str, Any]:
    """Train in `folder`, from its last checkpoint if it has one; a run that is done is not repeated.

    Args:
        flags: of `finetune.py`, without the folder.
        on_line: called when the run starts and with each line that it logs.

    Returns:
        The run's record, which may say that it failed.

    Raises:
        UsageError: when `finetune.py` refuses its flags.
        KeyboardInterrupt: when this process was told to stop, once the run has ended.
    """
    record = record_of(folder)
    if record.get("status") == "done":
        return record
    words = [*flags, "--output_dir", str(folder)]
    if last_checkpoint(folder):
        words += ["--resume_from_checkpoint", "true"]
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    code = finetune(words, folder / "log.txt", on_line)
    record = record_of(folder)
    if code == 2 and record.get("status") != "done":
        raise UsageError(f"{folder.name}: {last_line(folder).removeprefix('error: ')}")
    return record


def record_of(folder: Path) -> Mapping[str, Any]:
    """Return the run.json of a run, or an empty mapping."""
    return read(folder / RECORD, mapping) or {}


def last_line(folder: Path) -> str:
    """Return the last line of a run's log that is not blank."""
    log = folder / "log.txt"
    lines = log.read_text(encoding="utf-8").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "its folder has no log.txt")


def finetune(words: Sequence[str], log: Path, on_line: Callable[[str], None]) -> int:
    """Run `finetune.py` with its output in `log`, and return its exit code.

    With several GPUs, runs `to-finetune train` instead, which uses all of them.

    Raises:
        KeyboardInterrupt: when this process got Ctrl-C or SIGTERM, which it passes on, once the run has ended.
    """
    module = ["to_finetune.cli", "train"] if torch.cuda.device_count() > 1 else ["to_finetune.finetune"]
    on_line("starts")
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-m", *module, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it once, through this process
        ) as process,
        _signals_passed_on(process.pid) as received,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith("step "):
                on_line(line.strip())
    if received:
        raise KeyboardInterrupt(signal.Signals(received[0]))
    return process.returncode


@contextmanager
def _signals_passed_on(group: int) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to a process group; yield the list of those received."""
    received = list[int]()

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(group, number)

    with on_stop(pass_on):
        yield received
