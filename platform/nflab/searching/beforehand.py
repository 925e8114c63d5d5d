"""Results of earlier runs that a search begins with: its sampler knows them, as no trials of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nflab.searching.distributions import Scales, distributions, draw
from nflab.settings.outcomes import Outcome


@dataclass(frozen=True)
class Result:
    """What an earlier run reached.

    Attributes:
        settings: of those that are searched.
        outcome: finished, or diverged.
        val_top1: in percent.
        origin: the name of its sweep or grid.
    """

    settings: dict[str, Any]
    outcome: Outcome
    val_top1: float
    origin: str


def as_trials(scales: Scales, results: Iterable[Result]) -> list[FrozenTrial]:
    """Results as a sampler knows trials that have ended; no pruner compares with them, for they
    have no curves."""
    found = []
    for result in results:
        finished = result.outcome == "finished"
        trial = optuna.trial.create_trial(
            value=result.val_top1 if finished else 0.0,
            state=TrialState.COMPLETE,
            params=draw(scales, result.settings),
            distributions=distributions(scales),
            user_attrs={"origin": result.origin},
            constraints={"infeasible": 0.0 if finished else 1.0},  # as `study.tell` marks them
        )
        found.append(trial)
    return found
