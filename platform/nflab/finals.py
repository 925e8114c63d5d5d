"""Winners that are not luck: the best settings repeated over fresh seeds, beside the baseline."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from nflab.ablations.findings import Findings, summarise, top1
from nflab.config import Config, FinalsConfig
from nflab.figures.finals import draw_finals
from nflab.grid import Grid
from nflab.progress import describe
from nflab.statistics import Estimate, estimate, verdict

FRESH = 1000
"""Seeds from --seed + this on repeat finalists: none of them had a part in choosing them."""

BASELINE = "baseline"

RECORD = "finals.json"
"""Artifact of the parent run: the cells of each entrant, by its label."""


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
    labels = [label for label in entrants for _ in seeds]
    rows = grid.run(base, cells)
    of_entrants = {label: rows.cell[[one == label for one in labels]] for label in entrants}
    record = {label: list(ids) for label, ids in of_entrants.items()}
    grid.attach(RECORD, json.dumps(record, indent=2))
    return judge(record, rows)


def judge(entrants: Mapping[str, Sequence[str]], rows: pd.DataFrame) -> Findings:
    """What can be said of finalists, and what cannot.

    Args:
        entrants: label -> ids of its cells, as RECORD holds them: the baseline, then finalists in
            the order in which validation put them, which decides who is compared with whom.
        rows: of these cells.
    """
    tested = rows.assign(test=top1(rows, "test"))
    of_cells = tested.drop_duplicates("cell").set_index("cell")
    told = pd.concat(
        [of_cells.reindex(ids).assign(setting=label) for label, ids in entrants.items()]
    )
    told = told[told.test.notna()].assign(seed=lambda rows: rows.seed.astype(int))
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
            f"95 % interval of the mean {noise.low:.2f} to {noise.high:.2f}"
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
    return Findings(lines, table, {"finalists": partial(draw_finals, drawn)})
