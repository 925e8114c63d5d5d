"""Running a sweep's trials with Ray Tune; what they are and became stands in the ledger."""

import dataclasses
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray.tune import Callback, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from nflab.cluster.placement import Placement
from nflab.cluster.trained import seconds_since, training
from nflab.cluster.waiting import told_of_waiting
from nflab.data import load_dataset
from nflab.running.budget import Budget
from nflab.running.ledger import METRIC, Ledger, Proposal
from nflab.running.losses import Losses
from nflab.running.trial_process import trainable
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.terminal.progress import SweepProgress

# Tune would show keys in the arguments of processes, and in logs; every node has its own.
ENV_VARS_TO_PROPAGATE.difference_update({n for n in ENV_VARS_TO_PROPAGATE if n.startswith("AWS_")})

FAILURES_IN_A_ROW = 3
"""That many trials that fail with one cause say that the next would fail, too."""

WAITING_SECONDS = 600.0
"""Trials that have not done a step for so long are not waited for when the budget is reached."""


def run_trials(
    config: Config, placement: Placement, ledger: Ledger, progress: SweepProgress
) -> str | None:
    """Runs the trials that the ledger misses, as many at once as the cluster holds.

    When the ledger's budget is reached, none begins any more, and each that runs is stopped at its
    next report, or when nothing has trained for WAITING_SECONDS; the ledger is not told of their
    end, so that they can go on. When FAILURES_IN_A_ROW have failed with one cause, none begins any
    more, and those that run end.

    Args:
        config: what every trial starts from.

    Returns:
        that cause, if there was one.
    """
    stopped: set[int] = set()
    lost: set[int] = set()
    failures = Failures()
    # Nothing is read again of Tune's own state: it is gone with the end.
    with TemporaryDirectory(prefix="nflab-tune-") as scratch:
        tuner = Tuner(
            trainable(config, placement),
            tune_config=TuneConfig(
                num_samples=ledger.missing,
                max_concurrent_trials=placement.max_concurrent,
                search_alg=_Searcher(config, ledger, failures),
                scheduler=_Scheduler(ledger, progress, stopped, lost, failures),
                # A process imports for seconds: the next run of one worker takes over the last's.
                reuse_actors=placement.num_workers == 1,
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=scratch,
                callbacks=[_Observer(ledger, progress, stopped, lost)],
                stop=_Stopper(ledger.budget),
                # Tune counts no losses anew; the scheduler does.
                failure_config=FailureConfig(max_failures=-1),
                verbose=0,
            ),
        )
        # Tune would keep Ctrl-C for itself, after its end too; whoever calls has a way with it.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        with training(), progress, told_of_waiting(progress.say):
            tuner.fit()
    return failures.cause


class Failures:
    """Whether several trials in a row have failed with one cause."""

    def __init__(self) -> None:
        self.cause: str | None = None
        """The cause, once they have."""
        self._last, self._count = "", 0

    def ended(self, error: str | None) -> None:
        """A trial has ended.

        Args:
            error: why it failed; None if it did not.
        """
        # What memory does not hold says something of the trial's own settings.
        if error is None or "out of memory" in error.lower():
            self._last, self._count = "", 0
            return
        last = (error.strip().splitlines() or [""])[-1]
        alike = re.sub(r"(0x)?[\da-f]*\d[\da-f]*", "#", last)  # but for numbers, such as its own
        self._count = self._count + 1 if alike == self._last else 1
        self._last = alike
        if self._count >= FAILURES_IN_A_ROW:
            self.cause = self.cause or last


