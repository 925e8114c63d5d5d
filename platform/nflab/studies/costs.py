"""What the runs of a sweep or grid cost, what pruning saved, and on what they ran."""

from collections.abc import Mapping, Sequence

import pandas as pd

from nflab.terminal.wording import duration, money


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


def cost_sentences(total: Mapping[str, float], unpriced: Sequence[str] = ()) -> list[str]:
    """`totals` in words, and `cluster_usd` if it is there; empty if there is nothing to tell.

    Args:
        unpriced: what of the cluster has no price.
    """
    found = _training_sentences(total)
    if "cluster_usd" in total:
        usd = f"{'at least ' if unpriced else ''}{money(total['cluster_usd'])}"
        told = f"The whole cluster cost {usd} meanwhile, its head, disks, start and waiting too"
        if unpriced:
            told += f": there is no price of {' and '.join(unpriced)}"
        found.append(f"{told}.")
    return found


def _training_sentences(total: Mapping[str, float]) -> list[str]:
    if "seconds" not in total:
        return []
    told = f"All runs together trained for {duration(total['seconds'])}"
    if "cost_usd" in total:
        told += f" and cost {money(total['cost_usd'])} at the prices of nflab/cluster/prices.csv"
    found = [f"{told}."]
    if total.get("pruning_saved_seconds"):
        told = f"Pruning saved about {duration(total['pruning_saved_seconds'])}"
        if "pruning_saved_usd" in total:
            told += f" and {money(total['pruning_saved_usd'])}"
        found.append(f"{told}: the epochs that pruned trials did not run, at their own pace.")
    return found


def gpu_sentences(runs: pd.DataFrame) -> list[str]:
    """That runs trained on several kinds of GPU; nothing if they did not.

    Args:
        runs: a row each (see `Tracker.children`).
    """
    counts = runs.gpu.dropna().value_counts()
    if len(counts) < 2:
        return []
    told = "; ".join(f"{count} on {gpu}" for gpu, count in counts.items())
    return [f"The runs trained on several kinds of GPU, whose rounding may differ: {told}."]
