"""A sweep from its configuration to its answer: search, record, read back, draw."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nflab.analysis import figures
from nflab.analysis.findings import Findings
from nflab.analysis.ranking import on_front, ranked
from nflab.analysis.statistics import Importance
from nflab.data import example_image, load_dataset
from nflab.learning.validation import validate
from nflab.recording.notes import sweep_note
from nflab.recording.run_record import dataset_entry
from nflab.running.ledger import METRIC
from nflab.searching.beforehand import as_trials
from nflab.searching.importances import importances, judged
from nflab.searching.trial_ledger import TrialLedger, trial_folder
from nflab.settings import locations
from nflab.settings.leaves import as_text, flat, replace
from nflab.settings.recipes import batch_sizes_of, lookahead, scales_of
from nflab.settings.search_space import Scale, setting
from nflab.settings.serialization import to_json
from nflab.settings.studies import SearchConfig, SweepConfig
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import is_local
from nflab.studies.beforehand import find_results, results_before
from nflab.studies.costs import cost_sentences, gpu_sentences, totals
from nflab.studies.finals import run_finals
from nflab.studies.grid import Grid
from nflab.studies.life_cycle import LiveRun, live_run
from nflab.studies.session import Session
from nflab.terminal.interrupts import BudgetReached
from nflab.terminal.progress import SweepProgress
from nflab.terminal.wording import say

MANY = 3
"""Settings that two figures of two show well."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, as MLflow recorded it."""

    name: str
    trials: pd.DataFrame
    """One row a trial, best first (see `Tracker.trials`); `val_top1` and `test_top1` in percent; of
    several aims those on the `front` first."""
    importances: dict[str, Importance]
    """How much each searched setting mattered, the most important first."""
    judged: int
    """Trials that the importances rest on."""
    finals: list[str]
    """What repeating the best settings over fresh seeds says, in sentences; empty without."""
    costs: list[str]
    """What it cost and what pruning saved, in sentences."""
    stopped: str | None
    """What was spent, in words, if the sweep was stopped at its budget."""
    folder: Path
    """Where the figures and the table are."""
    run_id: str
    """The parent run."""


def run_sweep(config: SweepConfig, experiment: str, resume: bool = False) -> SweepResult:
    """Runs a sweep on the cluster, as runs of the MLflow experiment `experiment`.

    Args:
        resume: continue the sweep called `config.run.name`: run what it misses.

    Raises:
        ConfigError: the configuration, the name, a store or the cluster cannot be used.
        Interrupted: Ctrl-C or SIGTERM, or its budget is reached before a trial has begun; the sweep
            can be resumed.
    """
    validate(config)
    retry_failed = config.search.retry_failed
    config = replace(config, retry_failed=False)  # asked for this once
    # Before there is a run: what does not fit leaves nothing behind.
    found = None if resume else find_results(locations.located(config))
    with live_run(config, experiment, "sweep", resume) as run:
        session, outbox, parent = run.session, run.outbox, run.run_id
        config = run.config
        planned = config.search.trials
        params = {key: as_text(value) for key, value in flat(config).items()}
        params |= {key: f"searched: {scale}" for key, scale in scales_of(config).items()}
        outbox.put("log_params", parent, params=params)
        outbox.put("add_text", parent, text=to_json(config), file="config.json")
        outbox.put("add_text", parent, text=json.dumps(session.class_names), file="classes.json")
        outbox.put("log_dataset", parent, **dataset_entry(config))
        beforehand = results_before(run, found)
        ledger = TrialLedger(
            config,
            session.identity,
            session.folder,
            session.local_folder / "study.db",
            run.tracker,
            outbox,
            parent,
            session.tags,
            _samples_per_epoch(config),
            run.budget,
            retry_failed,
            as_trials(scales_of(config), beforehand),
        )
        missing = ledger.missing
        before = planned - missing
        done = f" ({before} done)" if before else ""
        say(
            f"sweep {session.name}: {planned} trials{done} of {config.schedule.epochs} epochs, "
            f"{session.placement}"
        )
        ahead, at_once = lookahead(config), session.placement.max_concurrent
        if ahead < min(at_once, missing):
            say(
                f"lookahead {ahead} keeps {at_once - ahead} of {at_once} places for trials idle: a "
                "larger one would know less of the trials before it"
            )
        progress = SweepProgress(planned, before, config.schedule.epochs, best=ledger.best)
        run.work(config.base(), ledger, progress)
        stopped = run.budget.reached and ledger.missing > 0
        return outbox.read(lambda: _conclude(run, stopped))


