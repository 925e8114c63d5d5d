"""Figure of what adaptive gradient clipping does to each layer over time."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nflab.analysis.figures.style import save_figure


def draw_agc(trace: pd.DataFrame, clipping: float, verdict: str, path: Path) -> None:
    """Heat maps of layers x steps: share of clipped units, median ratio of gradient norm to weight
    norm, and share of units whose weight norm stands at AGC's lower bound; empty where gradients
    were not finite.

    Args:
        trace: rows of `nflab.diagnostics.Diagnostics.pop`.
        verdict: in words, the title.
    """
    layers = list(dict.fromkeys(trace.layer))
    steps = sorted(trace.step.unique())
    figure = Figure(figsize=(14, 2.2 + 0.22 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    told = trace.assign(relative=(trace.q50 / clipping).clip(1e-3, 1e3))
    told.loc[~np.isfinite(told.q50), ["clipped", "at_floor"]] = np.nan
    ratio = {"norm": LogNorm(1e-2, 1e2), "cmap": "coolwarm"}
    shown: list[tuple[str, str, dict[str, Any]]] = [
        ("clipped", "share of units clipped", {"vmin": 0, "vmax": 1, "cmap": "magma"}),
        ("relative", "median of ||G|| / ||W||, over the clipping", ratio),
        ("at_floor", "share of units at the floor of ||W||", {"vmin": 0, "vmax": 1}),
    ]
    for axes, (column, label, scale) in zip(panels, shown, strict=True):
        values = told.pivot(index="layer", columns="step", values=column).loc[layers]
        # Edges, so that every step has its place on the axis though few are looked at.
        edges = np.append(steps, steps[-1] + (steps[1] - steps[0] if len(steps) > 1 else 1))
        mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), values, **scale)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        figure.colorbar(mesh, ax=axes)
    panels[0].set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
    panels[0].set_ylim(len(layers), 0)
    figure.suptitle(textwrap.fill(f"AGC {verdict}", 150), fontsize=11)
    save_figure(figure, path)
