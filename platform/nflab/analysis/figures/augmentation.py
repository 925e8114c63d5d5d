"""Figure of augmentation, step by step and by strength."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflab.analysis.figures.style import save_figure

_COLORS = {"NF": "C0", "batch norm": "C1"}


def draw_augmentation(cells: pd.DataFrame, steps: Sequence[str], title: str, path: Path) -> None:
    """Test top-1 along the ladder of augmentations, and against RandAugment's level alone.

    Args:
        cells: a row for each run: `network`, `step` (of the ladder, or empty), `mixup`, `cutmix`,
            `augmentation_level`, `test` (top-1 in percent), `outcome`.
        steps: the ladder's, in order.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    told = cells[cells.test.notna()]
    shift = -0.06
    for network, color in _COLORS.items():
        runs = told[told.network == network]
        ladder = runs[runs.step != ""]
        places = ladder.assign(at=ladder.step.map(list(steps).index).astype(float) + shift)
        _line(left, places, "at", color, network)
        alone = runs[~runs.mixup & ~runs.cutmix]
        _line(right, alone.assign(at=alone.augmentation_level + shift), "at", color, network)
        shift = -shift
    left.set_xticks(range(len(steps)), list(steps))
    left.set_title("the ladder, each step on top of the last", fontsize=10)
    left.set_ylabel("test top-1 (%)")
    right.set_xlabel("level of RandAugment, alone")
    right.set_title("strength", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
    figure.suptitle(f"{title}; lines: means, marks: seeds (x: diverged)")
    save_figure(figure, path)


def _line(axes: Axes, runs: pd.DataFrame, x: str, color: str, label: str) -> None:
    means = runs.groupby(x).test.mean()
    axes.plot(means.index, means, color=color, lw=2, label=label)
    for diverged, marker in ((False, "o"), (True, "x")):
        marked = runs[(runs.outcome == "diverged") == diverged]
        axes.scatter(marked[x], marked.test, color=color, marker=marker, s=24, alpha=0.7)
