"""Cells of a grid, and what they compute."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from nflab.learning.computation import digests
from nflab.recording.tables import one_each
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.leaves import as_text, flat, replace
from nflab.terminal.wording import describe


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    config: Config

    @functools.cached_property
    def _ids(self) -> tuple[str, str]:
        return digests(self.config)

    @property
    def id(self) -> str:
        """Changes whenever something does that the result depends on: a setting, an image of the
        dataset, a pre-trained weight; not with the hardware."""
        return self._ids[0]

    @property
    def earlier_id(self) -> str:
        """What earlier versions called it."""
        return self._ids[1]


def cell_name(settings: dict[str, Any]) -> str:
    """A cell's settings in a line; where it is cut, what tells cells apart stands first."""
    last = ("model", "seed")
    return describe({key: settings[key] for key in sorted(settings, key=last.__contains__)})


def common_part(base: Config) -> Config:
    """What cells have in common, without the name and places of one run."""
    return replace(locations.located(base), name=None, tracking_uri=None, storage=None)


def with_settings(rows: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
    """`rows`, with the settings of cells that were never begun, which no run tells."""
    if not (rows.outcome == "missing").any():
        return rows
    told = [
        {**row, **{key: as_text(value) for key, value in flat(cell.config).items()}}
        if row["outcome"] == "missing"
        else row
        for row, cell in zip(rows.to_dict("records"), cells, strict=True)
    ]
    return pd.DataFrame(told)


def of_cells(cells: Sequence[Cell], runs: pd.DataFrame) -> pd.DataFrame:
    """Those rows of cells' runs that are of these cells, whatever version called them so.

    Args:
        runs: see `Tracker.cells`.
    """
    ids = {cell.earlier_id: cell.id for cell in cells} | {cell.id: cell.id for cell in cells}
    return runs.assign(cell=runs.cell.map(ids)).dropna(subset="cell")


def rows_of(cells: Sequence[Cell], runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell, in order: its result if it has one, else its latest run, else nothing
    but its `cell` and the `outcome` "missing".

    Args:
        runs: rows of cells' runs (see `Tracker.cells`).
    """
    latest = one_each(of_cells(cells, runs)).set_index("cell")
    found = latest.reindex([cell.id for cell in cells])
    found["outcome"] = found.outcome.fillna("missing")
    return found.reset_index(names="cell")
