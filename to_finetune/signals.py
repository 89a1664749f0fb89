"""Ctrl-C and SIGTERM, so that what is begun can be ended."""

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
    """Within it Ctrl-C and SIGTERM, or these signals, go to `handler`."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """The one that raised it: Ctrl-C's, or as `sigterm_interrupts` says."""
    return interrupt.args[0] if interrupt.args else signal.SIGINT


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: what is begun is ended, and its record says so.

    Not in one of several processes, which may be waiting for the others without end.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    may_set = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    with on_stop(interrupt, [signal.SIGTERM] if is_alone and may_set else []):
        yield
