"""What becomes of a run, and which of several results is the best."""

from collections.abc import Mapping
from typing import Literal, TypeVar

T = TypeVar("T")

Outcome = Literal["finished", "pruned", "diverged", "failed", "interrupted"]

DONE = ("finished", "diverged")
"""Outcomes that are results."""


Standing = tuple[tuple[float, ...], int | str]
"""Sorts results, the best first: a loss for each aim, the lower the better; then what decides
between equals."""


def standing(val_top1: float, number: int | str) -> Standing:
    """How a result stands among others: the higher validation top-1 is better, of equals the lower
    number.

    Args:
        val_top1: in percent.
        number: of a trial, or of a model's version; of a cell its identity, which is the same in
            every grid.
    """
    return (-val_top1,), number


def beats(one: Standing, other: Standing) -> bool:
    """Whether a result leaves no reason to choose another: it is worse in no aim, and before it in
    their order. Of one aim, that is the better of two."""
    return one < other and all(a <= b for a, b in zip(one[0], other[0], strict=True))


def front(standings: Mapping[T, Standing]) -> list[T]:
    """Those that no other beats, in the order of their standing: of one aim the best, of several
    the Pareto front."""
    found: list[T] = []
    # What beats another stands before it, and so does what beats that.
    for key in sorted(standings, key=standings.__getitem__):
        if not any(beats(standings[before], standings[key]) for before in found):
            found.append(key)
    return found
