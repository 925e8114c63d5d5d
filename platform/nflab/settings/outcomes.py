"""What becomes of a run."""

from typing import Literal

Outcome = Literal["finished", "pruned", "diverged", "failed", "interrupted"]

DONE = ("finished", "diverged")
"""Outcomes that are results."""
