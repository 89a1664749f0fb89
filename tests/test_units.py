"""Sizes and durations, read and written."""

from __future__ import annotations

import pytest

from to_finetune.errors import UsageError
from to_finetune.units import duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 gb", 24 * 10**9), ("80GiB", 80 * 2**30), ("1.5TB", 15 * 10**11), ("512MiB", 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "GB", "-1GB", "0GB", "24 GB RAM", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (2_000_000, "2.00 MB"),
        (699_000_000, "699.00 MB"),
        (999_999_999, "1.00 GB"),
        (21.4e9, "21.40 GB"),
        (1.5e12, "1.50 TB"),
    ],
)
def test_sizes_in_print(count: float, said: str) -> None:
    assert format_size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0.4 s"),
        (8.26, "8.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (65.4, "1 min 05 s"),
        (3599.6, "1 h 00 min"),
        (8123, "2 h 15 min"),
        (86_399, "1 d 00 h"),
        (187_000, "2 d 04 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
