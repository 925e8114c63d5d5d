"""The life of a recorded run, of whatever kind: it is opened, begins, works, concludes, is closed.

Here alone stands what an interrupt, a budget, an error and an MLflow that is away do to it.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic

from nflab.cluster import connection
from nflab.cluster.bill import Meter, metered
from nflab.recording.outbox import Outbox
from nflab.recording.roots import FOLDER, WITHDRAWN, begin_root
from nflab.recording.run_record import ERROR_LENGTH
from nflab.running.budget import Budget
from nflab.running.ledger import Ledger
from nflab.running.tuner import FAILURES_IN_A_ROW, run_trials
from nflab.settings import recipe_files
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import C, flat
from nflab.settings.outcomes import Outcome
from nflab.settings.studies import GridOfConfigs
from nflab.storage.files import Away, read_text, write_text
from nflab.storage.ownership import Owned
from nflab.studies.costs import spent
from nflab.studies.session import Session, open_session
from nflab.terminal.interrupts import (
    BudgetReached,
    Interrupted,
    ignore_interrupts,
    raise_on_interrupt,
)
from nflab.terminal.progress import SweepProgress
from nflab.terminal.wording import say

RECIPE = "recipe.yaml"
"""Artifact of a run with the file that its recipe is, if that is one of one's own."""

BILL = "cluster_usd.json"
"""File of what the cluster has cost, in the driver's own folder."""


class LiveRun(Generic[C]):
    """A run while it lives."""

    def __init__(self, session: Session[C], outbox: Outbox, run_id: str, budget: Budget) -> None:
        self.session, self.outbox, self.run_id, self.budget = session, outbox, run_id, budget
        self.config, self.tracker = session.config, session.tracker
        self.outcome: Outcome = "finished"
        """How it ends, unless an interrupt, its budget or an error ends it before."""
        self.error: str | None = None
        """Why it failed."""
        self.under_way: Ledger | None = None
        """Of whose trials some may be running."""
        self.finish: Callable[[Outcome, str | None], None] = self._finish
        """Writes down how it ended."""
        self.meter: Meter | None = None
        """Counts what the whole cluster costs, if it is on AWS."""

    def cluster_cost(self) -> dict[str, float]:
        """What the whole cluster has cost, as a metric, where it is known; it is not counted any
        longer."""
        if self.meter is None:
            return {}
        self.meter.settle()
        usd = self.meter.bill.usd
        return {} if usd is None else {"cluster_usd": usd}

    def record_cost(self) -> None:
        """Tells MLflow so, of a run of any kind, however it ends."""
        if found := self.cluster_cost():
            self.outbox.put("log_anew", self.run_id, metrics=found)

    @property
    def unpriced(self) -> tuple[str, ...]:
        """What of the cluster has no price, in words."""
        return () if self.meter is None else self.meter.bill.unpriced

    def work(self, base: Config, ledger: Ledger, progress: SweepProgress) -> None:
        """Trains what a ledger misses, unless the budget is reached; whatever happens, nothing of
        it is left marked as running.

        Args:
            base: what all that is trained has in common.

        Raises:
            ConfigError: several in a row failed with one cause, so the rest were not begun.
        """
        self.under_way = ledger
        cause = None
        if ledger.missing and not self.budget.reached:
            cause = run_trials(base, self.session.placement, ledger, progress)
        ledger.release()
        self.under_way = None
        if cause is not None and ledger.missing:
            again = f"go on with --resume {self.session.name} --retry-failed"
            if isinstance(self.config, GridOfConfigs):
                again = "run the same command again"
            raise ConfigError(
                f"stopped, for {FAILURES_IN_A_ROW} in a row failed with one cause: {cause} (logs "
                f"are in {self.session.folder}); when that is mended, {again}"
            )

    def _finish(self, outcome: Outcome, error: str | None) -> None:
        tags = {} if error is None else {"error": error[:ERROR_LENGTH]}
        when = int(time.time() * 1000)
        self.outbox.put("finish", self.run_id, outcome=outcome, tags=tags, when=when)


