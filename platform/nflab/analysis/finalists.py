"""What can be said of finalists, and what cannot."""

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from nflab.analysis.figures.finals import draw_finals
from nflab.analysis.findings import Findings, summarise, top1
from nflab.analysis.statistics import Estimate, estimate, verdict

BASELINE = "baseline"

EARLIER = "earlier finals"
"""Label of cells that finals before the last ones asked for; they are compared with nothing."""

RECORD = "finals.json"
"""Artifact of the parent run: the cells of each entrant, by its label."""


def judge(entrants: Mapping[str, Sequence[str]], rows: pd.DataFrame) -> Findings:
    """What can be said of finalists, and what cannot.

    Args:
        entrants: label -> ids of its cells, as RECORD holds them: the baseline, then finalists in
            the order in which validation put them, which decides who is compared with whom.
        rows: of these cells.
    """
    entrants = {label: ids for label, ids in entrants.items() if label != EARLIER}
    tested = rows.assign(test=top1(rows, "test"))
    of_cells = tested.drop_duplicates("cell").set_index("cell")
    told = pd.concat(
        [of_cells.reindex(ids).assign(setting=label) for label, ids in entrants.items()]
    )
    told = told[told.test.notna()]
    if not len(told):
        return Findings(["no training of the finals has a result"], told[[]], {})
    told = told.assign(seed=lambda rows: rows.seed.astype(int))
    tests = {label: runs.set_index("seed").test for label, runs in told.groupby("setting")}
    spreads = {label: estimate(test.tolist()) for label, test in tests.items()}

    others = [label for label in entrants if label in spreads and label != BASELINE]
    # Each finalist against the baseline, and the first against the second.
    comparisons = len(others) + (len(others) > 1)

    def compared(one: str, other: str) -> str:
        pairs = (tests[one] - tests[other]).dropna().tolist()
        return verdict(estimate(pairs, comparisons)) if pairs else "no seed has both results"

    lines = []
    if BASELINE in spreads:
        noise = spreads[BASELINE]
        lines.append(
            f"seed noise of the baseline: test top-1 {noise} seeds, "
            f"95 % interval of the mean {max(0.0, noise.low):.2f} to {min(100.0, noise.high):.2f}"
        )
    for label in others:
        line = f"{label}: {spreads[label]} seeds"
        if BASELINE in spreads:
            line += f"; above the baseline {compared(label, BASELINE)}"
        lines.append(line)
    if len(others) > 1:
        best, second = others[:2]
        lines.append(f"{best} above {second}: {compared(best, second)}")
    order = [label for label in (BASELINE, *others) if label in spreads]
    table = summarise(told, ("setting",)).set_index("setting").reindex(order).reset_index()
    drawn: dict[str, tuple[list[float], Estimate]] = {
        label: (tests[label].tolist(), spreads[label]) for label in order
    }
    drawings = {"finalists": partial(draw_finals, drawn)}
    return Findings(lines, table, drawings, {label: told[told.setting == label] for label in order})
