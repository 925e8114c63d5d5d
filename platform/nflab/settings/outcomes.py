"""What becomes of a run, and which of several results is the best."""

from typing import Literal

Outcome = Literal["finished", "pruned", "diverged", "failed", "interrupted"]

DONE = ("finished", "diverged")
"""Outcomes that are results."""


Standing = tuple[float, int | str]
"""Sorts results, the best first."""


def standing(val_top1: float, number: int | str) -> Standing:
    """How a result stands among others: the higher validation top-1 is better, of equals the lower
    number.

    Args:
        val_top1: in percent.
        number: of a trial, or of a model's version; of a cell its identity, which is the same in
            every grid.
    """
    return -val_top1, number
