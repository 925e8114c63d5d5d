"""The cells of a grid as they are written down in MLflow."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from nflab.recording.run_record import RunRecord
from nflab.recording.tables import has_ended, last_epoch
from nflab.running.ledger import METRIC, Proposal
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.outcomes import DONE, Outcome, standing
from nflab.storage.checkpoints import NO_RIVALS, Checkpoints, Winners
from nflab.studies.cells import Cell, cell_name, of_cells, rows_of
from nflab.studies.life_cycle import LiveRun
from nflab.studies.supersession import Supersession, has_no_checkpoint


class CellLedger:
    """Proposes the cells that have no result, and writes down what becomes of them, in MLflow."""

    def __init__(
        self,
        run: LiveRun[Any],
        base: Config,
        settings: Sequence[dict[str, Any]],
        force: bool = False,
        keep_weights: bool = False,
    ) -> None:
        """Closes what an earlier process left running.

        Args:
            run: the grid.
            force: run what has a result again, and let the new one supersede it; unless an earlier
                command that began to has not come to its end: then that goes on.
            keep_weights: keep every cell's checkpoint, not the best one's alone; a result whose
                checkpoint is gone is as good as none.
        """
        self.budget = run.budget
        self._session, self._tracker, self._parent = run.session, run.tracker, run.run_id
        self._outbox, self._keep_weights = run.outbox, keep_weights
        self._settings = list(settings)
        self.cells = [Cell(replace(base, **one)) for one in settings]
        ids = " ".join(sorted(cell.id for cell in self.cells))
        self._rivals = NO_RIVALS if keep_weights else hashlib.sha256(ids.encode()).hexdigest()[:16]
        self._supersession = Supersession(self._outbox)
        self.release()
        self.repeats = self._supersession.under_way
        """Whether an earlier command began to repeat results, and did not come to its end."""
        if force and not self.repeats:
            self._supersession.demand_all(self._known)
        elif keep_weights:
            self._supersession.demand_weights(self._known)
        if force or keep_weights:
            self.release()

    def release(self) -> None:
        """Reads what MLflow says of every cell; none of this grid is left running."""
        runs = self._outbox.read(self._tracker.cells)
        for run in runs[runs.parent == self._parent].itertuples():
            ended: Outcome = "interrupted" if run.outcome == "running" else run.outcome
            if not has_ended(run, ended):
                self._outbox.put("finish", run.run_id, outcome=ended)
        runs = self._outbox.read(self._tracker.cells)
        self._known = of_cells(self.cells, runs)
        for run, earlier in zip(
            self._known.itertuples(), runs.cell[self._known.index], strict=True
        ):
            if earlier != run.cell:  # whoever reads cells by their ids finds it, too
                self._outbox.put("tag", run.run_id, key="earlier_cell", value=earlier)
                self._outbox.put("tag", run.run_id, key="cell", value=run.cell)
        self.rows = found = self._rows(self._supersession.look(self._known))
        self._attempts = self._outbox.read(self._tracker.attempts)
        done = found.outcome.isin(DONE)
        # A cell that is asked for twice is run once.
        asked = ~done & ~found.cell.duplicated()
        self._waiting = [n for n, missing in enumerate(asked, 1) if missing]
        # One of another grid is theirs to go on with.
        mine = found[~done & (found.parent == self._parent)]
        self._runs = {run.cell: run for run in mine.itertuples()}
        self._records: dict[int, RunRecord] = {}
        self._folders: dict[int, str] = {}
        self._winners = Winners()
        if not self._keep_weights:
            for run in found.drop_duplicates("cell").itertuples():
                if run.outcome == "finished" and run.parent == self._parent:
                    checkpoints = Checkpoints.of_run(run.folder)
                    self._winners.ended(standing(run.val_top1, run.cell), checkpoints)

    def results(self) -> pd.DataFrame:
        """A row for each cell, as `release` found them; what was to be superseded and has not been
        still is a result."""
        return self._rows(self._known)

    def _rows(self, runs: pd.DataFrame) -> pd.DataFrame:
        return rows_of(self.cells, runs.drop(columns="to_supersede"))

    @property
    def missing(self) -> int:
        """How many cells have no result."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Cell]:
        """The cells that have no result, in the order in which they are run."""
        return [self.cells[number - 1] for number in self._waiting]

    def propose(self) -> Proposal:
        """The next cell."""
        number = self._waiting.pop(0)
        cell = self.cells[number - 1]
        known = self._runs.get(cell.id)
        folder = known.folder if known is not None else self._new_folder(cell)
        self._folders[number] = folder
        return Proposal(number, self._settings[number - 1], folder)

    def started(self, proposal: Proposal) -> None:
        """Opens the cell's run in MLflow, or opens it again."""
        if proposal.number in self._records:
            return
        cell = self.cells[proposal.number - 1]
        known = self._runs.get(cell.id)
        if known is not None:
            run, epoch = known.run_id, last_epoch(known)
            self._outbox.put("reopen", run)
        else:
            tags = {
                **self._session.tags,
                "kind": "cell",
                "cell": cell.id,
                "parent": self._session.name,
                "folder": proposal.folder,
                "rivals": self._rivals,
            }
            run, epoch = self._outbox.start(cell_name(proposal.settings), tags, self._parent), None
        self._records[proposal.number] = RunRecord(self._outbox, run, cell.config, epoch)

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """Writes down an epoch's metrics, once; no cell is ever cut."""
        self.budget.add(self._records[number].report(metrics))

    def ended(
        self, number: int, outcome: Outcome, result: Mapping[str, Any], error: str | None = None
    ) -> tuple[Outcome, str | None]:
        """Closes the cell's run, lets it supersede the result that there was, and forgets all
        checkpoints that are not needed."""
        self._records[number].finish(outcome, error)
        if outcome not in DONE:
            return outcome, error
        cell = self.cells[number - 1].id
        self._supersession.ended(cell)
        if not self._keep_weights:
            place = standing(result[METRIC], cell) if outcome == "finished" else None
            self._winners.ended(place, Checkpoints.of_run(self._folders[number]))
        return outcome, error

    def _new_folder(self, cell: Cell) -> str:
        """One that no run of the cell has used, whether MLflow still knows of it or not."""
        attempts = self._attempts[cell.id]
        while True:
            suffix = f"-{attempts + 1}" if attempts else ""
            folder = f"{self._session.folder}/cells/{cell.id}{suffix}"
            if has_no_checkpoint(folder):
                return folder
            attempts += 1
