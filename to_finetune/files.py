"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside to write to, renamed at the end: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".partial")
    yield beside
    os.replace(beside, path)


def write_whole(path: Path, text: str) -> None:
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
