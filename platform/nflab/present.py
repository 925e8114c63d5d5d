"""What a grid found, shown to the person who ran it and stored with its run."""

from typing import Any

import pandas as pd
from rich.table import Table

from nflab import locations
from nflab.ablations.findings import Findings
from nflab.config import Config, GridOfConfigs
from nflab.finals import run_finals
from nflab.grid import Grid
from nflab.progress import console


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
    out.print(*found.text, paper, sep="\n", markup=False)
    figures = grid.record(rows, [*found.text, paper], found.drawings)
    out.print("Figures:", *figures, markup=False)
    out.print(f"Browse:  {locations.browse(config.run)}", markup=False)


def finals(best: list[dict[str, Any]], found: Findings, config: Any, grid: Grid) -> Findings:
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


def text_table(table: pd.DataFrame) -> Table:
    """A table as a person reads it."""
    drawn = Table(box=None, pad_edge=False)
    for column in table.columns:
        drawn.add_column(str(column).replace("_", " "), justify="right")
    for row in table.itertuples(index=False):
        drawn.add_row(*(short(value) for value in row))
    return drawn


def short(value: Any) -> str:
    """A value in few digits; an infinite clipping is none, and what is unknown is empty."""
    if isinstance(value, float):
        if value == float("inf"):
            return "none"
        if value != value or value == -float("inf"):
            return ""
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return str(value)
