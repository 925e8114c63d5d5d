"""A grid of runs in which a cell is its configuration.

Cells are known by what they compute, wherever and whenever they were run: a grid that is asked for
again runs only what MLflow does not have the result of.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from nflab.analysis.ranking import ranked
from nflab.cluster import connection
from nflab.cluster.placement import Placement
from nflab.data import example_image, load_dataset
from nflab.learning.validation import validate
from nflab.recording.archive import Archive
from nflab.recording.notes import grid_note
from nflab.recording.run_record import dataset_entry
from nflab.running.budget import Budget
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.locations import WEIGHTS
from nflab.settings.outcomes import DONE
from nflab.settings.serialization import from_json, to_json
from nflab.settings.studies import FinalsConfig, GridOfConfigs, needs_prices
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import is_local
from nflab.studies.cell_ledger import CellLedger
from nflab.studies.cells import Cell, common_part, rows_of, with_settings
from nflab.studies.costs import cost_sentences, gpu_sentences, totals
from nflab.studies.life_cycle import LiveRun, live_run
from nflab.studies.plan import how_long, show_plan
from nflab.studies.seeds import over_seeds
from nflab.terminal.interrupts import BudgetReached
from nflab.terminal.progress import SweepProgress
from nflab.terminal.wording import console


class Grid:
    """Cells that are run and read back, as children of one run in MLflow."""

    def __init__(self, run: LiveRun[Any], force: bool = False) -> None:
        """`force`: train again what has a result."""
        self._run, self._force = run, force
        self._session, self._outbox, self._budget = run.session, run.outbox, run.budget
        self.parent, self.tracker = run.run_id, run.tracker
        self.has_results = False
        self._over_seeds: dict[str, float] = {}
        self.stopped = False
        """Whether cells were not run, or not to their end, because the budget was reached."""

    def run(
        self,
        base: Config,
        cells: Sequence[dict[str, Any]],
        keep_weights: bool = False,
        prefix: str = "",
    ) -> pd.DataFrame:
        """Runs those cells that have no result yet, as many at once as the cluster holds.

        Args:
            base: what all cells have in common.
            cells: for each, the settings in which it differs, in the order in which they are run.
            keep_weights: whether every cell's weights are needed, not the best one's alone.
            prefix: tells what they reach over seeds from what other cells of the grid do.

        Returns:
            a row for each cell, in order (see `Tracker.cells`); one that failed, or was stopped or
            not begun because of the budget, has no `test_top1`.

        Raises:
            BudgetReached: no cell has a result, for that reason.
            ConfigError: a cell cannot be run, or no cell has a result, for all failed.
        """
        session = self._session
        run_uri, storage = session.config.run.tracking_uri, session.config.run.storage
        for one in {repr(c): c for c in ({**cell, "seed": 0} for cell in cells)}.values():
            validate(replace(base, **one))
        base = replace(common_part(base), tracking_uri=run_uri, storage=storage)
        ledger = CellLedger(self._run, base, cells, self._force, keep_weights)
        done = len(cells) - ledger.missing
        console().print(
            f"{session.name}: {len(cells)} cells ({done} done) of {base.schedule.epochs} epochs on "
            f"{base.data.dataset}, {session.placement}"
        )
        past = self._outbox.read(lambda: Archive(self.tracker.uri).rows(self.tracker.experiment))
        told = how_long([cell.config for cell in ledger.waiting], past, session.placement)
        if told:
            console().print(f"what is missing takes {told}", markup=False)
        if ledger.repeats:
            console().print("what an earlier --force began goes on: give it again to repeat more")
        if base.run.diagnostics and done:
            console().print(f"{done} cells keep what they recorded: --force records diagnostics")
        progress = SweepProgress(len(cells), done, base.schedule.epochs, "cell")
        self._run.work(base, ledger, progress)
        unfinished = ledger.rows.outcome.isin(["missing", "interrupted"]).any()
        found = ledger.results()
        self.has_results |= bool(found.outcome.isin(DONE).any())
        if unfinished and self._budget.reached:
            self.stopped = True
            if not self.has_results:
                raise self.budget_reached()
        if not self.has_results:
            raise ConfigError("every cell failed: what follows `logs:` above says where to look")
        self._over_seeds |= over_seeds(cells, found, prefix)
        return with_settings(found, ledger.cells)

    def record_seeds(self) -> None:
        """Stores what settings reach over their seeds (see `over_seeds`), of all that were run; the
        best are those of what was run last."""
        self._outbox.read(lambda: self.tracker.log_anew(self.parent, self._over_seeds))

    def budget_reached(self) -> BudgetReached:
        """What tells a person that the grid was stopped, and how to go on."""
        return BudgetReached(self._session.name, str(self._budget))

    def ids(self, base: Config, cells: Sequence[dict[str, Any]]) -> list[str]:
        """The identity of each cell that `run` would be asked for."""
        return [Cell(replace(common_part(base), **settings)).id for settings in cells]

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
        runs = self._outbox.read(lambda: self.tracker.children(self.parent))
        total = {**totals(runs), **self._run.cluster_cost()}
        self.record_seeds()
        self._outbox.read(lambda: self.tracker.log_anew(self.parent, total))
        costs = [*cost_sentences(total, self._run.unpriced), *gpu_sentences(runs)]
        costs += [f"Stopped: {self._budget}."] * self.stopped
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
        best = ranked(table, "cell").iloc[0]
        if best.outcome != "finished":
            return
        with Checkpoints.of_run(best.folder).last() as last:
            if last.damaged is not None:
                console().print(f"{last.damaged}: no weights are stored", markup=False)
                return
            checkpoint = last.folder
            if checkpoint is None:
                said = f"the weights of the best cell, {best['name']}, are not stored any more"
                if best.parent != self.parent:
                    said += ": another grid trained it, and keeps those of its own best cell only"
                console().print(said, markup=False)
                return
            config = from_json(Config, (checkpoint / "config.json").read_text(encoding="utf-8"))
            top1 = {key: float(best[key]) for key in ("val_top1", "test_top1")}
            self.tracker.log_anew(self.parent, top1)
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
        ConfigError: the configuration, a store or the cluster cannot be used.
        Interrupted: Ctrl-C or SIGTERM, or its budget is reached.
    """
    validate(config)
    if config.grid.dry_run:
        with suppress(_Listed):
            yield _DryRun(config, experiment)
        return
    named = replace(config, name=config.run.name or experiment, dry_run=False, force=False)
    with live_run(named, experiment, "grid", resume=True) as run:
        run.outbox.put("add_text", run.run_id, text=to_json(run.config), file="config.json")
        run.outbox.put("log_dataset", run.run_id, **dataset_entry(run.config))
        grid = Grid(run, config.grid.force)
        try:
            yield grid
        except BudgetReached as reached:
            if not grid.has_results:
                run.outbox.put("describe", run.run_id, text=f"Stopped: {reached.told}.")
            raise
        if grid.stopped:
            raise grid.budget_reached()


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
        before = archive.runs(experiment) if experiment in archive.experiments() else []
        for run in before:
            if run.name == name and run.parent is None:
                children = archive.family(run)[1:]
                usd = sum(child.metrics.get("cost_usd", 0.0) for child in children)
                self._budget.add(max(usd, run.metrics.get("cluster_usd", 0.0)))

    def run(
        self,
        base: Config,
        cells: Sequence[dict[str, Any]],
        keep_weights: bool = False,
        prefix: str = "",
    ) -> pd.DataFrame:
        configs = [replace(common_part(base), **settings) for settings in cells]
        found = rows_of([Cell(config) for config in configs], self._known)
        outcomes = ["again" if self._config.grid.force else o for o in found.outcome]
        priced = needs_prices(self._config)
        placement: Placement = connection.foresee(self._config.scale, priced)
        finals: FinalsConfig = getattr(self._config, "finals", FinalsConfig())
        show_plan(cells, configs, outcomes, self._known, placement, self._budget, finals.trainings)
        raise _Listed
