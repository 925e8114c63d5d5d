"""Winners that are not luck: the best settings repeated over fresh seeds, beside the baseline."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nflab.analysis.finalists import BASELINE, EARLIER, RECORD, judge
from nflab.analysis.findings import Findings
from nflab.settings.config import Config
from nflab.settings.studies import FinalsConfig
from nflab.studies.grid import Grid
from nflab.terminal.wording import describe

FRESH = 1000
"""Seeds from --seed + this on repeat finalists: none of them had a part in choosing them."""


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
    found = judge(record, grid.run(base, asked, prefix="finals "))
    grid.record_seeds()
    return replace(found, text=[*said, *found.text])
