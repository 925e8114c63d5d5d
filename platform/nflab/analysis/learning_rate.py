"""Top-1 over the learning rate: does a network without clipping survive with a smaller one?"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from nflab.analysis import clipping
from nflab.analysis.figures.learning_rate import draw_learning_rate
from nflab.analysis.findings import Findings, summarise, twin

VARIED = ("base_learning_rate", *clipping.VARIED)

PAPER = (
    "The paper does not ask this. It trains all batch sizes with the learning rate of the linear "
    "rule, 0.1 for 256 images (section 4.1)."
)


def settings(
    model: str,
    clippings: Mapping[int, float],
    base_learning_rates: Sequence[float],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """The cells: at each batch size no clipping, one clipping, and the batch-normalised twin.

    Args:
        clippings: batch size -> clipping.
    """
    return [
        {
            "model": name,
            "clipping": threshold,
            "batch_size": batch_size,
            "base_learning_rate": rate,
            "seed": seed,
        }
        for seed in seeds
        for batch_size, chosen in sorted(clippings.items(), reverse=True)
        for rate in sorted(set(base_learning_rates))
        for name, threshold in ((model, None), (model, chosen), (twin(model), None))
    ]


def prepare(rows: pd.DataFrame) -> pd.DataFrame:
    """As `clipping.prepare`; `line` is "no clipping", "clipping 0.02" or "batch norm"."""
    told = clipping.prepare(rows)
    told = told.assign(base_learning_rate=told.base_learning_rate.astype(float))
    clipped = told.clipping.map(lambda c: "no clipping" if np.isinf(c) else f"clipping {c:g}")
    return told.assign(line=clipped.where(told.network == "NF", told.network))


def analyse(rows: pd.DataFrame, title: str) -> Findings:
    """What each network reaches at the rate that does best on validation, and how much of the
    best clipping's accuracy no clipping reaches at any rate; accuracies are of the test split."""
    told = prepare(rows)
    table = summarise(told, ("batch_size", "line", "base_learning_rate"))
    by = ["batch_size", "line", "base_learning_rate"]
    table = table.sort_values(by, kind="stable").reset_index(drop=True)
    lines = []
    for batch_size, group in table[table.seeds > 0].groupby("batch_size"):
        best = {str(line): _best(runs) for line, runs in group.groupby("line", sort=False)}
        reached = [
            f"{line} {row.test_mean:.1f} % (at {row.base_learning_rate:g})"
            for line, row in best.items()
        ]
        lines.append(f"batch {batch_size}, each at its best base rate: {', '.join(reached)}")
        none = best.pop("no clipping", None)
        clipped = [row.test_mean for line, row in best.items() if line != "batch norm"]
        if none is not None and clipped:
            behind = max(clipped) - none.test_mean
            lines.append(
                f"batch {batch_size}: without clipping the network learns up to a base rate of "
                f"{_largest(group)}; at its best rate it is {abs(behind):.1f} points "
                f"{'below' if behind > 0 else 'above'} that with clipping"
            )
    drawing = partial(draw_learning_rate, told, title)
    return Findings(lines, table, {"learning_rate": drawing})


NEAR = 10.0
"""Points below its best within which a network still learns."""


def _best(runs: pd.DataFrame) -> Any:
    """The row whose mean validation top-1 is highest; of equals the smallest rate."""
    return runs.loc[runs.val_mean.idxmax()]


def _largest(group: pd.DataFrame) -> str:
    """The largest rate at which the network without clipping is within NEAR of its best."""
    runs = group[group.line == "no clipping"]
    good = runs[runs.val_mean >= runs.val_mean.max() - NEAR]
    return f"{good.base_learning_rate.max():g}"
