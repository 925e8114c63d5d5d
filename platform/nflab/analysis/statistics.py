"""What a few runs tell, and what they do not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Of an interval, or of all that are read together."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    std: float
    """Sample standard deviation; NaN for a single value."""
    count: int
    low: float
    high: float
    """Student's interval of the mean; infinite for a single value."""
    confidence: float = CONFIDENCE
    """Of that interval."""

    def __str__(self) -> str:
        spread = f" ± {self.std:.2f}" if self.count > 1 else ""
        return f"{self.mean:.2f}{spread} ({self.count})"


def verdict(difference: Estimate) -> str:
    """What a mean difference of paired results, in points, tells and does not."""
    if difference.count == 1:
        return f"{difference.mean:+.2f} points, in one seed, which proves nothing"
    if difference.std == 0:
        return f"{difference.mean:+.2f} points in each of {difference.count} seeds, too few to tell"
    told = "" if difference.low > 0 or difference.high < 0 else ": not distinguishable from none"
    interval = f"{100 * difference.confidence:.3g} % interval"
    interval += f" {difference.low:+.2f} to {difference.high:+.2f}"
    return f"{difference.mean:+.2f} points ({interval}, {difference.count} seeds){told}"


def estimate(values: Sequence[float], comparisons: int = 1) -> Estimate:
    """The mean of independent results, and how far it can be trusted.

    Args:
        comparisons: how many such intervals are read together: with CONFIDENCE all of them hold
            (Bonferroni).

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
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * std / count**0.5
    return Estimate(mean, std, count, mean - half, mean + half, confidence)


@dataclass(frozen=True)
class Importance:
    """Share of the variance in validation top-1 that a setting explains, in 0..1."""

    share: float
    low: float
    high: float
    """The middle 80 % of the shares when trials are drawn anew from those that were run."""
