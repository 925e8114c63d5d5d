"""The order of several results, the best first."""

from collections.abc import Sequence

import pandas as pd

from nflab.settings.objectives import DEFAULT, losses
from nflab.settings.outcomes import front, standing


def ranked(rows: pd.DataFrame, number: str, objectives: Sequence[str] = DEFAULT) -> pd.DataFrame:
    """Rows of runs in the order of `outcomes.standing`: those on the front, then others that
    finished, for they alone can be the best, and then the rest by their last result.

    Args:
        rows: with `outcome`, and `val_top1` where one has a result.
        number: column that decides between equals.
        objectives: what they are compared by.
    """
    top1 = rows.val_top1 if "val_top1" in rows else pd.Series(float("nan"), rows.index)
    unbeaten = on_front(rows, number, objectives)
    order = sorted(
        range(len(rows)),
        key=lambda at: (
            rows.outcome.iloc[at] != "finished",
            not unbeaten.iloc[at],
            standing(top1.fillna(-1.0).iloc[at], rows[number].iloc[at]),
        ),
    )
    return rows.iloc[order]


def on_front(rows: pd.DataFrame, number: str, objectives: Sequence[str]) -> pd.Series:
    """Which rows finished, and are beaten by no other (see `outcomes.beats`)."""
    finished = rows[rows.outcome == "finished"]
    if set(objectives) <= set(finished):
        finished = finished.dropna(subset=list(objectives))
    else:
        finished = finished[:0]
    found = front(
        {row[number]: (losses(row, objectives), row[number]) for _, row in finished.iterrows()}
    )
    return rows[number].isin(found) & (rows.outcome == "finished")
