"""What settings reach over their seeds, as metrics of the run whose cells repeat them."""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from nflab.analysis.findings import top1
from nflab.analysis.statistics import Estimate, estimate
from nflab.settings.outcomes import DONE
from nflab.terminal.wording import describe

_SPLITS = ("val", "test")


def over_seeds(
    settings: Sequence[dict[str, Any]], rows: pd.DataFrame, prefix: str = ""
) -> dict[str, float]:
    """Mean, sample standard deviation and count of top-1 in percent over the seeds of each setting
    that has a result; one that diverged counts as 0, one that failed not at all.

    Args:
        settings: of each cell that which distinguishes it, with its seed.
        rows: of the same cells, in this order.
        prefix: begins the words of each setting.

    Returns:
        `val_top1_mean`, `val_top1_sd` (NaN for one seed), `val_top1_count`, and the same of `test`:
        of the settings with the best mean on validation among those with the most seeds; and, where
        several are compared, of each below its own words, as `val_top1_mean/clipping 0.08`.
    """
    done = rows.reset_index(drop=True)
    done = done.assign(val=top1(done, "val"), test=top1(done, "test"))
    members: dict[str, list[int]] = {}
    words: dict[str, str] = {}
    for place, one in enumerate(settings):
        apart = {name: value for name, value in one.items() if name != "seed"}
        key = repr(sorted(apart.items()))
        members.setdefault(key, []).append(place)
        words.setdefault(key, describe(apart))
    found: dict[str, dict[str, Estimate]] = {}
    for key, places in members.items():
        group = done.loc[places]
        group = group[group.outcome.isin(DONE)].drop_duplicates("cell")
        if len(group):
            found[key] = {split: estimate(group[split].tolist()) for split in _SPLITS}
    if not found:
        return {}
    best = max(found, key=lambda key: (found[key]["val"].count, found[key]["val"].mean))
    told = _metrics(found[best], "")
    if len(members) > 1:
        for key, label in zip(found, _labels([words[key] for key in found]), strict=True):
            told |= _metrics(found[key], f"/{prefix}{label}")
    return told


def _metrics(found: dict[str, Estimate], below: str) -> dict[str, float]:
    return {
        f"{split}_top1_{name}{below}": value
        for split, of in found.items()
        for name, value in (("mean", of.mean), ("sd", of.std), ("count", float(of.count)))
    }


def _labels(words: Sequence[str]) -> list[str]:
    """Words as MLflow's metrics may be called, no two alike."""
    labels: list[str] = []
    for text in words:
        label = re.sub(r"[^\w.: -]+", " ", text).replace("  ", " ")[:200].strip() or "as given"
        like = sum(re.sub(r" number \d+$", "", other) == label for other in labels)
        labels.append(label if not like else f"{label} number {like + 1}")
    return labels
