"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from to_finetune.errors import UsageError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside to write to, renamed at the end: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".partial")
    beside.touch()
    mode = beside.stat().st_mode  # as for any new file here, whatever the writer prefers
    try:
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_place(flag: str, path: Path) -> None:
    """Refuse a file or a folder that cannot be made there, before hours of work for it.

    Raises:
        UsageError: naming the flag.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{flag}: {str(above)!r} is no folder that can be written to.")


def write_whole(path: Path, text: str) -> None:
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
