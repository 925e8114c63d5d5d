"""Ctrl-C and SIGTERM: both raise KeyboardInterrupt, but not in the middle of what must not tear."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM; the message is its name."""


class BudgetReached(Interrupted):
    """A sweep or grid has spent what it may."""

    def __init__(self, name: str, told: str) -> None:
        """`told` says what was spent."""
        super().__init__(name)
        self.told = told


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def raise_on_interrupt() -> None:
    """Both signals raise KeyboardInterrupt from now on (Ray sets SIGTERM to its own way)."""
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)


def ignore_interrupts() -> None:
    """Neither signal does anything from now on: the process is about to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A signal that comes in the block raises KeyboardInterrupt after it."""
    came: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda received, frame: came.append(received))
    try:
        yield
    finally:
        raise_on_interrupt()
    if came:
        raise KeyboardInterrupt
