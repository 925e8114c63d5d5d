"""A grid of runs in which a cell is its configuration.

Cells are known by what they compute, wherever and whenever they were run: a grid that is asked for
again runs only what MLflow does not have the result of.
"""

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from nflab import locations
from nflab.classifier import WEIGHTS
from nflab.config import Config, flat, replace, to_json
from nflab.data import load_dataset
from nflab.files import is_local, read_bytes
from nflab.interrupts import Interrupted, ignore_interrupts
from nflab.ledger import Proposal
from nflab.progress import SweepProgress, console, describe
from nflab.record import RunRecord
from nflab.session import Session, open_session
from nflab.tracking import Outcome
from nflab.tune import run_trials

_ELSEWHERE = ("name", "tracking_uri", "storage", "recipe")
"""Settings that say where results go and settings come from, not what is computed."""

DONE = ("finished", "diverged")
"""Outcomes that are results: such a cell is not run again."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    config: Config

    @functools.cached_property
    def id(self) -> str:
        """Changes whenever something does that the result depends on: a setting, an image of the
        dataset, a pre-trained weight; not with the hardware."""
        computed = flat(self.config)
        for name in (*_ELSEWHERE, *(f.name for f in dataclasses.fields(self.config.scale))):
            del computed[name]
        computed["dataset"] = load_dataset(self.config).fingerprint
        given = self.config.model.pretrained
        weights = None if given is None else read_bytes(given)
        if weights is not None:
            computed["pretrained"] = hashlib.sha256(weights).hexdigest()
        text = json.dumps(computed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Grid:
    """Cells that are run and read back, as children of one run in MLflow."""

    def __init__(self, session: Session[Any], parent: str) -> None:
        self._session, self.parent, self.tracker = session, parent, session.tracker

    def run(self, base: Config, cells: Sequence[dict[str, Any]]) -> pd.DataFrame:
        """Runs those cells that have no result yet, as many at once as the cluster holds.

        Args:
            base: what all cells have in common.
            cells: for each, the settings in which it differs, in the order in which they are run.

        Returns:
            a row for each cell, in order (see `Tracker.cells`); a failed one has no `test_top1`.
        """
        session = self._session
        base = replace(
            base,
            name=None,
            tracking_uri=session.config.run.tracking_uri,
            storage=session.config.run.storage,
            # Workers run in folders of their own.
            dataset=locations.absolute(base.data.dataset),
        )
        ledger = CellLedger(session, self.parent, base, cells)
        done = len(cells) - ledger.missing
        console().print(
            f"{session.name}: {len(cells)} cells ({done} done) of {base.schedule.epochs} epochs on "
            f"{base.data.dataset}, {session.placement}"
        )
        try:
            if ledger.missing:
                progress = SweepProgress(len(cells), done, base.schedule.epochs, "cell")
                run_trials(base, session.placement, session.folder, ledger, progress)
        finally:
            ledger.release()
        rows = self.tracker.cells(self.parent).set_index("cell")
        return rows.loc[[cell.id for cell in ledger.cells]].reset_index()

    def weights(self, config: Config) -> str:
        """Path or address of the trained weights of a finished cell."""
        folder = _cell_folder(self._session.folder, Cell(config))
        return f"{folder}/checkpoints/epoch-{config.schedule.epochs:06d}/{WEIGHTS}"

    def record(self, table: pd.DataFrame, found: str, draw: Callable[[Path], None]) -> Path:
        """Stores what was found with the grid's run; returns where its figure is.

        Args:
            table: the results, a row for each cell.
            found: the answer in words, shown as the run's description.
            draw: draws the figure, as a PNG file of this path.
        """
        session = self._session
        folder = Path(session.folder if is_local(session.folder) else tempfile.mkdtemp("-nflab"))
        figure = folder / f"{session.tracker.experiment}.png"
        draw(figure)
        table.to_csv(folder / "cells.csv", index=False)
        for path in (figure, folder / "cells.csv"):
            self.tracker.add_file(self.parent, path)
        self.tracker.describe(self.parent, found)
        return figure


@contextmanager
def open_grid(config: Config, experiment: str) -> Iterator[Grid]:
    """A grid called `config.run.name`, else as the experiment is; it is opened again by asking for
    it again.

    Raises:
        ConfigError: a store or the cluster cannot be used.
        Interrupted: Ctrl-C or SIGTERM.
    """
    named = replace(config, name=config.run.name or experiment)
    session = open_session(named, experiment, resume=True)
    tracker = session.tracker
    outcome: Outcome = "failed"
    parent = None
    try:
        parent = tracker.find(session.name) or tracker.start(session.name, session.tags)
        tracker.reopen(parent)
        tracker.add_text(parent, to_json(session.config), "config.json")
        yield Grid(session, parent)
        outcome = "finished"
    except KeyboardInterrupt:
        ignore_interrupts()
        outcome = "interrupted"
        raise Interrupted(session.name) from None
    finally:
        if parent is not None:
            tracker.finish(parent, outcome)
        ray.shutdown()


class CellLedger:
    """Proposes the cells that have no result, and writes down what becomes of them, in MLflow."""

    def __init__(
        self,
        session: Session[Any],
        parent: str,
        base: Config,
        settings: Sequence[dict[str, Any]],
    ) -> None:
        self._session, self._tracker, self._parent = session, session.tracker, parent
        self._settings = list(settings)
        self.cells = [Cell(replace(base, **one)) for one in settings]
        self.release()

    def release(self) -> None:
        """Reads what MLflow says of every cell; none is left running."""
        runs = self._tracker.cells(self._parent)
        for run_id, outcome in zip(runs.run_id, runs.outcome, strict=True):
            ended: Outcome = "interrupted" if outcome == "running" else outcome
            if not self._tracker.has_ended(run_id, ended):
                self._tracker.finish(run_id, ended)
        self._runs: dict[str, str] = dict(zip(runs.cell, runs.run_id, strict=True))
        self._records: dict[int, RunRecord] = {}
        done = set(runs.cell[runs.outcome.isin(DONE)])
        self._waiting = [n for n, cell in enumerate(self.cells, 1) if cell.id not in done]

    @property
    def missing(self) -> int:
        """How many cells have no result."""
        return len(self._waiting)

    def propose(self) -> Proposal:
        """The next cell."""
        number = self._waiting.pop(0)
        folder = _cell_folder(self._session.folder, self.cells[number - 1])
        return Proposal(number, self._settings[number - 1], folder)

    def started(self, proposal: Proposal) -> None:
        """Opens the cell's run in MLflow, or opens it again."""
        if proposal.number in self._records:
            return
        cell = self.cells[proposal.number - 1]
        tags = {**self._session.tags, "cell": cell.id}
        run_id = self._runs.get(cell.id) or self._tracker.start(
            describe(proposal.settings), tags, self._parent
        )
        self._records[proposal.number] = RunRecord(self._tracker, run_id, cell.config)

    def reported(self, number: int, metrics: dict[str, Any]) -> bool:
        """Writes down an epoch's metrics, once; no cell is ever cut."""
        self._records[number].report(metrics)
        return False

    def ended(
        self, number: int, outcome: Outcome, value: float | None, error: str | None = None
    ) -> None:
        """Closes the cell's run."""
        self._records[number].finish(outcome, error)


def _cell_folder(folder: str, cell: Cell) -> str:
    return f"{folder}/cells/{cell.id}"
