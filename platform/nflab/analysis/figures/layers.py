"""Figure of which layers to clip."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nflab.analysis.figures.style import save_figure
from nflab.analysis.statistics import Estimate


def draw_layers(
    cells: pd.DataFrame,
    parts: Sequence[str],
    effects: Mapping[str, Estimate],
    title: str,
    path: Path,
) -> None:
    """Test top-1 of every subset of clipped parts, the best first, over a matrix that says which
    parts they are; beside it what clipping each part gives on average.

    Args:
        cells: a row for each run: `clipped` (the subset's name), a column of truth for each part,
            `test` (top-1 in percent), `outcome`.
        effects: part -> mean difference in points between otherwise equal runs.
    """
    told = cells[cells.test.notna()]
    means = told.groupby("clipped").test.mean().sort_values(ascending=False)
    place = {name: x for x, name in enumerate(means.index)}
    figure = Figure(figsize=(12.5, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1.5), height_ratios=(3, 1.3))
    top, matrix = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[:, 1])
    colors = {True: "C3", False: "C0"}
    for head in (False, True):
        runs = told[told["head"] == head]
        label = "head clipped too" if head else "head not clipped"
        x = runs.clipped.map(place)
        for diverged, marker in ((False, "o"), (True, "x")):
            marked = (runs.outcome == "diverged") == diverged
            top.scatter(
                x[marked], runs.test[marked], s=16, color=colors[head], alpha=0.5, marker=marker
            )
        subsets = list(dict.fromkeys(runs.clipped))
        at = [place[name] for name in subsets]
        top.scatter(at, means[subsets], marker="_", s=160, lw=2.5, color=colors[head], label=label)
    top.set_ylabel("test top-1 (%)")
    top.set_ylim(-3, 103)
    top.set_xticks([])
    top.set_xlim(-0.7, len(means) - 0.3)
    top.grid(alpha=0.3, axis="y")
    top.legend(loc="lower left")
    top.set_title("every subset: dots seeds (x: diverged), bars means", fontsize=10)
    first = told.drop_duplicates("clipped").set_index("clipped")
    for name, x in place.items():
        for y, part in enumerate(parts):
            clipped = bool(first.loc[name, part])
            color = colors[part == "head"] if clipped else "0.9"
            matrix.scatter(x, y, s=42, color=color)
    matrix.set_yticks(range(len(parts)), list(parts))
    matrix.set_ylim(len(parts) - 0.5, -0.5)
    matrix.set_xlim(-0.7, len(means) - 0.3)
    matrix.set_xticks([])
    matrix.set_xlabel("clipped parts of each subset (filled), the best subset at the left")
    shown = [part for part in parts if part in effects]
    for y, part in enumerate(shown):
        effect = effects[part]
        if np.isfinite(effect.low):
            right.plot([effect.low, effect.high], [y, y], color=colors[part == "head"], lw=2)
        right.plot(effect.mean, y, "o", color=colors[part == "head"], ms=7)
    right.axvline(0, color="0.4", lw=1)
    right.set_yticks(range(len(shown)), shown)
    right.set_ylim(len(shown) - 0.5, -0.5)
    right.set_xlabel("points of test top-1 that clipping gives")
    right.set_xlim(-100, 100)
    right.set_title("mean over all pairs of runs (line:\n95 % interval over seeds)", fontsize=10)
    right.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    save_figure(figure, path)
