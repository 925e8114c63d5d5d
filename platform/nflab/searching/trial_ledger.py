"""The trials of a sweep as they are written down: Optuna's study and MLflow's runs, in agreement.

Everything that must outlive the processes of a sweep stands in these two and in the trials' own
checkpoints, so a sweep that was killed at any moment goes on from them: a trial that was under
way waits in the study to be proposed again, with its settings and the results it has reported.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nflab.recording.outbox import Outbox
from nflab.recording.run_record import RunRecord
from nflab.recording.tables import has_ended, last_epoch
from nflab.recording.tracker import Tracker
from nflab.running.budget import Budget
from nflab.running.ledger import METRIC, Proposal
from nflab.searching.distributions import distributions, draw, settings_of
from nflab.searching.foresight import REDUCTION_FACTOR, Foresight, Given, Sobol
from nflab.searching.study import as_compared, kept, let_failed_wait, open_study, standing_of, tell
from nflab.settings.canonical import is_read
from nflab.settings.leaves import replace
from nflab.settings.outcomes import Outcome
from nflab.settings.recipes import lookahead, scales_of
from nflab.settings.search_space import tried
from nflab.settings.streams import Stream, keys
from nflab.settings.studies import SweepConfig
from nflab.storage.checkpoints import Checkpoints, Winners
from nflab.storage.run_folder import Identity
from nflab.terminal.wording import describe


def trial_folder(sweep_folder: str, number: int) -> str:
    """Where a trial's checkpoints and logs are, in the folder of its sweep."""
    return f"{sweep_folder}/trials/{number:04d}"


