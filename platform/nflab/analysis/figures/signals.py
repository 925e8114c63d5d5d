"""Signal propagation plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nflab.analysis.figures.style import save_figure
from nfnet import BlockSignal


def draw_signals(signals: Mapping[str, Sequence[BlockSignal]], path: Path) -> None:
    """Signal propagation plots: statistics at every block, a column for each network.

    Args:
        signals: title -> what `nfnet.signal_propagation` measured.
    """
    figure = Figure(figsize=(4.4 * len(signals), 7.2), layout="constrained")
    axes = figure.subplots(3, len(signals), sharex="col", squeeze=False)
    rows = (
        ("squared_mean", "average channel\nsquared mean"),
        ("variance", "average channel\nvariance"),
        ("residual_variance", "residual average\nchannel variance"),
    )
    for column, (title, blocks) in enumerate(signals.items()):
        numbers = range(1, len(blocks) + 1)
        stages = [block.name.split(".")[1] for block in blocks]
        for row, (statistic, label) in enumerate(rows):
            ax = axes[row, column]
            ax.plot(numbers, [getattr(b, statistic) for b in blocks], "o-", ms=3, label="measured")
            for number, (stage, previous) in enumerate(zip(stages[1:], stages, strict=False)):
                if stage != previous:
                    ax.axvline(number + 1.5, color="0.8", lw=0.8)
            ax.grid(alpha=0.3, axis="y")
            if column == 0:
                ax.set_ylabel(label)
        expected = [block.expected_variance for block in blocks]
        if None not in expected:
            axes[1, column].plot(numbers, expected, "k:", lw=1.2, label="theory (1 / beta²)")
        axes[1, column].legend(fontsize=8)
        axes[0, column].set_title(title)
        axes[2, column].set_xlabel("block (lines: stages)")
        for row in range(3):
            axes[row, column].set_ylim(bottom=0)
    save_figure(figure, path)
