"""One thing of which two places say different things."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Disagreement:
    """One thing of which two places say different things."""

    where: str
    """The run, trial or cell."""
    what: str
    """What is wrong."""
    cure: str
    """What mending does, or what a person can do."""
    mend: Callable[[], None] | None = None
    """Mends it; None if that would not be safe."""


def count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
