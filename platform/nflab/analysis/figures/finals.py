"""Figure of finalists over their seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nflab.analysis.figures.style import new_figure, save_figure
from nflab.analysis.statistics import Estimate


def draw_finals(found: Mapping[str, tuple[Sequence[float], Estimate]], path: Path) -> None:
    """Each seed's test top-1, the mean and its interval, a row for each setting.

    Args:
        found: label -> (test top-1 in percent of each seed, their estimate); the first at the top.
    """
    figure, axes = new_figure(7.5, 1.4 + 0.5 * max(1, len(found)))
    for row, (values, estimate) in enumerate(found.values()):
        color = "0.4" if row == 0 else "C0"
        axes.scatter(values, np.full(len(values), row - 0.18), s=18, color=color, alpha=0.6)
        if estimate.count > 1:
            # Accuracies end at 0 and 100, whatever Student's interval says.
            low, high = max(0.0, estimate.low), min(100.0, estimate.high)
            axes.plot([low, high], [row + 0.1] * 2, color=color, lw=2)
        axes.plot(estimate.mean, row + 0.1, "D", color=color, ms=6)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("test top-1 (%): dots seeds, diamonds means with 95 % intervals")
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)