def _samples_per_epoch(config: SweepConfig) -> int:
    """The fewest training images that an epoch of whole batches has, over the batch sizes."""
    size = load_dataset(config).sizes["train"]
    return min(size // batch_size * batch_size for batch_size in batch_sizes_of(config))


def _conclude(run: LiveRun[SweepConfig], stopped: bool) -> SweepResult:
    """Reads back what was recorded, draws it, and stores the answer with the parent run; done again
    it changes nothing.

    Args:
        stopped: whether the budget was reached before all trials had come to their end.

    Raises:
        BudgetReached: it was before any had begun.
    """
    session, parent, budget = run.session, run.run_id, run.budget
    config, tracker = session.config, session.tracker
    trials = tracker.trials(parent)
    if stopped and trials.empty:
        raise BudgetReached(session.name, str(budget))
    objectives, scales = config.search.objectives, scales_of(config)
    for metric in (*objectives, "test_top1"):  # no trial may have come to one
        if metric not in trials:
            trials[metric] = float("nan")
    if len(objectives) > 1:
        trials = trials.assign(front=on_front(trials, "number", objectives))
    trials = ranked(trials, "number", objectives)
    told = judged(trials)
    shares = importances(trials, scales)
    folder = Path(session.folder if is_local(session.folder) else tempfile.mkdtemp("-nflab"))
    curves = [
        (row["name"], row.outcome, tracker.history(row.run_id, METRIC))
        for _, row in trials.iterrows()
    ]
    model = "several models" if "model" in scales else config.model.model
    size = f"{model} on {config.data.dataset}, {config.schedule.epochs} epochs"
    if scales.keys() <= set(SearchConfig().searched):
        figures.draw_top1(trials, folder / "top1.png", f"Validation top-1: {size}")
    else:
        _draw_settings(trials, scales, list(shares), folder, size)
    figures.draw_importances(
        shares, folder / "importances.png", f"What mattered in {len(told)} trials: {size}"
    )
    figures.draw_learning_curves(curves, folder / "learning_curves.png", f"Learning curves: {size}")
    trials.to_csv(folder / "trials.csv", index=False)
    settled = None
    if config.finals.finalists and not stopped:
        grid = Grid(run)
        grid.has_results = True  # the trials', whatever becomes of finals
        settled = _finals(grid, session, trials)
        stopped = grid.stopped
    if len(objectives) > 1:
        # What another sweep or grid trained was perhaps measured on other machines.
        own = {
            label: rows[rows.parent == parent]
            for label, rows in ({} if settled is None else settled.repeated).items()
        }
        figures.draw_front(trials, objectives, folder / "front.png", f"Front: {size}", own)
    if settled is not None:
        for name, draw in settled.drawings.items():
            draw(folder / f"{name}.png")
    said = [] if settled is None else [*settled.text]
    drawn = sorted(folder.glob("*.png"), reverse=True)
    for path in [*drawn, folder / "trials.csv"]:
        tracker.add_file(parent, path)
    best = trials.iloc[0]
    if best.outcome == "finished":
        tracker.log_anew(parent, {key: float(best[key]) for key in ("val_top1", "test_top1")})
    if best.outcome == "finished" and not stopped:  # a better one may yet come
        checkpoints = Checkpoints.of_run(trial_folder(session.folder, best.number))
        with checkpoints.last() as last:
            if last.damaged is not None:
                said.append(f"{last.damaged}: no weights are stored")
            elif last.folder is not None:
                tracker.add_model(parent, last.folder, example_image(config), "best_trial")
                tracker.register_model(
                    parent,
                    config.data.dataset,
                    session.tags["dataset_fingerprint"],
                    f"{best.model}, best trial of the sweep {session.name}: {best['name']}",
                )
    names = [path.name for path in drawn]
    runs = tracker.children(parent)
    total = {**totals(runs, config.schedule.epochs), **run.cluster_cost()}
    tracker.log_anew(parent, total)
    costs = [
        *cost_sentences(total, run.unpriced),
        *gpu_sentences(runs),
        *([f"Stopped: {budget}."] if stopped else []),
    ]
    note = sweep_note(
        tracker.experiment,
        parent,
        config,
        scales,
        trials,
        shares,
        told,
        [*said, *costs],
        names,
    )
    tracker.describe(parent, note)
    failed = bool((trials.outcome == "failed").all())
    run.outcome = "interrupted" if stopped else "failed" if failed else "finished"
    halt = str(budget) if stopped else None
    return SweepResult(session.name, trials, shares, len(told), said, costs, halt, folder, parent)


def _draw_settings(
    trials: pd.DataFrame,
    scales: Mapping[str, Scale],
    by_importance: list[str],
    folder: Path,
    size: str,
) -> None:
    """Top-1 over each setting, over the two that matter most, and over many side by side."""
    title = f"Validation top-1: {size}"
    figures.draw_slices(trials, scales, folder / "slices.png", title)
    if len(scales) > 1:
        two = (by_importance or list(scales))[:2]
        figures.draw_map(trials, scales, two, folder / "map.png", title)
    if len(scales) > MANY:
        figures.draw_parallel(trials, scales, folder / "parallel.png", title)


def _finals(grid: Grid, session: Session[SweepConfig], trials: pd.DataFrame) -> Findings:
    """The best settings repeated over fresh seeds.

    Args:
        trials: the best first.
    """
    finals, searched = session.config.finals, scales_of(session.config)
    best = trials[trials.outcome == "finished"].drop_duplicates(list(searched))
    if len(session.config.search.objectives) > 1:
        best = spread(best[best.front], finals.finalists)
    best = best.head(finals.finalists)
    settings = [{name: setting(name, row[name]) for name in searched} for _, row in best.iterrows()]
    return run_finals(grid, session.config.base(), settings, finals)


def spread(front: pd.DataFrame, count: int) -> pd.DataFrame:
    """So many trials of a front, evenly along its order, both ends among them."""
    places = np.linspace(0, len(front) - 1, min(count, len(front))).round().astype(int)
    return front.iloc[places]