class _Unsaved:
    """Tune stores its parts with its own state; what ours must keep stands in the ledger."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_Unsaved, Searcher):
    """Hands Tune what the ledger proposes."""

    def __init__(self, config: Config, ledger: Ledger, failures: Failures) -> None:
        super().__init__()
        self._config, self._ledger, self._failures = config, ledger, failures

    def suggest(self, trial_id: str) -> Any:
        if self._ledger.budget.reached or self._failures.cause is not None:
            return Searcher.FINISHED
        proposal = self._ledger.propose()
        if proposal is None:
            return None  # Tune asks again
        dataset = load_dataset(replace(self._config, **proposal.settings))
        return {**dataclasses.asdict(proposal), "fingerprint": dataset.fingerprint}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The observer writes it down."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune expects a file

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _Scheduler(_Unsaved, FIFOScheduler):
    """Writes each report down, and cuts the trial where the study's pruner says so; stops all when
    the budget is reached, and lets none begin when too many have failed alike."""

    def __init__(
        self,
        ledger: Ledger,
        progress: SweepProgress,
        stopped: set[int],
        lost: set[int],
        failures: Failures,
    ) -> None:
        """Those that were stopped before their end are put into `stopped`, and into `lost` those
        that lose their processes too often."""
        super().__init__()
        self._ledger, self._progress, self._stopped = ledger, progress, stopped
        self._lost, self._failures = lost, failures
        self._losses: dict[int, Losses] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result["outcome"] == "failed":
            return self.CONTINUE
        number = trial.config["number"]
        cut = self._ledger.reported(number, result)
        remark = result.get("remark")
        self._progress.reported(number, result["epoch"], result[METRIC], remark, cut)
        if self._ledger.budget.reached:
            self._stop_waiting(tune_controller)
            if result["outcome"] == "running" and not cut:
                self._stopped.add(number)
                return self.STOP
        return self.STOP if cut else self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        failed = result.get("outcome") == "failed"
        self._ended(tune_controller, str(result.get("error")) if failed else None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        number = trial.config["number"]
        if trial.status == Trial.ERROR:  # it was lost, and Tune is about to begin it again
            losses = self._losses.setdefault(number, Losses(trial.config["folder"]))
            if losses.bear_another():
                return
            self._lost.add(number)
        self._ended(tune_controller, str(trial.get_error()))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.config["number"] in self._lost:
            tune_controller.stop_trial(trial)

    def _ended(self, tune_controller: Any, error: str | None) -> None:
        self._failures.ended(error)
        if self._failures.cause is not None:
            self._stop_waiting(tune_controller)

    def _stop_waiting(self, tune_controller: Any) -> None:
        """Trials that have not begun do not begin any more."""
        for trial in tune_controller.get_trials():
            if trial.status == Trial.PENDING:
                self._stopped.add(trial.config["number"])
                tune_controller.stop_trial(trial)


class _Stopper(_Unsaved, Stopper):
    """Ends all when the budget is reached and nothing trains whose next report would end it."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._budget.reached and seconds_since() > WAITING_SECONDS


class _Observer(_Unsaved, Callback):
    """Writes down that a trial begins and how it ends."""

    def __init__(
        self, ledger: Ledger, progress: SweepProgress, stopped: set[int], lost: set[int]
    ) -> None:
        """What is in `stopped` has not come to its end, and what is in `lost` fails."""
        self._ledger, self._progress = ledger, progress
        self._stopped, self._lost = stopped, lost

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        proposal = Proposal(*(trial.config[part.name] for part in dataclasses.fields(Proposal)))
        self._ledger.started(proposal)
        self._progress.started(proposal.number, proposal.settings)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.config["number"] in self._lost:
            self._end(trial, "failed", str(trial.get_error() or "its process was lost"))
            return
        if trial.config["number"] in self._stopped:
            if METRIC in trial.last_result:  # else it waited, and never began
                self._progress.ended(trial.config["number"], "interrupted", None)
            return
        outcome = trial.last_result["outcome"]
        # One that was cut says it is still running.
        self._end(trial, "pruned" if outcome == "running" else outcome)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._end(trial, "failed", str(trial.get_error() or "its process was lost"))

    def _end(self, trial: Trial, outcome: Any, error: str | None = None) -> None:
        number = trial.config["number"]
        error = error or trial.last_result.get("error")
        outcome, error = self._ledger.ended(number, outcome, trial.last_result, error)
        logs = f"{trial.config['folder']}/logs"
        self._progress.ended(number, outcome, f"{error}\nlogs: {logs}" if error else None)
