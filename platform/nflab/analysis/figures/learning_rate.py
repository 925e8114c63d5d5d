"""Figure of top-1 over the learning rate."""

import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from nflab.analysis.figures.clipping import LINES, draw_means
from nflab.analysis.figures.style import save_figure


def draw_learning_rate(cells: pd.DataFrame, title: str, path: Path) -> None:
    """Test top-1 over the base learning rate, a panel for each batch size.

    Args:
        cells: a row for each run: `network` ("NF" or "batch norm"), `line` (its label),
            `batch_size`, `base_learning_rate`, `test` (top-1 in percent), `outcome`.
    """
    sizes = sorted(cells.batch_size.unique())
    figure = Figure(figsize=(2 + 4.5 * len(sizes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    rates = sorted(cells.base_learning_rate.unique())
    for axes, size in zip(panels, sizes, strict=True):
        for line, runs in cells[cells.batch_size == size].groupby("line"):
            kind = {"batch norm": "batch norm", "no clipping": "NF, no clipping"}
            color, marker = LINES[kind.get(str(line), "NF + AGC")]
            label = str(line) if line == "batch norm" else f"NF, {line}"
            draw_means(axes, runs, "base_learning_rate", color, marker, label)
        axes.set_title(f"batch {size}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("base learning rate (for 256 images; the peak grows with the batch)")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylim(-3, 103)
    panels[0].set_ylabel("test top-1 (%)")
    title = f"{title}; lines: means over seeds, marks: each (x: diverged)"
    figure.suptitle(textwrap.fill(title, 65 * len(sizes)))
    save_figure(figure, path)
