"""What a few seeds tell, and what they do not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    std: float
    """Sample standard deviation; NaN for a single value."""
    count: int
    low: float
    high: float
    """Student's interval of the mean, at CONFIDENCE; infinite for a single value."""

    def __str__(self) -> str:
        spread = f" ± {self.std:.2f}" if self.count > 1 else ""
        return f"{self.mean:.2f}{spread} ({self.count})"


def verdict(difference: Estimate) -> str:
    """What a mean difference of paired results, in points, tells and does not."""
    if difference.count == 1:
        return f"{difference.mean:+.2f} points, in one seed, which proves nothing"
    told = "" if difference.low > 0 or difference.high < 0 else ": not distinguishable from none"
    interval = f"{CONFIDENCE:.0%} interval {difference.low:+.2f} to {difference.high:+.2f}"
    return f"{difference.mean:+.2f} points ({interval}, {difference.count} seeds){told}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent results, and how far it can be trusted.

    Raises:
        ValueError: there are none.
    """
    found = np.asarray(values, dtype=float)
    if not len(found):
        raise ValueError("there is no mean of no results")
    mean, count = float(found.mean()), len(found)
    if count == 1:
        return Estimate(mean, float("nan"), 1, -float("inf"), float("inf"))
    std = float(found.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / count**0.5
    return Estimate(mean, std, count, mean - half, mean + half)
