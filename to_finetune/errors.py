"""The two kinds of error that end a run, and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """An invalid flag, key, file or name. Exit code 2."""


class RunError(RuntimeError):
    """The run is not doing what was asked, or cannot go on. Exit code 1."""


def at_least_one(**numbers: float | None) -> None:
    """Raise if a number is below 1; None stands for one that was not given.

    Raises:
        UsageError: naming the first.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{name}={number} is not valid: at least 1.")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with up to three of the nearest choices, or an empty string."""
    close = get_close_matches(name, list(choices))
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
