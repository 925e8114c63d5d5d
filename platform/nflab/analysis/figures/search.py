"""Figures of a search over any settings, from the table of its trials."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from nflab.analysis.figures.style import new_figure, save_figure
from nflab.analysis.figures.sweep import COLORS, MARKERS, scatter_outcomes
from nflab.settings.search_space import Scale, setting

_BEYOND = 0.12
"""Of an axis, the distance from the end of a range to none."""

_TICKS = 5

_COLUMNS = 3


class _Axis:
    """Where a setting's values stand on an axis."""

    def __init__(self, name: str, scale: Scale) -> None:
        self.name, self._scale = name, scale
        self._logarithmic = scale.spacing != "even"
        self.low, self.high = 0.0, float(len(scale.choices) - 1)
        if scale.low is not None and scale.high is not None:
            self.low, self.high = self._at(scale.low), self._at(scale.high)
        beyond = _BEYOND * (self.high - self.low)
        self._none = self.low - beyond if scale.none == "low" else self.high + beyond
        if scale.none == "low":
            self.low = self._none
        elif scale.none == "high":
            self.high = self._none
        # The names of choices need room.
        self.margin = 0.06 * (self.high - self.low) if scale.ordered else 0.4

    def _at(self, value: float) -> float:
        return math.log2(value) if self._logarithmic else float(value)

    def place(self, value: Any) -> float:
        """Of a value."""
        if not self._scale.ordered:
            return float(self._scale.choices.index(value))
        return self._none if value is None else self._at(value)

    def places(self, trials: pd.DataFrame) -> np.ndarray:
        """Of all trials."""
        return np.array([self.place(setting(self.name, text)) for text in trials[self.name]])

    def ticks(self) -> dict[float, str]:
        """Labels by place."""
        scale = self._scale
        if scale.low is None or scale.high is None or scale.spacing == "pow2":
            found = {self.place(value): _short(value) for value in scale.values()}
        else:
            found = {}
            for place in np.linspace(self._at(scale.low), self._at(scale.high), _TICKS):
                value = 2**place if self._logarithmic else place
                if isinstance(scale.low, int):
                    value = round(value)
                found[self._at(value)] = _short(value)
        if scale.none:
            found[self._none] = "none"
        return found


def draw_slices(trials: pd.DataFrame, scales: Mapping[str, Scale], path: Path, title: str) -> None:
    """Validation top-1 over each setting by itself, with marks by outcome."""
    columns = min(_COLUMNS, len(scales))
    rows = math.ceil(len(scales) / columns)
    figure, _ = new_figure(1.2 + 3.4 * columns, 1.2 + 2.9 * rows)
    figure.clear()
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    told = trials[trials.val_top1.notna()]
    for axes, (name, scale) in zip(grid.flat, scales.items(), strict=False):
        axis = _Axis(name, scale)
        x = axis.places(told)
        for outcome, marker in MARKERS.items():
            of_outcome = (told.outcome == outcome).to_numpy()
            axes.scatter(
                x[of_outcome],
                told.val_top1[of_outcome],
                c=COLORS[outcome],
                marker=marker,
                s=26,
                alpha=0.75,
                linewidths=0,
                label=outcome,
            )
        _show(axes, axis)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(scales) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("validation top-1 (%)")
    shown = [outcome for outcome in MARKERS if (told.outcome == outcome).any()]
    handles, labels = grid.flat[0].get_legend_handles_labels()
    kept = [n for n, label in enumerate(labels) if label in shown]
    figure.legend(
        [handles[n] for n in kept],
        [f"{labels[n]} ({(told.outcome == labels[n]).sum()})" for n in kept],
        loc="outside lower center",
        ncol=5,
        frameon=False,
    )
    figure.suptitle(title)
    save_figure(figure, path)


def draw_map(
    trials: pd.DataFrame, scales: Mapping[str, Scale], names: Sequence[str], path: Path, title: str
) -> None:
    """Validation top-1 over two settings.

    Args:
        names: of the two.
    """
    figure, axes = new_figure(7.5, 4.8)
    told = trials[trials.val_top1.notna()].sort_values("val_top1")
    across, up = (_Axis(name, scales[name]) for name in names)
    norm = _norm(told)
    scatter_outcomes(axes, across.places(told), up.places(told), told, norm)
    _show(axes, across)
    ticks = up.ticks()
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(*_limits(up))
    axes.set_ylabel(up.name.replace("_", " "))
    axes.set_title(title)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label="validation top-1 (%)")
    if len(told):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=4, frameon=False)
    save_figure(figure, path)


def draw_parallel(
    trials: pd.DataFrame, scales: Mapping[str, Scale], path: Path, title: str
) -> None:
    """A line a trial over all settings side by side, coloured by validation top-1.

    Args:
        trials: the best first.
    """
    figure, axes = new_figure(2.2 + 1.5 * len(scales), 4.8)
    told = trials[trials.val_top1.notna()][::-1]  # so that the best is drawn last
    norm = _norm(told)
    axis_of = [_Axis(name, scale) for name, scale in scales.items()]
    heights = np.array(
        [(a.places(told) - a.low) / ((a.high - a.low) or 1.0) for a in axis_of]
    ).reshape(len(axis_of), -1)
    colors = ScalarMappable(norm, "viridis").to_rgba(told.val_top1.to_numpy(dtype=float))
    for n in range(len(told)):
        last = n == len(told) - 1 and told.outcome.iloc[n] == "finished"
        axes.plot(
            range(len(axis_of)),
            heights[:, n],
            color="C3" if last else colors[n],
            lw=2.5 if last else 0.9,
            alpha=1.0 if last else 0.7,
            label="best" if last else None,
        )
    for place, axis in enumerate(axis_of):
        axes.axvline(place, color="0.4", lw=0.8)
        for at, label in axis.ticks().items():
            height = (at - axis.low) / ((axis.high - axis.low) or 1.0)
            axes.annotate(
                label,
                (place, height),
                (3, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
                bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
            )
    axes.set_xticks(
        range(len(axis_of)), [axis.name.replace("_", "\n") for axis in axis_of], fontsize=8
    )
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(axis_of) - 0.6)
    axes.set_title(title)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label="validation top-1 (%)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save_figure(figure, path)


def _show(axes: Axes, axis: _Axis) -> None:
    ticks = axis.ticks()
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_xlim(*_limits(axis))
    axes.set_xlabel(axis.name.replace("_", " "))


def _limits(axis: _Axis) -> tuple[float, float]:
    return axis.low - axis.margin, axis.high + axis.margin


def _norm(told: pd.DataFrame) -> Normalize:
    """Colours for the better half of what was reached; the rest is as dark as its worst."""
    if told.empty:
        return Normalize(0, 100)
    best = float(told.val_top1.max())
    return Normalize(min(float(told.val_top1.median()), best - 1e-6), best)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.2g}" if isinstance(value, float) else str(value)