def first_rung(config: SweepConfig) -> int:
    """Epochs that every trial trains before it may be cut: never before the warm-up is over."""
    epochs, scale = config.schedule.epochs, scales_of(config).get("warmup_epochs")
    warm_up = config.schedule.warmup_epochs if scale is None else max(scale.ends)
    return min(epochs, max(epochs // 4, int(warm_up) + 1))


class TrialLedger:
    """Proposes trials and writes down what becomes of them."""

    def __init__(
        self,
        config: SweepConfig,
        identity: Identity,
        folder: str,
        study_file: Path,
        tracker: Tracker,
        outbox: Outbox,
        parent: str,
        tags: dict[str, str],
        samples_per_epoch: int,
        budget: Budget | None = None,
        retry_failed: bool = False,
        beforehand: Sequence[FrozenTrial] = (),
    ) -> None:
        """Opens the study of a sweep, or makes it; trials that were under way wait again.

        Args:
            identity: of the sweep.
            folder: path or address of the sweep.
            study_file: the study, on this machine.
            parent: MLflow's run of the sweep.
            tags: what every trial's run is tagged with.
            samples_per_epoch: the fewest images that any batch size trains on in an epoch.
            budget: what the sweep may cost, with what it has cost before.
            retry_failed: let trials that failed be proposed again.
            beforehand: what every trial's sampler knows beside the trials before its window.

        Raises:
            ConfigError: the study is gone, or is another sweep's (see `study.open_study`).
        """
        self.budget = budget or Budget()
        self._config, self._folder = config, folder
        self._tracker, self._outbox = tracker, outbox
        self._parent, self._tags = parent, tags
        self._scales = scales_of(config)
        self._tried = tried(config.search.tries, self._scales)
        begun = len(outbox.read(lambda: tracker.trials(parent))) > 0
        # Rungs in samples seen, the same for every batch size.
        self._pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if config.search.pruner == "asha":
            self._pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first_rung(config) * samples_per_epoch,
                reduction_factor=REDUCTION_FACTOR,
            )
        aims = config.search.objectives
        opened = partial(open_study, study_file, identity, folder, begun, aims)
        self._study = opened()
        if retry_failed:
            let_failed_wait(study_file)
            self._study = opened()  # it remembers trials that had ended
        self._kept = partial(kept, study_file)
        self._storage = self._study._storage
        self._beforehand = beforehand
        self._open: dict[int, optuna.Trial] = {}
        self._foresight: dict[int, Foresight] = {}
        self._runs: dict[int, Any] = {}
        self._records: dict[int, RunRecord] = {}
        self.release()

    @property
    def missing(self) -> int:
        """How many of the planned trials have not come to their end."""
        ended = sum(t.state.is_finished() for t in self._study.get_trials(deepcopy=False))
        return max(0, self._config.search.trials - ended)

    @property
    def best(self) -> float | None:
        """The best validation top-1 of trials that finished, in percent."""
        complete = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        finished = [trial for trial in complete if trial.user_attrs.get("outcome") == "finished"]
        return max((trial.values[0] for trial in finished), default=None)

    def propose(self) -> Proposal | None:
        """The next trial: one that was interrupted, else a new one; None if it waits for the trials
        before its window."""
        trials = self._study.get_trials(deepcopy=False)
        waiting = [t.number for t in trials if t.state == TrialState.WAITING]
        place = waiting[0] if waiting else len(trials)
        past = trials[: max(0, place + 1 - lookahead(self._config))]
        if not all(trial.state.is_finished() for trial in past):
            return None
        # A sampler of its own for each trial: what is proposed does not depend on how often the
        # sweep was interrupted.
        key = keys(self._config.run.seed, Stream.SEARCH, place)
        known = [*self._beforehand, *past]
        searched = distributions(self._scales)
        sampler: str | Sobol = self._config.search.sampler
        if sampler == "qmc":
            first = keys(self._config.run.seed, Stream.SEARCH, 0)
            sampler = Sobol(int(first) % 2**32, place, searched)
        foresight = Foresight(
            known, int(key) % 2**32, self._pruner, sampler, self._study.directions
        )
        drawn = foresight.propose(searched)
        if place < len(self._tried):
            drawn |= draw(self._scales, self._tried[place])
        self._study.sampler = Given(drawn)
        trial = self._kept(self._study.ask)
        for name, distribution in searched.items():  # one by one, for each is kept by itself
            self._kept(partial(trial._suggest, name, distribution))
        settings = trial.user_attrs.get("settings")
        if settings is None:
            settings = self._settings(trial.params)
            repeats = sum(
                {**t.user_attrs["settings"], "seed": None} == {**settings, "seed": None}
                for t in trials
                if "settings" in t.user_attrs
            )
            settings["seed"] = self._config.run.seed + repeats
            self._kept(lambda: trial.set_user_attr("settings", settings))
        number = trial.number + 1
        self._open[number], self._foresight[number] = trial, foresight
        reported = self._storage.get_trial(trial._trial_id).intermediate_values
        for step, value in sorted(reported.items()):
            self._judge(number, value, step)
        return Proposal(number, settings, trial_folder(self._folder, number))

    def _settings(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """What a draw stands for; what nothing reads beside the others is the first of its values,
        so that the same training is known as the same."""
        settings = settings_of(self._scales, drawn)
        config = replace(self._config.base(), **settings)
        unread = [name for name in settings if not is_read(config, name)]
        return settings | {name: self._scales[name].ends[0] for name in unread}

    def _judge(self, number: int, value: float, step: int) -> str | None:
        """Why a result cuts a trial, if it does; what it did there is kept for those that come
        after."""
        foresight, trial = self._foresight[number], self._open[number]
        cut = foresight.report(value, step)
        noted = self._storage.get_trial(trial._trial_id).system_attrs
        for key, found in foresight.rungs.items():
            if key not in noted:
                note = partial(self._storage.set_trial_system_attr, trial._trial_id, key, found)
                self._kept(note)
        return cut

    def started(self, proposal: Proposal) -> None:
        """Opens the trial's run in MLflow, or opens it again."""
        if proposal.number in self._records:
            return
        known = self._runs.get(proposal.number)
        config = replace(self._config.base(), name=None, **proposal.settings)
        if known is None:
            name = f"{proposal.number:03d} {describe(proposal.settings)}"
            # In three digits, so that a list sorted by it is in order.
            tags = {
                **self._tags,
                "kind": "trial",
                "trial": f"{proposal.number:03d}",
                "parent": str(self._config.run.name),
            }
            run, epoch = self._outbox.start(name, tags, self._parent), None
        else:
            run, epoch = known.run_id, last_epoch(known)
            self._outbox.put("reopen", run)
        self._records[proposal.number] = RunRecord(self._outbox, run, config, epoch)

    def reported(self, number: int, metrics: dict[str, Any]) -> str | None:
        """Writes down an epoch's metrics, once; returns why the trial is to be cut, if it is."""
        trial = self._open[number]
        self.budget.add(self._records[number].report(metrics))
        if metrics["outcome"] != "running" and metrics["outcome"] != "finished":
            return None
        step = metrics["samples_seen"]
        known = self._storage.get_trial(trial._trial_id)
        if step not in known.intermediate_values:
            # By the storage, for Optuna's trials of several aims report nothing.
            self._kept(
                lambda: self._storage.set_trial_intermediate_value(
                    trial._trial_id, step, metrics[METRIC]
                )
            )
        elif step != known.last_step:
            return None  # repeated by a trial that goes on, and judged before
        # The last epoch is judged, too: whoever comes after may compare with it.
        cut = self._judge(number, metrics[METRIC], step)
        return None if metrics["outcome"] == "finished" else cut

    def ended(
        self, number: int, outcome: Outcome, result: Mapping[str, Any], error: str | None = None
    ) -> tuple[Outcome, str | None]:
        """Closes a trial in the study, see `study.tell`, and in MLflow."""
        trial, known = self._open[number], self._runs.get(number)
        if known is not None and last_epoch(known) == result.get("epoch"):
            # An epoch that was trained again took another time; MLflow has the first.
            aims = self._config.search.objectives
            result = {**result, **{name: getattr(known, name, math.nan) for name in aims}}
        outcome, error = as_compared(self._study, outcome, result, error)
        self._kept(lambda: tell(self._study, trial, outcome, result, error))
        del self._open[number], self._foresight[number]
        self._records[number].finish(outcome, error)
        if outcome != "failed":
            self._purge_losers(self._storage.get_trial(trial._trial_id))
        return outcome, error

    def _purge_losers(self, trial: FrozenTrial) -> None:
        checkpoints = Checkpoints.of_run(trial_folder(self._folder, trial.number + 1))
        self._winners.ended(standing_of(self._study, trial), checkpoints)

    def release(self) -> None:
        """Lets every trial that is under way wait for a later `propose`, and MLflow say what the
        study does; nothing is left running in either."""
        self._open.clear()
        self._foresight.clear()
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            wait = partial(
                self._storage.set_trial_state_values, trial._trial_id, TrialState.WAITING
            )
            self._kept(wait)
        self._outbox.drain()
        runs = self._tracker.trials(self._parent)
        ended: dict[int, Outcome] = {
            trial.number + 1: trial.user_attrs.get("outcome", "failed")
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        }
        for run in runs.itertuples():
            outcome = ended.get(run.number, "interrupted")
            if not has_ended(run, outcome):
                self._tracker.finish(run.run_id, outcome)
        self._winners = Winners()
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if standing_of(self._study, trial) is not None:
                self._purge_losers(trial)
        self._runs = {run.number: run for run in runs.itertuples()}
