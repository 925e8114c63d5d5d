"""Figure of clipping against batch size (figure 2 of arXiv 2102.06171)."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflab.figures.style import save_figure

_LINES = {"batch norm": ("C1", "s"), "NF, no clipping": ("C3", "v"), "NF + AGC": ("C0", "o")}


def draw_clipping(cells: pd.DataFrame, best: Mapping[int, float], title: str, path: Path) -> None:
    """(a) test top-1 against batch size; (b) against clipping, a line for each batch size.

    Args:
        cells: a row for each run: `network` ("NF" or "batch norm"), `batch_size`, `clipping`
            (infinite: none), `test` (top-1 in percent), `outcome`.
        best: batch size -> the clipping that is shown in (a).
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    nf = cells[cells.network == "NF"]
    chosen = nf.clipping == nf.batch_size.map(best)
    parts = {
        "batch norm": cells[cells.network == "batch norm"],
        "NF, no clipping": nf[np.isinf(nf.clipping)],
        "NF + AGC": nf[chosen],
    }
    for label, runs in parts.items():
        if len(runs):
            color, marker = _LINES[label]
            name = f"{label}, at its best clipping" if label == "NF + AGC" else label
            _line(left, runs, "batch_size", color, marker, name)
    sizes = sorted(cells.batch_size.unique())
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.minorticks_off()
    left.set_xlabel("batch size (images)")
    left.set_ylabel("test top-1 (%)")
    left.set_ylim(-3, 103)
    left.set_title("(a) networks", fontsize=10)
    left.legend(loc="lower left")
    left.grid(alpha=0.3)

    finite = sorted(c for c in nf.clipping.unique() if np.isfinite(c))
    none_at = 2 * finite[-1] if finite else 1.0
    colors = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1.0, max(1, len(sizes))))
    for size, color in zip(sizes, colors, strict=True):
        runs = nf[nf.batch_size == size]
        if len(runs):
            placed = runs.assign(at=runs.clipping.replace(np.inf, none_at))
            _line(right, placed, "at", color, "o", f"batch {size}")
    right.set_xscale("log")
    right.set_xticks([*finite, none_at], [*(f"{c:g}" for c in finite), "none"])
    right.minorticks_off()
    right.set_xlabel("AGC clipping threshold (weaker to the right)")
    right.set_title("(b) clipping, NF", fontsize=10)
    right.legend(loc="lower left")
    right.grid(alpha=0.3)
    seeds = cells.seed.nunique()
    figure.suptitle(f"{title}; lines: means of {seeds} seeds, marks: each (x: diverged)")
    save_figure(figure, path)


def _line(axes: Axes, runs: pd.DataFrame, x: str, color: object, marker: str, label: str) -> None:
    """The mean over seeds as a line, and each seed as a mark."""
    runs = runs[runs.test.notna()]
    means = runs.groupby(x).test.mean()
    axes.plot(means.index, means, "-", color=color, lw=2, label=label, zorder=2)
    for diverged, sort in ((False, marker), (True, "x")):
        marked = runs[(runs.outcome == "diverged") == diverged]
        axes.scatter(marked[x], marked.test, color=color, marker=sort, s=26, alpha=0.75, zorder=3)
