"""Figure of a search with several aims: the trials that no other beats."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nflab.analysis.figures.style import new_figure, save_figure
from nflab.settings.objectives import OBJECTIVES

_COLUMNS = 3

_NAMED = 12
"""So many trials of a front are named by their numbers."""

_DECADE = 10.0


def draw_front(
    trials: pd.DataFrame,
    objectives: Sequence[str],
    path: Path,
    title: str,
    repeated: Mapping[str, pd.DataFrame] | None = None,
) -> None:
    """Every two aims against each other, a mark for each trial that finished, but for poor ones,
    whose number is told; those on the front stand out, and of two aims are joined.

    Args:
        trials: with `number`, `outcome`, `front` (whether no other beats it) and the aims.
        repeated: label -> a row for each fresh seed with which a setting was repeated.
    """
    pairs = list(combinations(objectives, 2))
    columns = min(_COLUMNS, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure, _ = new_figure(max(7.0, 1.0 + 4.2 * columns), 1.2 + 3.6 * rows)
    figure.clear()
    grid = figure.subplots(rows, columns, squeeze=False)
    done = trials[trials.outcome == "finished"]
    for axes, (up, across) in zip(grid.flat, pairs, strict=False):
        _draw_pair(axes, done, up, across, joined=len(objectives) == 2)
        means = [
            _draw_seeds(axes, seeds, up, across, label, "0.35" if place == 0 else f"C{place + 1}")
            for place, (label, seeds) in enumerate((repeated or {}).items())
        ]
        low, high = _limits(axes.get_ylim(), done, up, [y for _, y in filter(None, means)])
        axes.set_ylim(low, high)
        outside = int((~done[up].dropna().between(low, high)).sum())
        if outside:
            axes.set_title(f"{outside} beaten trials lie outside", fontsize=8)
        axes.set_xlabel(OBJECTIVES[across].words)
        axes.set_ylabel(OBJECTIVES[up].words)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(pairs) :]:
        axes.set_visible(False)
    left = len(trials) - len(done)
    told = f"{title}\n{left} of {len(trials)} trials did not finish" if left else title
    figure.suptitle(told, fontsize=11)
    figure.legend(
        *grid.flat[0].get_legend_handles_labels(),
        loc="outside lower center",
        frameon=False,
        fontsize=8,
    )
    save_figure(figure, path)


def _draw_pair(axes: Axes, done: pd.DataFrame, up: str, across: str, joined: bool) -> None:
    front, others = done[done.front], done[~done.front]
    axes.scatter(others[across], others[up], s=28, color="0.65", label="beaten", zorder=2)
    axes.scatter(
        front[across],
        front[up],
        s=60,
        color="C1",
        edgecolors="k",
        linewidths=0.6,
        zorder=4,
        label="on the front: none is better in one aim and as good in the others",
    )
    if joined and len(front) > 1:
        ordered = front.sort_values([across, up])
        # What is reached up to a place: as good in the one aim, whatever more of the other.
        minimized = OBJECTIVES[across].direction == "minimize"
        style = "steps-post" if minimized else "steps-pre"
        axes.plot(ordered[across], ordered[up], drawstyle=style, color="C1", lw=1, zorder=3)
    if len(front) <= _NAMED:
        for _, row in front.iterrows():
            axes.annotate(
                str(row.number),
                (row[across], row[up]),
                (5, 5),
                textcoords="offset points",
                fontsize=7,
            )
    values = done[across].dropna()
    if len(values) and values.min() > 0 and values.max() > _DECADE * values.min():
        axes.set_xscale("log")


def _draw_seeds(
    axes: Axes, seeds: pd.DataFrame, up: str, across: str, label: str, color: str
) -> tuple[float, float] | None:
    """Mean and deviation over seeds, of those that finished; returns the mean's place."""
    told = seeds[seeds.outcome == "finished"]
    if not {up, across} <= set(told) or not len(told):
        return None
    x, y = told[across].to_numpy(dtype=float), told[up].to_numpy(dtype=float)
    spread = {} if len(told) < 2 else {"xerr": np.std(x, ddof=1), "yerr": np.std(y, ddof=1)}
    axes.errorbar(
        x.mean(),
        y.mean(),
        **spread,
        fmt="D",
        ms=5,
        color=color,
        capsize=3,
        lw=1,
        zorder=5,
        label=f"{label}: mean and deviation of {len(told)} seeds",
    )
    return float(x.mean()), float(y.mean())


def _limits(
    whole: tuple[float, float], done: pd.DataFrame, name: str, more: Sequence[float]
) -> tuple[float, float]:
    """Of an axis that shows the better half, the front and `more`; poor trials would flatten it."""
    if not len(done):
        return whole
    shown = [done[name].median(), *done[name][done.front], *more]
    room = 0.08 * (max(shown) - min(shown)) or 1.0
    if OBJECTIVES[name].direction == "maximize":
        return max(whole[0], min(shown) - room), max(shown) + room
    return min(shown) - room, min(whole[1], max(shown) + room)
