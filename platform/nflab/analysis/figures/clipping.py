"""Figure of clipping against batch size (figure 2 of arXiv 2102.06171)."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflab.analysis.figures.style import save_figure

LINES = {"batch norm": ("C1", "s"), "NF, no clipping": ("C3", "v"), "NF + AGC": ("C0", "o")}


def draw_clipping(cells: pd.DataFrame, best: Mapping[int, float], title: str, path: Path) -> None:
    """(a) test top-1 against batch size; (b) against clipping, a line for each batch size.

    Args:
        cells: a row for each run: `network` ("NF" or "batch norm"), `batch_size`, `clipping`
            (infinite: none), `test` (top-1 in percent), `outcome`.
        best: batch size -> the clipping that is shown in (a).
    """
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(2, 1))
    for left, right in panels:
        _draw_networks(left, cells, best)
        _draw_clippings(right, cells)
    (left, right), (zoomed, below) = panels
    left.set_title("(a) networks", fontsize=10)
    right.set_title("(b) clipping, NF", fontsize=10)
    left.set_ylim(-3, 103)
    left.set_ylabel("test top-1 (%)")
    zoomed.set_ylabel("the same, nearer")
    top = cells.test.max() if cells.test.notna().any() else 100.0
    zoomed.set_ylim(top - 6, min(100.0, top) + 0.4)
    zoomed.set_xlabel("batch size (images); numbers: the clipping that does best on validation")
    below.set_xlabel("AGC clipping threshold (weaker to the right)")
    for axes in (left, right):
        axes.legend(loc="lower left")
    figure.suptitle(f"{title}; lines: means over seeds, marks: each (x: diverged)")
    save_figure(figure, path)


def _draw_networks(axes: Axes, cells: pd.DataFrame, best: Mapping[int, float]) -> None:
    nf = cells[cells.network == "NF"]
    clipped = nf[nf.clipping == nf.batch_size.map(best)]
    parts = {
        "batch norm": cells[cells.network == "batch norm"],
        "NF, no clipping": nf[np.isinf(nf.clipping)],
        "NF + AGC": clipped,
    }
    for label, runs in parts.items():
        if len(runs):
            color, marker = LINES[label]
            name = f"{label}, at its best clipping" if label == "NF + AGC" else label
            draw_means(axes, runs, "batch_size", color, marker, name)
    for size, mean in clipped.groupby("batch_size").test.mean().dropna().items():
        last = size == cells.batch_size.max()  # to its right is no room
        axes.annotate(
            f"{best[size]:g}",
            (size, mean),
            (-5 if last else 5, -11),
            textcoords="offset points",
            ha="right" if last else "left",
            color="C0",
            fontsize=8,
            annotation_clip=True,
        )
    sizes = sorted(cells.batch_size.unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _draw_clippings(axes: Axes, cells: pd.DataFrame) -> None:
    nf = cells[cells.network == "NF"]
    sizes = sorted(cells.batch_size.unique())
    finite = sorted(c for c in nf.clipping.unique() if np.isfinite(c))
    none_at = 2 * finite[-1] if finite else 1.0
    colors = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1.0, max(1, len(sizes))))
    for size, color in zip(sizes, colors, strict=True):
        runs = nf[nf.batch_size == size]
        if len(runs):
            placed = runs.assign(at=runs.clipping.replace(np.inf, none_at))
            draw_means(axes, placed, "at", color, "o", f"batch {size}")
    axes.set_xscale("log")
    axes.set_xticks([*finite, none_at], [*(f"{c:g}" for c in finite), "none"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_means(
    axes: Axes, runs: pd.DataFrame, x: str, color: object, marker: str, label: str
) -> None:
    """The mean over seeds as a line, and each seed as a mark."""
    runs = runs[runs.test.notna()]
    means = runs.groupby(x).test.mean()
    axes.plot(means.index, means, "-", color=color, lw=2, label=label, zorder=2)
    for diverged, sort in ((False, marker), (True, "x")):
        marked = runs[(runs.outcome == "diverged") == diverged]
        axes.scatter(marked[x], marked.test, color=color, marker=sort, s=26, alpha=0.75, zorder=3)
