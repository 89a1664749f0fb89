"""Handling Ctrl-C and SIGTERM, so that work in progress can be ended cleanly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_stop(
    handler: Callable[[int, Any], None], numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Route the signals `numbers` to `handler` within the context."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """Return the signal behind an interrupt: the one that it carries (see `sigterm_interrupts`), else Ctrl-C's."""
    return interrupt.args[0] if interrupt.args else signal.SIGINT


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does: work in progress is ended, and its record says so.

    Does nothing in one of several processes, which may be waiting for the others forever.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    may_set = threading.current_thread() is threading.main_thread()  # only the main thread may set handlers
    with on_stop(interrupt, [signal.SIGTERM] if is_alone and may_set else []):
        yield
