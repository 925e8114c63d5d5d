"""A sweep from its configuration to its answer: search, record, read back, draw."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import ray
from ray.tune import Checkpoint

from nflab import figures, tune
from nflab.config import SweepConfig, flat, to_json
from nflab.progress import console
from nflab.recipes import RECIPES
from nflab.session import Session, open_session


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, as MLflow recorded it."""

    trials: pd.DataFrame
    """One row a trial, best first (see `Tracker.trials`); `val_top1` and `test_top1` in percent."""
    importances: dict[str, float]
    """Share of the variance in validation top-1 by searched setting."""
    folder: Path
    """Where the figures and the table are."""
    run_id: str
    """The parent run."""


def run_sweep(config: SweepConfig, experiment: str) -> SweepResult:
    """Runs a validated sweep on the cluster, as runs of the MLflow experiment `experiment`.

    Raises:
        ConfigError: the tracking store or the cluster cannot be used, or is too small.
    """
    session = open_session(config, experiment)
    tracker = session.tracker
    space = RECIPES[config.data.dataset].space
    searched = {key: f"searched: {space.describe(key)}" for key in config.search.searched}
    out = console()
    out.print(
        f"sweep {session.name}: {config.search.trials} trials of {config.schedule.epochs} epochs, "
        f"{session.placement}"
    )
    parent = tracker.start(session.name, {**flat(config), **searched}, session.tags)
    tracker.add_text(parent, to_json(config), "config.json")
    try:
        checkpoints = tune.search(config, session, parent)
    except BaseException:
        tracker.finish(parent, "failed")
        raise
    finally:
        ray.shutdown()
    return _conclude(config, session, parent, checkpoints)


def _conclude(
    config: SweepConfig, session: Session, parent: str, checkpoints: dict[str, str]
) -> SweepResult:
    """Reads back what was recorded, draws it, and stores the answer with the parent run."""
    tracker, storage = session.tracker, session.storage
    trials = tracker.trials(parent)
    # Only a trial that went to its end can win; the rest follow in the order of their last result.
    trials["done"] = trials.outcome == "finished"
    trials = trials.sort_values(["done", tune.METRIC], ascending=False).drop(columns="done")
    space, searched = RECIPES[config.data.dataset].space, config.search.searched
    shares = figures.importances(trials, space, searched)
    folder = Path(
        tempfile.mkdtemp(prefix="nflab-") if "://" in storage else f"{storage}/{session.name}"
    )
    curves = [
        (row["name"], row.outcome, tracker.history(row.run_id, tune.METRIC))
        for _, row in trials.iterrows()
    ]
    size = f"{config.model.model} on {config.data.dataset}, {config.schedule.epochs} epochs"
    figures.draw_top1(trials, folder / "top1.png", f"Validation top-1: {size}")
    figures.draw_importances(
        shares, folder / "importances.png", f"What mattered in {len(trials)} trials: {size}"
    )
    figures.draw_learning_curves(curves, folder / "learning_curves.png", f"Learning curves: {size}")
    trials.to_csv(folder / "trials.csv", index=False)
    for path in [*sorted(folder.glob("*.png")), folder / "trials.csv"]:
        tracker.add_file(parent, path)
    best = trials.iloc[0]
    if best.outcome == "finished":
        tracker.log(parent, {key: best[key] for key in ("val_top1", "test_top1")}, 0)
        with Checkpoint(checkpoints[best.run_id]).as_directory() as checkpoint:
            for file in ("weights.pt", "config.json"):
                tracker.add_file(parent, Path(checkpoint) / file, "best_trial")
    tracker.finish(parent, "finished" if best.outcome == "finished" else "failed")
    return SweepResult(trials, shares, folder, parent)
