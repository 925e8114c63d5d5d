"""A trial as its sampler and its pruner see it: beside those that ended before its window alone.

So what is proposed for a trial, and where it is cut, are functions of the configuration. They
depend neither on how many trials run at once, nor on which of them ends first.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

REDUCTION_FACTOR = 3
"""ASHA lets the best of this many trials pass each rung; rungs lie this factor apart."""

STARTUP_TRIALS = 4
"""Random trials before a sampler models the results, so that 12 trials are a search."""

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""What proposes settings, from a seed of each trial: those of Optuna's that need to know nothing of
a study but its trials."""


class Foresight:
    """One trial in a study of its own, which holds what it may know.

    Args:
        past: the trials before its window, all of which have ended, in order.
        seed: of what is proposed for it.
        pruner: by which it is cut.
        sampler: what proposes it, or its name.
        directions: of the values of trials.
    """

    def __init__(
        self,
        past: Sequence[FrozenTrial],
        seed: int,
        pruner: optuna.pruners.BasePruner,
        sampler: str | optuna.samplers.BaseSampler = "tpe",
        directions: Sequence[StudyDirection] = (StudyDirection.MAXIMIZE,),
    ) -> None:
        if isinstance(sampler, str):
            sampler = SAMPLERS[sampler](seed)
        study = optuna.create_study(directions=directions, sampler=sampler, pruner=pruner)
        study.add_trials(past)
        self._study, self._trial = study, study.ask()
        self._past = past
        self._cut: dict[int, str | None] = {}

    def propose(self, searched: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """A draw of each searched setting."""
        return {name: self._trial._suggest(name, scale) for name, scale in searched.items()}

    def report(self, value: float, step: int) -> str | None:
        """Takes a result, once; returns why it cuts the trial, or None if it goes on."""
        if len(self._study.directions) > 1:
            return None  # of several aims none tells early which trial is poor
        if step not in self._cut:
            self._trial.report(value, step)
            self._cut[step] = self._why() if self._trial.should_prune() else None
        return self._cut[step]

    def _why(self) -> str:
        """What the trial had at its last rung, and what was needed there."""
        own, prefix = self.rungs, "completed_rung_"
        last = max(int(key.removeprefix(prefix)) for key in own if key.startswith(prefix))
        key = f"{prefix}{last}"
        known = [trial.system_attrs[key] for trial in self._past if key in trial.system_attrs]
        reached = sorted([*known, own[key]], reverse=True)
        needed = reached[max(0, len(reached) // REDUCTION_FACTOR - 1)]
        return f"rung {last + 1}: {own[key]:.1f} % against {needed:.1f} %"

    @property
    def rungs(self) -> dict[str, Any]:
        """What the pruner has noted of the trial, for those that will compare with it."""
        (own,) = self._study.get_trials(deepcopy=False)[-1:]
        return dict(own.system_attrs)


class Sobol(optuna.samplers.QMCSampler):
    """Draws one point of a scrambled Sobol sequence, which fills the space evenly.

    Optuna's own counts its points in the study and draws the first by chance; here the place of
    the trial is the place of the point.

    Args:
        seed: of the scrambling, the same for all trials.
        place: from 0.
        searched: what is drawn.
    """

    def __init__(self, seed: int, place: int, searched: Mapping[str, BaseDistribution]) -> None:
        with warnings.catch_warnings():  # it may change in Optuna, which a test would tell
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(scramble=True, seed=seed, warn_asynchronous_seeding=False)
        self._place, self._searched = place, dict(searched)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._searched

    def _find_sample_id(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution]
    ) -> int:
        return self._place


class Given(optuna.samplers.BaseSampler):
    """Draws what was drawn before, elsewhere."""

    def __init__(self, drawn: Mapping[str, Any]) -> None:
        self._drawn = drawn

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._drawn[param_name]
