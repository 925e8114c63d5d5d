"""What a grid found, shown to the person who ran it and stored with its run."""

from typing import Any

import pandas as pd

from nflab.analysis.findings import Findings, software
from nflab.recording.provenance import software_tags
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.studies import GridOfConfigs
from nflab.studies.finals import run_finals
from nflab.studies.grid import Grid
from nflab.terminal.wording import console, text_table


def title_of(config: Config) -> str:
    """What was trained on what, for how long."""
    return f"{config.model.model} on {config.data.dataset}, {config.schedule.epochs} epochs"


def present(
    found: Findings, paper: str, rows: pd.DataFrame, config: GridOfConfigs, grid: Grid
) -> None:
    """Prints and stores what a grid found.

    Args:
        paper: what the paper found.
        rows: of all cells (see `Grid.run`).
    """
    out = console()
    out.print(text_table(found.table))
    told = [*found.text, *software(rows, software_tags())]
    out.print(*told, paper, sep="\n", markup=False)
    figures = grid.record(rows, [*told, paper], found.drawings)
    out.print("Figures:", *figures, markup=False)
    out.print(f"Browse:  {locations.browse(config.run)}", markup=False)


def with_finals(best: list[dict[str, Any]], found: Findings, config: Any, grid: Grid) -> Findings:
    """`found`, with what repeating the best settings over fresh seeds adds, if that is asked for.

    Args:
        best: settings without seeds, the best first.
    """
    if not config.finals.finalists or grid.stopped:
        return found
    settled = run_finals(grid, config.base(), best[: config.finals.finalists], config.finals)
    console().print("Finals, over fresh seeds:", *settled.text, sep="\n  ", markup=False)
    drawings = {**found.drawings, **settled.drawings}
    return Findings([*found.text, *settled.text], found.table, drawings)
