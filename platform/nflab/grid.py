"""A grid of runs in which a cell is its configuration.

Cells are known by what they compute, wherever and whenever they were run: a grid that is asked for
again runs only what MLflow does not have the result of.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from nflab import cluster, locations
from nflab.archive import Archive
from nflab.checkpoints import NO_RIVALS, Checkpoints, Winner
from nflab.classifier import WEIGHTS
from nflab.cluster import Placement
from nflab.config import (
    Config,
    ConfigError,
    FinalsConfig,
    GridOfConfigs,
    flat,
    from_json,
    replace,
    to_json,
)
from nflab.costs import Budget, sentences, spent, totals
from nflab.data import example_image, load_dataset
from nflab.files import is_local, read_bytes
from nflab.interrupts import BudgetReached, Interrupted, ignore_interrupts
from nflab.ledger import Proposal
from nflab.notes import grid_note
from nflab.outbox import Outbox
from nflab.plan import show_plan
from nflab.progress import SweepProgress, console, describe
from nflab.record import RunRecord, dataset_entry
from nflab.session import Session, open_session
from nflab.tracking import DONE, Outcome, as_text, has_ended, last_epoch, one_each
from nflab.tune import run_trials

_ELSEWHERE = ("name", "tracking_uri", "storage", "recipe", "diagnostics")
"""Settings that say where results go, where settings come from and what is watched, not what is
computed."""


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

    def __init__(
        self,
        session: Session[Any],
        outbox: Outbox,
        parent: str,
        budget: Budget,
        force: bool = False,
    ) -> None:
        self._session, self._outbox, self._force = session, outbox, force
        self._budget = budget
        self.parent, self.tracker = parent, session.tracker
        self.has_results = False
        self.stopped = False
        """Whether cells were not run, or not to their end, because the budget was reached."""

    def run(
        self, base: Config, cells: Sequence[dict[str, Any]], keep_weights: bool = False
    ) -> pd.DataFrame:
        """Runs those cells that have no result yet, as many at once as the cluster holds.

        Args:
            base: what all cells have in common.
            cells: for each, the settings in which it differs, in the order in which they are run.
            keep_weights: whether every cell's weights are needed, not the best one's alone.

        Returns:
            a row for each cell, in order (see `Tracker.cells`); one that failed, or was stopped or
            not begun because of the budget, has no `test_top1`.

        Raises:
            BudgetReached: no cell has a result, for that reason.
            ConfigError: no cell has a result, for all failed.
        """
        session = self._session
        run_uri, storage = session.config.run.tracking_uri, session.config.run.storage
        base = replace(_common(base), tracking_uri=run_uri, storage=storage)
        ledger = CellLedger(
            session,
            self._outbox,
            self.parent,
            base,
            cells,
            self._force,
            keep_weights,
            self._budget,
        )
        done = len(cells) - ledger.missing
        console().print(
            f"{session.name}: {len(cells)} cells ({done} done) of {base.schedule.epochs} epochs on "
            f"{base.data.dataset}, {session.placement}"
        )
        if ledger.repeats:
            console().print("what an earlier --force began goes on: give it again to repeat more")
        if base.run.diagnostics and done:
            console().print(f"{done} cells keep what they recorded: --force records diagnostics")
        try:
            if ledger.missing and not self._budget.reached:
                progress = SweepProgress(len(cells), done, base.schedule.epochs, "cell")
                run_trials(base, session.placement, session.local_folder, ledger, progress)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                ignore_interrupts()
            if self._outbox.empties():
                ledger.release()
            raise
        ledger.release()
        unfinished = ledger.rows.outcome.isin(["missing", "interrupted"]).any()
        found = ledger.results()
        self.has_results |= bool(found.outcome.isin(DONE).any())
        if unfinished and self._budget.reached:
            self.stopped = True
            if not self.has_results:
                raise self.budget_reached()
        if not self.has_results:
            raise ConfigError("every cell failed: what follows `logs:` above says where to look")
        return _with_settings(found, ledger.cells)

    def budget_reached(self) -> BudgetReached:
        """What tells a person that the grid was stopped, and how to go on."""
        return BudgetReached(self._session.name, str(self._budget))

    def ids(self, base: Config, cells: Sequence[dict[str, Any]]) -> list[str]:
        """The identity of each cell that `run` would be asked for."""
        return [Cell(replace(_common(base), **settings)).id for settings in cells]

    def attach(self, name: str, text: str) -> None:
        """Stores text with the grid's run, as a file called `name`."""
        self._outbox.put("add_text", self.parent, text=text, file=name)

    def attached(self, name: str) -> str | None:
        """What was stored so; None if nothing was."""
        return self._outbox.read(lambda: self.tracker.text(self.parent, name))

    def weights(self, config: Config) -> str:
        """Path or address of the trained weights of a finished cell."""
        (row,) = rows_of([Cell(config)], self._outbox.read(self.tracker.cells)).itertuples()
        return f"{row.folder}/checkpoints/epoch-{config.schedule.epochs:06d}/{WEIGHTS}"

    def record(
        self,
        table: pd.DataFrame,
        found: Sequence[str],
        drawings: Mapping[str, Callable[[Path], None]],
    ) -> list[Path]:
        """Stores what was found with the grid's run; returns where its figures are.

        Args:
            table: the results, a row for each cell.
            found: the answer in sentences, shown in the run's description.
            drawings: name -> draws the figure, as a PNG file of this path.
        """
        session = self._session
        folder = Path(session.folder if is_local(session.folder) else tempfile.mkdtemp("-nflab"))
        figures = [folder / f"{name}.png" for name in drawings]
        for figure, draw in zip(figures, drawings.values(), strict=True):
            draw(figure)
        table.to_csv(folder / "cells.csv", index=False)
        for path in (*figures, folder / "cells.csv"):
            self._outbox.put_file(self.parent, path.name, functools.partial(shutil.copy, path))
        names = [path.name for path in figures]
        total = totals(self._outbox.read(lambda: self.tracker.children(self.parent)))
        when = int(time.time() * 1000)
        self._outbox.put("log", self.parent, metrics=total, step=0, when=when)
        costs = [*sentences(total), *([f"Stopped: {self._budget}."] if self.stopped else [])]
        for sentence in costs:
            console().print(sentence, markup=False)
        config, experiment = session.config.base(), self.tracker.experiment
        note = grid_note(experiment, self.parent, config, table, [*found, *costs], names)
        self._outbox.put("describe", self.parent, text=note)
        if self.stopped:  # a better one may yet come
            self._outbox.drain()
        else:
            self._outbox.read(lambda: self._keep_best(table))
        return figures

    def _keep_best(self, table: pd.DataFrame) -> None:
        """Stores and registers the network of the cell that does best on validation, whichever grid
        trained it; another grid may have forgotten its checkpoint."""
        finished = table[table.outcome == "finished"]
        if not len(finished):
            return
        best = finished.loc[finished.val_top1.idxmax()]
        with Checkpoints.of_run(best.folder).last() as checkpoint:
            if checkpoint is None:
                said = f"the weights of the best cell, {best['name']}, are not stored any more"
                if best.parent != self.parent:
                    said += ": another grid trained it, and keeps those of its own best cell only"
                console().print(said, markup=False)
                return
            config = from_json(Config, (checkpoint / "config.json").read_text(encoding="utf-8"))
            top1 = {key: float(best[key]) for key in ("val_top1", "test_top1")}
            self.tracker.log(self.parent, top1, 0)
            self.tracker.add_model(
                self.parent, checkpoint, example_image(config), "best_cell", best.run_id
            )
            self.tracker.register_model(
                self.parent,
                config.data.dataset,
                load_dataset(config).fingerprint,
                f"{config.model.model}, best cell of the grid {self._session.name}: {best['name']}",
            )


