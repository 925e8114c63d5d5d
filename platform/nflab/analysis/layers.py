"""Which layers to clip: every subset of the stem, the stages and the head."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, combinations
from typing import Any

import pandas as pd
import torch

import nfnet
from nflab.analysis.figures.layers import draw_layers
from nflab.analysis.findings import Findings, summarise, top1
from nflab.analysis.statistics import estimate, verdict
from nflab.settings.errors import ConfigError

VARIED = ("unclipped",)

NEGLIGIBLE = 1.0
"""Points that clipping a part must not give where the paper says it need not be clipped."""

PAPER = (
    "The paper (section 4.2; ImageNet, batch 4096, clipping 0.01): never clip the final linear "
    "layer; the first convolution may go unclipped; all four stages must be clipped."
)


def parts_of(model: str) -> tuple[str, ...]:
    """What of a network may be clipped or not: the stem, each stage and the head."""
    with torch.device("meta"):
        parameters = nfnet.create_model(model).named_parameters()
    names = dict.fromkeys(nfnet.layer_group(name) for name, _ in parameters)
    return tuple(name for name in names if name != "final_conv")


def read_subset(text: str, parts: Sequence[str]) -> frozenset[str]:
    """A set of clipped parts, written as `stem+stage1` or `none`.

    Raises:
        ConfigError: a part is not among `parts`.
    """
    names = frozenset() if text == "none" else frozenset(text.split("+"))
    unknown = sorted(names - set(parts))
    if unknown:
        raise ConfigError(f"unknown part {unknown[0]!r} in {text!r}: join {', '.join(parts)} by +")
    return names


def every_subset(parts: Sequence[str]) -> list[frozenset[str]]:
    """All sets of parts, the most telling first: near to all parts but the head, then farther."""
    usual = frozenset(parts) - {"head"}
    subsets = chain.from_iterable(combinations(parts, n) for n in range(len(parts) + 1))
    return sorted(map(frozenset, subsets), key=lambda subset: len(subset ^ usual))


def settings(
    parts: Sequence[str], subsets: Iterable[frozenset[str]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """The cells: what each leaves unclipped."""
    subsets = list(dict.fromkeys(subsets))
    return [
        {"unclipped": tuple(part for part in parts if part not in subset), "seed": seed}
        for seed in seeds
        for subset in subsets
    ]


def prepare(rows: pd.DataFrame, parts: Sequence[str]) -> pd.DataFrame:
    """The rows with `clipped`, what is clipped as text, a column of truth for each part, and
    `test`, top-1 in percent."""
    left = [set(text.split()) for text in rows.unclipped]
    told = rows.assign(
        clipped=["+".join(p for p in parts if p not in out) or "none" for out in left],
        test=top1(rows, "test"),
        val=top1(rows, "val"),
    )
    return told.assign(**{part: [part not in out for out in left] for part in parts})


def analyse(rows: pd.DataFrame, title: str) -> Findings:
    """What clipping each part gives, and whether the paper's findings hold, from the rows of one
    network's cells."""
    parts = parts_of(rows.model.iloc[0])
    told = prepare(rows, parts)
    table = summarise(told, ("clipped",)).sort_values("test_mean", ascending=False, kind="stable")
    stages = [part for part in parts if part.startswith("stage")]
    rest = told[told[stages].all(axis=1)]
    line = partial(_line, len(stages) + 2)
    lines = [
        *line(
            "never clip the final linear layer",
            "clipping it too, where all stages are clipped,",
            rest,
            parts,
            "head",
            -1,
        ),
        *line(
            "the first convolution may go unclipped",
            "clipping it too, where all stages are clipped and the head is not,",
            rest[~rest["head"]],
            parts,
            "stem",
            0,
        ),
    ]
    for stage in stages:
        others = [part for part in stages if part != stage]
        among = told[told[others].all(axis=1) & ~told["head"]]
        what = "clipping it too, where all other stages are clipped and the head is not,"
        lines += line(f"{stage} must be clipped", what, among, parts, stage, 1)
    effects = {part: _differences(told, parts, part) for part in parts}
    drawn = {part: estimate(values) for part, values in effects.items() if values}
    drawing = partial(draw_layers, told, list(parts), drawn, title)
    return Findings(lines, table.reset_index(drop=True), {"agc_layers": drawing})


def _line(
    comparisons: int,
    paper: str,
    what: str,
    told: pd.DataFrame,
    parts: Sequence[str],
    part: str,
    sign: int,
) -> list[str]:
    """Whether a finding of the paper holds.

    Args:
        comparisons: how many findings are read together.
        sign: of the difference that the paper expects; 0 for none.
    """
    values = _differences(told, parts, part)
    if not values:
        return []
    found = estimate(values, comparisons)
    if found.std == 0 or found.count == 1:
        judged = "cannot be told"
    elif sign == 0:
        judged = "does not hold" if found.low > 0 else "cannot be told"
        judged = "holds" if found.high < NEGLIGIBLE else judged
    else:
        low, high = sorted((sign * found.low, sign * found.high))
        judged = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
    return [f"{paper}: {judged}; {what} gives {verdict(found)}"]


def _differences(told: pd.DataFrame, parts: Sequence[str], part: str) -> list[float]:
    """Test top-1 with `part` clipped less that without, for each seed: the mean over all pairs of
    its runs that are otherwise the same, which are not independent of each other."""
    others = [name for name in parts if name != part]
    pivot = told.pivot_table(index=[*others, "seed"], columns=part, values="test")
    if not {True, False} <= set(pivot.columns):
        return []
    return list((pivot[True] - pivot[False]).dropna().groupby("seed").mean())


def ranked(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Settings, the best mean validation top-1 first."""
    parts = parts_of(rows.model.iloc[0])
    means = prepare(rows, parts).groupby("clipped").val.mean()
    names = means.sort_values(ascending=False, kind="stable").index
    subsets = [read_subset(name, parts) for name in names]
    return [{"unclipped": tuple(p for p in parts if p not in subset)} for subset in subsets]
