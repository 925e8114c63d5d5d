"""Figures of a sweep, from the table of its trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from nflab.analysis.figures.style import new_figure, save_figure
from nflab.analysis.statistics import Importance
from nflab.settings.search_space import setting

COLORS = {
    "finished": "C0",
    "pruned": "0.65",
    "diverged": "C3",
    "failed": "k",
    "interrupted": "C2",
}

MARKERS = {"finished": "o", "pruned": "v", "diverged": "X", "failed": "s", "interrupted": "P"}


def scatter_outcomes(
    axes: Axes, x: np.ndarray, y: np.ndarray, trials: pd.DataFrame, norm: Normalize
) -> None:
    """A mark for each trial by its outcome, coloured by validation top-1."""
    for outcome, marker in MARKERS.items():
        of_outcome = (trials.outcome == outcome).to_numpy()
        if of_outcome.any():
            axes.scatter(
                x[of_outcome],
                y[of_outcome],
                c=trials.val_top1[of_outcome].fillna(0),
                norm=norm,
                cmap="viridis",
                marker=marker,
                s=70,
                edgecolors="k",
                linewidths=0.6,
                label=f"{outcome} ({of_outcome.sum()})",
            )


def draw_top1(trials: pd.DataFrame, path: Path, title: str) -> None:
    """Validation top-1 over clipping x batch size; "none" stands right of the clippings."""
    figure, axes = new_figure(7.5, 4.6)
    clippings = [setting("clipping", text) for text in trials.clipping]
    finite = [c for c in clippings if c is not None]
    low, high = (min(finite), max(finite)) if finite else (0.01, 0.64)
    none_at = 2.2 * high
    x = np.array([none_at if c is None else c for c in clippings])
    batch_sizes = trials.batch_size.astype(int).to_numpy()
    steps = sorted(set(batch_sizes))
    # Trials of one batch size are spread a little so that none hides another.
    y = np.array([float(steps.index(size)) for size in batch_sizes])
    for at in set(y):
        of_size = np.flatnonzero(y == at)[np.argsort(x[y == at], kind="stable")]
        y[of_size] += np.resize([0.0, 0.22, -0.22], len(of_size))
    top1 = trials.val_top1 if "val_top1" in trials else pd.Series(np.nan, trials.index)
    best = np.nanmax(top1) if top1.notna().any() else 100.0
    scale = Normalize(min(50.0, best), 100)
    scatter_outcomes(axes, x, y, trials.assign(val_top1=top1), scale)
    if len(trials) <= 40:
        for xi, yi, value in zip(x, y, top1, strict=True):
            if np.isfinite(value):
                axes.annotate(
                    f"{value:.1f}",
                    (xi, yi),
                    (7, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, none_at * 1.7)
    ticks = [t for t in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64) if low / 1.5 <= t <= 1.2 * high]
    axes.set_xticks([*ticks, none_at], [*(f"{t:g}" for t in ticks), "none"])
    axes.minorticks_off()
    axes.set_yticks(range(len(steps)), [str(size) for size in steps])
    axes.set_ylim(-0.6, len(steps) - 0.4)
    axes.set_xlabel("AGC clipping threshold (weaker to the right)")
    axes.set_ylabel("batch size (images)")
    axes.set_title(title)
    figure.colorbar(
        ScalarMappable(scale, "viridis"), ax=axes, label="validation top-1 (%)", extend="min"
    )
    if len(trials):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=4, frameon=False)
    save_figure(figure, path)


def draw_importances(found: Mapping[str, Importance], path: Path, title: str) -> None:
    """Bars of how much of the variance in validation top-1 each setting explains."""
    figure, axes = new_figure(7.5, 1.2 + 0.5 * max(1, len(found)))
    names = list(found)[::-1]
    share = np.array([found[name].share for name in names])
    # The share of all trials may lie outside what most redrawn ones say.
    low = share - np.minimum(share, [found[name].low for name in names])
    high = np.maximum(share, [found[name].high for name in names]) - share
    labels = [name.replace("_", " ") for name in names]
    axes.barh(labels, share, xerr=[low, high] if names else None, ecolor="0.3", capsize=4)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the variance in validation top-1 (fANOVA; lines: 80 % interval)")
    axes.set_title(title)
    if not found:
        axes.text(0.5, 0.5, "too few different results", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
    save_figure(figure, path)


def draw_learning_curves(
    curves: Sequence[tuple[str, str, Sequence[tuple[int, float]]]], path: Path, title: str
) -> None:
    """Validation top-1 of every trial against the epoch.

    Args:
        curves: (label, outcome, [(epoch, top-1 in percent), ...]), the best first; it alone is
            named in the legend, the others by their outcome.
    """
    figure, axes = new_figure(7.5, 4.6)
    named: set[str] = set()
    for rank, (label, outcome, points) in enumerate(curves):
        if not points:
            continue
        epochs, values = zip(*points, strict=True)
        if rank == 0 and outcome == "finished":
            axes.plot(epochs, values, color="C1", lw=2.5, zorder=3, label=f"best: {label}")
            continue
        axes.plot(
            epochs,
            values,
            color=COLORS[outcome],
            lw=1,
            alpha=0.8,
            marker="." if len(points) == 1 else None,
            label=None if outcome in named else outcome,
        )
        named.add(outcome)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation top-1 (%)")
    axes.set_ylim(0, 102)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, frameon=False)
    save_figure(figure, path)
