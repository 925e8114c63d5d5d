"""Winners that are not luck: the best settings repeated over fresh seeds, beside the baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
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

EARLIER = "earlier finals"
"""Label of cells that finals before the last ones asked for; they are compared with nothing."""

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

    def ids(settings: dict[str, Any]) -> list[str]:
        return grid.ids(base, [{**settings, "seed": seed} for seed in seeds])

    entrants: dict[str, dict[str, Any]] = {BASELINE: {}}
    of_entrants, said = {BASELINE: ids({})}, []
    for one in finalists:
        cells = ids(one)
        if cells == of_entrants[BASELINE]:
            said.append(f"the baseline itself is among the best: {describe(one)}")
        elif cells not in of_entrants.values():
            # In few digits two may read the same.
            label = describe(one)
            label = f"{label} {one}" if label in entrants else label
            entrants[label], of_entrants[label] = one, cells
    # Before they are run: a cell of finals is none of the grid, whatever becomes of it.
    before: dict[str, list[str]] = json.loads(grid.attached(RECORD) or "{}")
    now = {cell for cells in of_entrants.values() for cell in cells}
    earlier = {cell for cells in before.values() for cell in cells} - now
    record = {**of_entrants, EARLIER: sorted(earlier)}
    grid.attach(RECORD, json.dumps(record, indent=2))
    asked = [{**one, "seed": seed} for one in entrants.values() for seed in seeds]
    found = judge(record, grid.run(base, asked))
    return replace(found, text=[*said, *found.text])


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
    return Findings(lines, table, {"finalists": partial(draw_finals, drawn)})
