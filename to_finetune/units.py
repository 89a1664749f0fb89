"""Sizes and durations as people write them."""

from __future__ import annotations

import re

from rich.filesize import decimal

from to_finetune.errors import UsageError

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``24GB`` (10^9 bytes each) or ``24GiB`` (2^30).

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)B", text.strip().upper())
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is not a size: a number and a unit, such as 24GB or 80GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def format_size(count: float) -> str:
    """Format bytes in decimal units, to a hundredth: 24.00 GB."""
    return decimal(round(float(f"{count:.5g}")), precision=2)  # rounded first, else 999.999 MB would be 1,000.00 MB


def duration(seconds: float) -> str:
    """Format a duration: 8.3 s, 1 min 05 s, 2 h 03 min, 1 d 01 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        (whole, rest), units = divmod(round(seconds), 60), ("min", "s")
    elif round(seconds / 60) < 24 * 60:
        (whole, rest), units = divmod(round(seconds / 60), 60), ("h", "min")
    else:
        (whole, rest), units = divmod(round(seconds / 3600), 24), ("d", "h")
    return f"{whole} {units[0]} {rest:02} {units[1]}"