@contextmanager
def live_run(config: C, experiment: str, kind: str, resume: bool) -> Iterator[LiveRun[C]]:
    """A run of a validated configuration, while it is worked on and concluded in the block.

    Args:
        kind: what it is tagged as: training, sweep or grid.
        resume: continue the run called `config.run.name`; else the name must be new.

    Raises:
        ConfigError: it cannot be opened (see `open_session`), another process runs it, or MLflow
            stays away.
        Interrupted: Ctrl-C or SIGTERM, or its budget is reached; it can be resumed.
    """
    begun = time.time()
    session = open_session(config, experiment, resume)
    outbox: Outbox | None = None
    run: LiveRun[C] | None = None
    concluded = False
    try:
        outbox = _outbox(session)
        run = _begin(session, outbox, kind)
        run.outbox.put("reopen", run.run_id)
        if recipe_files.is_file(session.config.run.recipe):
            with suppress(ConfigError):  # gone since: it was recorded when the run began
                kept = recipe_files.text(session.config.run.recipe)
                run.outbox.put("add_text", run.run_id, text=kept, file=RECIPE)
        run.budget.add(run.outbox.read(lambda: spent(session.tracker.children(run.run_id))))
        bill = session.local_folder / BILL
        with metered(session.placement.cluster, bill, begun) as run.meter:
            run.budget.bill = None if run.meter is None else run.meter.bill
            yield run
            run.record_cost()
        run.finish(run.outcome, run.error)
        concluded = True
        run.outbox.drain()
    except KeyboardInterrupt:
        if not concluded:
            _stop(run, "interrupted")
        raise Interrupted(session.name) from None
    except BudgetReached:
        _stop(run, "interrupted")
        raise
    except BaseException as error:
        if not concluded:
            told = str(error) if isinstance(error, ConfigError) else traceback.format_exc()
            _stop(run, "failed", told)
        raise
    finally:
        ignore_interrupts()
        if outbox is not None:
            outbox.close()
        connection.disconnect()
        session.ownership.release()
        raise_on_interrupt()


def _outbox(session: Session[C]) -> Outbox:
    """What MLflow is to be told of the run.

    Raises:
        ConfigError: what another run of this name left there has not been sent.
    """
    folder = session.outbox_folder
    owner, waiting = folder / "run", folder / "requests.jsonl"
    known = read_text(str(owner)) or session.identity.id
    if known != session.identity.id and waiting.is_file() and waiting.stat().st_size:
        raise ConfigError(
            f"{folder} holds what another run called {session.name!r} has yet to tell MLflow: "
            "continue that one first, or move it away"
        )
    write_text(str(owner), session.identity.id)
    return Outbox(session.tracker, folder)


def _begin(session: Session[C], outbox: Outbox, kind: str) -> LiveRun[C]:
    """The run in MLflow, made if there is none, and claimed for this process."""
    tracker = session.tracker
    tags = {**session.tags, "kind": kind}
    run_id, new = outbox.read(lambda: begin_root(tracker, session.identity, session.folder, tags))
    try:
        board = tracker.board(session.name, run_id)
        outbox.read(lambda: session.ownership.take(board, session.name, say))
    except BaseException as error:
        if new and isinstance(error, Owned):
            tracker.tag(run_id, WITHDRAWN, "true")
            tracker.withdraw(run_id)
        elif new:
            when = int(time.time() * 1000)
            outbox.put("finish", run_id, outcome="interrupted", when=when)
        raise
    tracker.tag(run_id, FOLDER, session.folder)  # it may have moved
    return LiveRun(session, outbox, run_id, Budget(flat(session.config).get("max_cost")))


def _stop(run: LiveRun[C] | None, outcome: Outcome, error: str | None = None) -> None:
    """Leaves nothing marked as running, if MLflow answers; else whoever continues the run, or
    audits it, sets it right."""
    ignore_interrupts()
    if run is None or run.session.ownership.lost:
        return
    if run.under_way is not None and run.outbox.empties():
        with suppress(Exception):  # it has gone meanwhile; how the run ended is written down
            run.under_way.release()
    with suppress(Away):  # the disk has been full for long: what can be told was
        run.record_cost()
        run.finish(outcome, error)
    run.outbox.empties()
