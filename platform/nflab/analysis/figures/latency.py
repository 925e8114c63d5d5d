"""Accuracy over the time of a training step."""

from collections.abc import Mapping
from pathlib import Path

from nflab.analysis.figures.style import new_figure, save_figure


def draw_latency(
    seconds: Mapping[str, float],
    published: Mapping[str, Mapping[str, float]],
    where: str,
    path: Path,
) -> None:
    """One line a family, a mark a model; models without a published accuracy are left out.

    Args:
        seconds: model -> seconds of a step.
        published: family -> model -> top-1 on ImageNet in percent.
        where: what it was measured on, for the axis.
    """
    figure, axes = new_figure(6.4, 4.2)
    for family, top1 in published.items():
        known = [name for name in top1 if name in seconds]
        if not known:
            continue
        x, y = [seconds[name] for name in known], [top1[name] for name in known]
        axes.plot(x, y, "o-", label=family)
        for name, place in zip(known, zip(x, y, strict=True), strict=True):
            short = name.rpartition("_")[2].upper()
            axes.annotate(short, place, (4, -11), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds of a training step ({where})")
    axes.set_ylabel("published top-1 on ImageNet (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)
