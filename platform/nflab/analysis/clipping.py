"""Clipping against batch size: the paper's figure 2."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, pairwise, product

import numpy as np
import pandas as pd

from nflab.analysis.figures.clipping import draw_clipping
from nflab.analysis.findings import Findings, is_baseline, summarise, top1, twin

VARIED = ("batch_size", "clipping")

PAPER = (
    "The paper (figure 2; ImageNet, 90 epochs): without clipping a normalizer-free ResNet "
    "collapses as the batch grows, with clipping it follows batch norm or beats it; larger batches "
    "need smaller clipping, and at small batches clipping matters little."
)

NEAR = 3.0
"""Points within which no clipping is as good as the best, at the smallest batch."""

COLLAPSE = 40.0
"""Points below the best clipping from which no clipping has collapsed, at the largest batch."""

TOLERANCE = 1.0
"""Points of validation within which a clipping is as good as the best."""


@dataclass(frozen=True)
class Statement:
    """One of the paper's findings, with what the runs say of it."""

    text: str
    holds: bool | None
    """None where the runs do not tell."""

    def __str__(self) -> str:
        said = {True: "holds", False: "FAILS", None: "cannot be told"}[self.holds]
        return f"{said}: {self.text}"


def prepare(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with settings as numbers: `clipping` is infinite for none; `network` is "NF" or
    "batch norm"; `val` and `test` are top-1 in percent."""
    return rows.assign(
        network=np.where(rows.model.map(is_baseline), "batch norm", "NF"),
        batch_size=rows.batch_size.astype(int),
        clipping=rows.clipping.replace("none", "inf").astype(float),
        val=top1(rows, "val"),
        test=top1(rows, "test"),
    )


def analyse(rows: pd.DataFrame, title: str) -> Findings:
    """Figure 2 and the three statements, from the rows of one group of cells (see `groups`)."""
    told = prepare(rows)
    table = summarise(told, ("network", "batch_size", "clipping"))
    table = table.sort_values(["network", "batch_size", "clipping"], kind="stable")
    statements = judge(table)
    return Findings(
        [str(statement) for statement in statements],
        table.reset_index(drop=True),
        {"clipping_vs_batch_size": partial(draw_clipping, told, best_clippings(table), title)},
    )


def best_clippings(table: pd.DataFrame) -> dict[int, float]:
    """Batch size -> the clipping whose mean validation top-1 is highest; of equals the largest."""
    clipped = _clipped(table)
    found = {}
    for batch_size, group in clipped.groupby("batch_size"):
        ordered = group.sort_values(["val_mean", "clipping"])
        found[int(batch_size)] = float(ordered.clipping.iloc[-1])
    return found


def judge(table: pd.DataFrame) -> list[Statement]:
    """Whether the paper's three findings hold in means over seeds; clipping is chosen on
    validation, accuracies are those of the test split. Where not all runs have a result, that is
    said first, and judged are the most batch sizes and clippings of which all have one.

    Args:
        table: of `summarise`, by network, batch size and clipping.
    """
    missing = incomplete(table)
    if missing:
        left = Statement(f"what needs runs that have no result: {missing}", None)
        rest = complete(table)
        return [left, *judge(rest)] if best_clippings(rest) else [left]
    best = best_clippings(table)
    if not best:
        return [Statement("no normalizer-free network was trained with clipping", None)]
    tested = table[table.network == "NF"].set_index(["batch_size", "clipping"]).test_mean
    small, large = min(best), max(best)

    def compare(batch_size: int) -> tuple[str, float]:
        of_best = tested[batch_size, best[batch_size]]
        of_none = tested.get((batch_size, np.inf), np.nan)
        said = (
            f"no clipping reaches {of_none:.1f} %, the best clipping "
            f"({best[batch_size]:g}) {of_best:.1f} %"
        )
        return said, of_best - of_none

    if small == large:
        return [Statement(f"there is one batch size only, {small}: {compare(small)[0]}", None)]

    def told(gap: float, holds: bool) -> bool | None:
        return None if np.isnan(gap) else holds

    said_small, gap_small = compare(small)
    said_large, gap_large = compare(large)
    widest = [(size, largest_good_clipping(table, size)) for size in sorted(best)]
    falls = all(b[1] <= a[1] for a, b in pairwise(widest))
    listed = ", ".join(f"{clipping:g} at {size}" for size, clipping in widest)
    return [
        Statement(
            f"at the smallest batch ({small}) clipping matters little: {said_small} "
            f"(at most {NEAR:g} points apart)",
            told(gap_small, gap_small <= NEAR),
        ),
        Statement(
            f"at the largest batch ({large}) no clipping has collapsed: {said_large} "
            f"(at least {COLLAPSE:g} points apart)",
            told(gap_large, gap_large >= COLLAPSE),
        ),
        Statement(
            f"the larger the batch, the smaller the clipping it needs: the largest clipping within "
            f"{TOLERANCE:g} point of the best on validation is {listed} (never rising)",
            falls if _clipped(table).clipping.nunique() > 1 else None,
        ),
    ]


def incomplete(table: pd.DataFrame) -> str:
    """The cells of the normalizer-free network that lack results, in words; empty if none does."""
    cells = table[table.network == "NF"].set_index(["batch_size", "clipping"])
    asked = product(sorted(cells.index.unique(0)), sorted(cells.index.unique(1)))
    lacking = [
        f"clipping {'none' if np.isinf(clipping) else f'{clipping:g}'} at {size}"
        for size, clipping in asked
        if (size, clipping) not in cells.index or cells.unfinished[size, clipping] > 0
    ]
    return ", ".join(lacking)


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the normalizer-free network with the most batch sizes and clippings of which all
    combinations have results; of equals the one with more batch sizes."""
    cells = table[(table.network == "NF") & (table.unfinished == 0)]
    sizes = {c: set(group.batch_size) for c, group in cells.groupby("clipping")}

    def clippings(chosen: Sequence[int]) -> list[float]:
        return [c for c, trained in sizes.items() if trained.issuperset(chosen)]

    found = sorted(cells.batch_size.unique())
    choices = chain.from_iterable(combinations(found, n) for n in range(len(found) + 1))
    chosen = max(choices, key=lambda some: (len(some) * len(clippings(some)), len(some)))
    return cells[cells.batch_size.isin(chosen) & cells.clipping.isin(clippings(chosen))]


def largest_good_clipping(table: pd.DataFrame, batch_size: int) -> float:
    """The largest clipping whose mean validation top-1 is within TOLERANCE of the best's."""
    clipped = _clipped(table)
    of_size = clipped[clipped.batch_size == batch_size]
    good = of_size[of_size.val_mean >= of_size.val_mean.max() - TOLERANCE]
    return float(good.clipping.max())


def _clipped(table: pd.DataFrame) -> pd.DataFrame:
    """Of the normalizer-free network, what was trained with clipping and has a result."""
    return table[(table.network == "NF") & np.isfinite(table.clipping) & (table.seeds > 0)]


def settings(
    model: str, batch_sizes: Sequence[int], clippings: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, object]]:
    """The cells of figure 2: what distinguishes each, the most telling first.

    The first seed of everything comes before the second of anything; of each seed the largest
    batch first, where the networks differ most, and which is also trained the soonest.
    """
    networks: list[dict[str, object]] = [
        {"model": model, "clipping": None},
        *({"model": model, "clipping": clipping} for clipping in dict.fromkeys(clippings)),
        {"model": twin(model), "clipping": None},
    ]
    return [
        {**network, "batch_size": batch_size, "seed": seed}
        for seed in seeds
        for batch_size in sorted(set(batch_sizes), reverse=True)
        for network in networks
    ]


def ranked(table: pd.DataFrame, model: str) -> list[dict[str, object]]:
    """Settings of the normalizer-free network, the best mean validation top-1 first; of equals the
    largest clipping, as in `best_clippings`."""
    ordered = table[table.network == "NF"].sort_values(["val_mean", "clipping"], ascending=False)
    return [
        {
            "model": model,
            "clipping": row.clipping if np.isfinite(row.clipping) else None,
            "batch_size": int(row.batch_size),
        }
        for row in ordered.itertuples()
    ]
