"""Figure of what pre-training gives networks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nflab.analysis.figures.style import save_figure

Curve = Sequence[tuple[int, float]]


def draw_transfer(
    curves: Mapping[tuple[str, str], Sequence[Curve]],
    test_top1: Mapping[tuple[str, str], Sequence[float]],
    path: Path,
    title: str,
) -> None:
    """Learning curves, and test top-1 at their end, of networks with and without pre-training.

    Args:
        curves: (network, start) -> for each seed [(epoch, validation top-1 in percent), ...].
        test_top1: (network, start) -> for each seed the test top-1 in percent.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    networks = list(dict.fromkeys(network for network, _ in test_top1))
    starts = list(dict.fromkeys(start for _, start in test_top1))
    for (network, start), of_seeds in curves.items():
        color = f"C{networks.index(network)}"
        line = ("-", "--")[starts.index(start)]
        epochs = sorted({epoch for curve in of_seeds for epoch, _ in curve})
        values = [[dict(curve).get(epoch, np.nan) for curve in of_seeds] for epoch in epochs]
        left.plot(
            epochs, np.nanmean(values, axis=1), line, color=color, label=f"{network}, {start}"
        )
        left.fill_between(
            epochs, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color=color, alpha=0.15
        )
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("epoch")
    left.set_ylabel("validation top-1 (%)")
    left.set_title("mean and range over seeds", fontsize=10)
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    for (network, start), ended in test_top1.items():
        n, s = networks.index(network), starts.index(start)
        x = s + (n - (len(networks) - 1) / 2) * 0.3
        # Seeds a little apart, so that none hides another.
        spread = np.linspace(-0.06, 0.06, len(ended)) if len(ended) > 1 else np.zeros(len(ended))
        right.plot(
            np.add(x, spread),
            ended,
            "o",
            color=f"C{n}",
            ms=5,
            alpha=0.7,
            label=network if s == 0 else None,
        )
        if ended:
            right.hlines(float(np.mean(ended)), x - 0.12, x + 0.12, color=f"C{n}", lw=2)
    right.set_xticks(range(len(starts)), starts)
    right.set_xlim(-0.5, len(starts) - 0.5)
    right.set_ylabel("test top-1 (%)")
    right.set_title("each seed, and their mean", fontsize=10)
    right.grid(alpha=0.3, axis="y")
    right.legend(loc="best")
    figure.suptitle(title)
    save_figure(figure, path)
