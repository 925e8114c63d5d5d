"""What the runs of a sweep or grid cost, what pruning saved, and the budget that they keep."""

from collections.abc import Mapping

import numpy as np
import pandas as pd


class Budget:
    """What may be spent on the runs of a sweep or grid, and what has been spent."""

    def __init__(self, limit: float | None = None, spent: float = 0.0) -> None:
        """`limit` and `spent` are in USD; without a limit nothing is ever too much."""
        self.limit, self.spent = limit, spent

    def add(self, usd: float) -> None:
        """Something was spent."""
        self.spent += usd

    @property
    def reached(self) -> bool:
        """Whether no more may be spent."""
        return self.limit is not None and self.spent >= self.limit

    def __str__(self) -> str:
        limit = "no limit" if self.limit is None else money(self.limit)
        return f"the budget of {limit} is reached, with {money(self.spent)} spent"


def spent(runs: pd.DataFrame) -> float:
    """USD that runs have cost, as far as it is known.

    Args:
        runs: a row each (see `Tracker.children`).
    """
    return float(runs.cost_usd.sum()) if "cost_usd" in runs else 0.0


def totals(runs: pd.DataFrame, epochs: int | None = None) -> dict[str, float]:
    """What runs cost together, as metrics of their parent.

    Args:
        runs: a row each (see `Tracker.children`).
        epochs: of a trial that is not cut; None if none is ever cut.

    Returns:
        `seconds` of training; `pruning_saved_seconds`, those that pruned trials would have taken
        at their own pace; and both in USD, `cost_usd` and `pruning_saved_usd`, where a price was
        known.
    """
    names = {"seconds": "pruning_saved_seconds", "cost_usd": "pruning_saved_usd"}
    found = {}
    for name, saved in names.items():
        if name not in runs or runs[name].isna().all():
            continue
        found[name] = float(runs[name].sum())
        if epochs is not None:
            pruned = runs[(runs.outcome == "pruned") & (runs.epoch > 0)]
            left = epochs / pruned.epoch - 1
            found[saved] = float((pruned[name] * left).sum())
    return found


def sentences(total: Mapping[str, float]) -> list[str]:
    """`totals` in words; empty if nothing was trained."""
    if "seconds" not in total:
        return []
    told = f"All runs together trained for {duration(total['seconds'])}"
    if "cost_usd" in total:
        told += f" and cost {money(total['cost_usd'])} at the prices of nflab/prices.csv"
    found = [f"{told}."]
    if total.get("pruning_saved_seconds"):
        told = f"Pruning saved about {duration(total['pruning_saved_seconds'])}"
        if "pruning_saved_usd" in total:
            told += f" and {money(total['pruning_saved_usd'])}"
        found.append(f"{told}: the epochs that pruned trials did not run, at their own pace.")
    return found


def money(usd: float) -> str:
    """An amount of USD as people read it."""
    if usd >= 1:
        return f"{usd:.2f} USD"
    return f"{np.format_float_positional(usd, precision=2, fractional=False, trim='-')} USD"


def money_range(low: float, high: float) -> str:
    """Amounts of USD from `low` to `high`; one where they read the same."""
    return money(low) if money(low) == money(high) else f"{money(low)} to {money(high)}"


def duration(seconds: float) -> str:
    """A time as people read it."""
    unit, name = (1, "s") if seconds < 90 else (60, "min") if seconds < 5400 else (3600, "h")
    amount = seconds / unit
    return f"{amount:.1f} {name}" if amount < 10 else f"{amount:.0f} {name}"