@contextmanager
def open_grid(config: GridOfConfigs, experiment: str) -> Iterator[Grid]:
    """A grid called `config.run.name`, else as the experiment is; it is opened again by asking for
    it again. Of a dry run, the block ends where it would begin to train.

    Raises:
        ConfigError: a store or the cluster cannot be used.
        Interrupted: Ctrl-C or SIGTERM, or its budget is reached.
    """
    if config.grid.dry_run:
        with suppress(_Listed):
            yield _DryRun(config, experiment)
        return
    named = replace(config, name=config.run.name or experiment, dry_run=False, force=False)
    session = open_session(named, experiment, resume=True)
    tracker = session.tracker
    outbox = Outbox(tracker, session.outbox_folder)
    outcome: Outcome = "failed"
    parent = None
    tags = {**session.tags, "kind": "grid"}
    try:
        parent = outbox.read(lambda: tracker.begin(session.name, tags))
        outbox.put("reopen", parent)
        outbox.put("add_text", parent, text=to_json(session.config), file="config.json")
        outbox.put("log_dataset", parent, **dataset_entry(session.config))
        run_id = parent
        spent_before = outbox.read(lambda: spent(tracker.children(run_id)))
        budget = Budget(config.grid.max_cost, spent_before)
        grid = Grid(session, outbox, parent, budget, config.grid.force)
        yield grid
        if grid.stopped:
            raise grid.budget_reached()
        outcome = "finished"
    except BudgetReached as reached:
        outcome = "interrupted"
        if parent is not None and not grid.has_results:
            outbox.put("describe", parent, text=f"Stopped: {reached.told}.")
        raise
    except KeyboardInterrupt:
        ignore_interrupts()
        outcome = "interrupted"
        raise Interrupted(session.name) from None
    finally:
        try:
            if parent is not None:
                outbox.put("finish", parent, outcome=outcome, when=int(time.time() * 1000))
            if outcome == "finished":
                outbox.drain()
            else:
                outbox.empties()
        finally:
            outbox.close()
            ray.shutdown()


