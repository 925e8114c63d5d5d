"""Searching over configurations with Ray Tune, Optuna's TPE and ASHA."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from ray.tune import Callback, CheckpointConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from nflab.cluster import LEFT_FOR_TRIAL
from nflab.config import Config, SweepConfig, flat, replace, to_json
from nflab.loop import Worker, train
from nflab.progress import SweepProgress
from nflab.recipes import RECIPES, SearchSpace
from nflab.session import Session
from nflab.tracking import Outcome
from nflab.train import device_of, fit

METRIC = "val_top1"
"""What the search maximises: validation top-1 in percent, of a trial's last epoch."""

STARTUP_TRIALS = 4
"""Random trials before TPE models the results, so that 12 trials are a search."""


def search(config: SweepConfig, session: Session, parent: str) -> dict[str, str]:
    """Runs the trials of a sweep, each recorded as a child run of `parent`.

    Returns:
        The folder of each trial's last checkpoint, by the id of its run; none for a trial that
        ended before its first.
    """
    space = RECIPES[config.data.dataset].space
    recorder = _Recorder(config, space, session, parent)
    sampler = optuna.samplers.TPESampler(seed=config.run.seed, n_startup_trials=STARTUP_TRIALS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    epochs = config.schedule.epochs
    tuner = Tuner(
        trainable(config.base(), space, session),
        tune_config=TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.search.trials,
            max_concurrent_trials=session.placement.max_concurrent,
            search_alg=OptunaSearch(
                space.distributions(config.search.searched),
                metric=METRIC,
                mode="max",
                sampler=sampler,
            ),
            # An epoch is the same number of images whatever the batch size; nothing is judged
            # before its warm-up is over.
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=epochs + 1,  # the last epoch's report ends a trial, not the scheduler
                grace_period=min(epochs, max(epochs // 4, int(config.schedule.warmup_epochs) + 1)),
                reduction_factor=3,
            ),
        ),
        run_config=RunConfig(
            name=session.name,
            storage_path=session.storage,
            callbacks=[recorder],
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            verbose=0,
        ),
    )
    with recorder.progress:
        tuner.fit()
    return recorder.checkpoints


def trainable(
    base: Config, space: SearchSpace, session: Session
) -> Callable[[dict[str, Any]], None]:
    """The Tune function that trains one configuration, with the resources it asks for.

    One worker trains in the trial's own process: Ray Train would start two more, which takes
    longer than a small run. More workers are a Ray Train run of their own.
    """

    placement, folder_of_trials = session.placement, f"{session.storage}/{session.name}"

    def in_this_process(drawn: dict[str, Any]) -> None:
        checkpoint = ray.tune.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            worker = Worker(
                report=_report,
                device=device_of(placement),
                resume_from=Path(folder) if folder else None,
            )
            train(replace(base, **space.settings(drawn)), worker)

    def with_own_workers(drawn: dict[str, Any]) -> None:
        trial = ray.tune.get_context().get_trial_id()
        config = replace(base, **space.settings(drawn))
        fit(config, placement, f"train-{trial}", folder_of_trials, [TuneReportCallback()])

    if placement.num_workers == 1:
        return ray.tune.with_resources(in_this_process, placement.per_worker)
    # This process only waits: what trains asks for itself.
    return ray.tune.with_resources(with_own_workers, {"CPU": LEFT_FOR_TRIAL})


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    checkpoint = ray.tune.Checkpoint.from_directory(folder) if folder else None
    ray.tune.report(metrics, checkpoint=checkpoint)


@dataclasses.dataclass(frozen=True)
class _Trial:
    run_id: str
    number: int


class _Recorder(Callback):
    """Writes what Tune tells of its trials to MLflow and to the progress view."""

    def __init__(
        self, config: SweepConfig, space: SearchSpace, session: Session, parent: str
    ) -> None:
        self.progress = SweepProgress(config.search.trials, config.schedule.epochs)
        self.checkpoints: dict[str, str] = {}
        self._base, self._space = config.base(), space
        self._tracker, self._tags, self._parent = session.tracker, session.tags, parent
        self._trials: dict[str, _Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune stores its callbacks; an open store and a terminal cannot be

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id in self._trials:
            return
        number = trials.index(trial) + 1  # in the order proposed; they start in any
        settings = self._space.settings(trial.config)
        config = replace(self._base, **settings)
        run_name = f"{number:03d} " + " ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in settings.items()
        )
        run_id = self._tracker.start(run_name, flat(config), self._tags, self._parent)
        self._tracker.add_text(run_id, to_json(config), "config.json")
        self._trials[trial.trial_id] = _Trial(run_id, number)
        self.progress.started(number, settings)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        known = self._trials[trial.trial_id]
        self._tracker.log(known.run_id, result, result["epoch"])
        self.progress.reported(known.number, result["epoch"], result[METRIC])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        outcome = trial.last_result.get("outcome", "running")
        # One that the scheduler ended says it is still running.
        self._end(trial, "pruned" if outcome == "running" else outcome)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        error = trial.get_error()
        self._end(trial, "failed", str(error).strip().splitlines()[-1] if error else "unknown")

    def _end(self, trial: Trial, outcome: Outcome, error: str | None = None) -> None:
        known = self._trials[trial.trial_id]
        checkpoint = trial.last_result.get(CHECKPOINT_PATH_KEY)
        if checkpoint is None and trial.checkpoint is not None:
            checkpoint = trial.checkpoint.path
        if checkpoint is not None:
            self.checkpoints[known.run_id] = checkpoint
        self._tracker.finish(known.run_id, outcome, {"error": error[:5000]} if error else None)
        self.progress.ended(known.number, outcome, error)
