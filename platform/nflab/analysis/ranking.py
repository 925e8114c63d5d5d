"""The order of several results, the best first."""

import pandas as pd

from nflab.settings.outcomes import standing


def ranked(rows: pd.DataFrame, number: str) -> pd.DataFrame:
    """Rows of runs in the order of `outcomes.standing`: those that finished, for they alone can be
    the best, and then the others by their last result.

    Args:
        rows: with `outcome`, and `val_top1` where one has a result.
        number: column that decides between equals.
    """
    top1 = rows.val_top1 if "val_top1" in rows else pd.Series(float("nan"), rows.index)
    order = sorted(
        range(len(rows)),
        key=lambda at: (
            rows.outcome.iloc[at] != "finished",
            standing(top1.fillna(-1.0).iloc[at], rows[number].iloc[at]),
        ),
    )
    return rows.iloc[order]