class _Listed(Exception):
    """A dry run has come to its end."""


class _DryRun(Grid):
    """Lists cells instead of running them."""

    def __init__(self, config: GridOfConfigs, experiment: str) -> None:
        archive = Archive(locations.tracking_uri(config.run))
        self._known = pd.DataFrame(columns=["cell", "outcome"])
        if experiment in archive.experiments():
            self._known = archive.rows(experiment).dropna(subset="cell")
            self._known = self._known[self._known.to_supersede.isna()]
        self._config = config
        self._budget = Budget(config.grid.max_cost)
        name = config.run.name or experiment
        before = archive.recorded(experiment) if experiment in archive.experiments() else []
        for run in before:
            if run.name == name and run.parent is None:
                children = archive.family(run)[1:]
                self._budget.add(sum(child.metrics.get("cost_usd", 0.0) for child in children))

    def run(
        self, base: Config, cells: Sequence[dict[str, Any]], keep_weights: bool = False
    ) -> pd.DataFrame:
        configs = [replace(_common(base), **settings) for settings in cells]
        found = rows_of([Cell(config) for config in configs], self._known)
        outcomes = ["again" if self._config.grid.force else o for o in found.outcome]
        priced = self._budget.limit is not None
        placement: Placement = cluster.foresee(self._config.scale, priced)
        finals: FinalsConfig = getattr(self._config, "finals", FinalsConfig())
        show_plan(cells, configs, outcomes, self._known, placement, self._budget, finals.trainings)
        raise _Listed


