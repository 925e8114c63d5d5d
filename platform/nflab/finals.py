"""Winners that are not luck: the best settings repeated over fresh seeds, beside the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from nflab.ablations.findings import Findings, top1
from nflab.config import Config, FinalsConfig
from nflab.figures.finals import draw_finals
from nflab.grid import Grid
from nflab.progress import console, describe
from nflab.statistics import Estimate, estimate, verdict

FRESH = 1000
"""Seeds from --seed + this on repeat finalists: none of them had a part in choosing them."""

BASELINE = "baseline"


@dataclass(frozen=True)
class Finalist:
    """A setting and its results over the final seeds."""

    label: str
    test: pd.Series
    """Test top-1 in percent by seed; 0 where the run diverged."""
    estimate: Estimate


def run_finals(
    grid: Grid, base: Config, finalists: Sequence[dict[str, Any]], finals: FinalsConfig
) -> Findings:
    """Repeats settings over fresh seeds, the baseline first, and compares them.

    Args:
        base: the baseline, which the finalists vary.
        finalists: settings without seeds, the best first.
    """
    seeds = range(base.run.seed + FRESH, base.run.seed + FRESH + finals.final_seeds)
    entrants = {BASELINE: {}, **{describe(one): dict(one) for one in finalists}}
    cells = [{**settings, "seed": seed} for settings in entrants.values() for seed in seeds]
    rows = grid.run(base, cells)
    labels = [label for label in entrants for _ in seeds]
    results = rows.assign(entrant=labels, seed=rows.seed.astype(float), test=top1(rows, "test"))
    results = results[results.test.notna()]
    found = []
    for label in entrants:
        test = results[results.entrant == label].set_index("seed").test
        if len(test):
            found.append(Finalist(label, test, estimate(test.tolist())))
    return judge(found)


def judge(found: Sequence[Finalist]) -> Findings:
    """What can be said of finalists, the baseline first of them, and what cannot."""
    lines = []
    baseline = next((one for one in found if one.label == BASELINE), None)
    if baseline is not None:
        e = baseline.estimate
        lines.append(
            f"seed noise of the baseline: test top-1 {e} seeds, "
            f"95 % interval of the mean {e.low:.2f} to {e.high:.2f}"
        )
    others = sorted((f for f in found if f is not baseline), key=lambda f: -f.estimate.mean)
    for one in others:
        line = f"{one.label}: {one.estimate} seeds"
        if baseline is not None:
            line += f"; above the baseline {_compared(one, baseline)}"
        lines.append(line)
    if len(others) > 1:
        best, second = others[:2]
        lines.append(f"{best.label} above {second.label}: {_compared(best, second)}")
    table = pd.DataFrame(
        {
            "setting": one.label,
            "seeds": one.estimate.count,
            "test_mean": one.estimate.mean,
            "test_std": one.estimate.std,
            "test_low": one.estimate.low,
            "test_high": one.estimate.high,
            "diverged": int((one.test == 0).sum()),
        }
        for one in found
    )
    drawn = {one.label: (one.test.tolist(), one.estimate) for one in found}
    return Findings(lines, table, {"finalists": partial(draw_finals, drawn)})


def _compared(one: Finalist, other: Finalist) -> str:
    pairs = (one.test - other.test).dropna().tolist()
    return verdict(estimate(pairs)) if pairs else "no seed has both results"


def show_finals(found: Findings) -> None:
    """Prints what the finals say."""
    console().print("Finals, over fresh seeds:", *found.text, sep="\n  ", markup=False)
