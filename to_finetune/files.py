"""Atomic file writes: a file is complete or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from to_finetune.errors import UsageError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` at the end: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".partial")
    beside.touch()
    mode = beside.stat().st_mode  # the default for new files here, whichever mode the writer sets
    try:
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_place(flag: str, path: Path) -> None:
    """Raise if a file or folder cannot be created at `path`, before hours of work for it.

    Raises:
        UsageError: naming the flag.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{flag}: {str(above)!r} is no folder that can be written to.")


def write_whole(path: Path, text: str) -> None:
    """Write `text` to a file atomically."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write JSON to a file atomically."""
    write_whole(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")