class CellLedger:
    """Proposes the cells that have no result, and writes down what becomes of them, in MLflow."""

    def __init__(
        self,
        session: Session[Any],
        outbox: Outbox,
        parent: str,
        base: Config,
        settings: Sequence[dict[str, Any]],
        force: bool = False,
        keep_weights: bool = False,
        budget: Budget | None = None,
    ) -> None:
        """Closes what an earlier process left running.

        Args:
            force: run what has a result again, and let the new one supersede it.
            keep_weights: keep every cell's checkpoint, not the best one's alone; a result whose
                checkpoint is gone is as good as none.
            budget: what the grid may cost, with what it has cost before.
        """
        self.budget = budget or Budget()
        self._session, self._tracker, self._parent = session, session.tracker, parent
        self._outbox, self._keep_weights = outbox, keep_weights
        self._settings = list(settings)
        self.cells = [Cell(replace(base, **one)) for one in settings]
        ids = " ".join(sorted(cell.id for cell in self.cells))
        self._rivals = NO_RIVALS if keep_weights else hashlib.sha256(ids.encode()).hexdigest()[:16]
        self._without_weights: set[str] = set()
        self.release()
        self.repeats = len(self._old) > 0
        """Whether an earlier command began to repeat results, and did not come to its end."""
        if force or keep_weights:
            self._find_old(force)
            self.release()

    def _find_old(self, force: bool) -> None:
        """Notes which results are to be superseded: all, but for those that came of an earlier
        command that began to repeat; else those whose weights are needed and gone."""
        done = self._known[self._known.outcome.isin(DONE) & ~self._known.to_supersede]
        if force and not self.repeats:
            for run in done.itertuples():
                self._outbox.put("tag", run.run_id, key="to_supersede", value="true")
        elif self._keep_weights:
            finished = done[done.outcome == "finished"]
            without = [_has_no_checkpoint(folder) for folder in finished.folder]
            self._without_weights = set(finished.run_id[without])

    def release(self) -> None:
        """Reads what MLflow says of every cell; none of this grid is left running."""
        runs = self._outbox.read(self._tracker.cells)
        for run in runs[runs.parent == self._parent].itertuples():
            ended: Outcome = "interrupted" if run.outcome == "running" else run.outcome
            if not has_ended(run, ended):
                self._outbox.put("finish", run.run_id, outcome=ended)
        runs = self._outbox.read(self._tracker.cells)
        self._known = runs = runs[runs.cell.isin({cell.id for cell in self.cells})]
        old = runs.to_supersede | runs.run_id.isin(self._without_weights)
        old &= runs.outcome.isin(DONE)
        self._old = runs[old]
        self.rows = found = self._rows(runs[~old])
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
        self._winner = Winner()
        if not self._keep_weights:
            for run in found.drop_duplicates("cell").itertuples():
                if run.outcome == "finished" and run.parent == self._parent:
                    checkpoints = Checkpoints.of_run(run.folder)
                    self._winner.ended(run.val_top1, run.Index + 1, checkpoints)

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
        else:
            tags = {
                **self._session.tags,
                "kind": "cell",
                "cell": cell.id,
                "parent": self._session.name,
                "folder": proposal.folder,
                "rivals": self._rivals,
            }
            run, epoch = self._outbox.start(_name(proposal.settings), tags, self._parent), None
        self._records[proposal.number] = RunRecord(self._outbox, run, cell.config, epoch)

    def reported(self, number: int, metrics: dict[str, Any]) -> bool:
        """Writes down an epoch's metrics, once; no cell is ever cut."""
        self.budget.add(self._records[number].report(metrics))
        return False

    def ended(
        self, number: int, outcome: Outcome, value: float | None, error: str | None = None
    ) -> None:
        """Closes the cell's run, lets it supersede the result that there was, and forgets all
        checkpoints that are not needed."""
        self._records[number].finish(outcome, error)
        if outcome not in DONE:
            return
        old = self._old[self._old.cell == self.cells[number - 1].id]
        for run in old.drop_duplicates("run_id").itertuples():
            self._outbox.put("tag", run.run_id, key="superseded", value="true")
            Checkpoints.of_run(run.folder).purge()
        if not self._keep_weights:
            value = value if outcome == "finished" else None
            self._winner.ended(value, number, Checkpoints.of_run(self._folders[number]))

    def _new_folder(self, cell: Cell) -> str:
        """One that no run of the cell has used, whether MLflow still knows of it or not."""
        attempts = self._attempts[cell.id]
        while True:
            suffix = f"-{attempts + 1}" if attempts else ""
            folder = f"{self._session.folder}/cells/{cell.id}{suffix}"
            if _has_no_checkpoint(folder):
                return folder
            attempts += 1


def _has_no_checkpoint(folder: str) -> bool:
    return Checkpoints.of_run(folder).last_epoch() is None


def _name(settings: dict[str, Any]) -> str:
    """A cell's settings in a line; where it is cut, what tells cells apart stands first."""
    last = ("model", "seed")
    return describe({key: settings[key] for key in sorted(settings, key=last.__contains__)})


def _common(base: Config) -> Config:
    """What cells have in common, without the name and places of one run."""
    # Workers run in folders of their own.
    dataset = locations.absolute(base.data.dataset)
    return replace(base, name=None, tracking_uri=None, storage=None, dataset=dataset)


def _with_settings(rows: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
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


def rows_of(cells: Sequence[Cell], runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell, in order: its result if it has one, else its latest run, else nothing
    but its `cell` and the `outcome` "missing".

    Args:
        runs: rows of cells' runs (see `Tracker.cells`).
    """
    latest = one_each(runs).set_index("cell")
    found = latest.reindex([cell.id for cell in cells])
    found["outcome"] = found.outcome.fillna("missing")
    return found.reset_index(names="cell")
