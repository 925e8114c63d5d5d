"""What a trial's sampler draws, against scipy's own sequence."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from scipy.stats import qmc

from nflab.searching.foresight import Foresight, Sobol


def test_trial_n_of_qmc_is_point_n_of_the_sequence() -> None:
    searched = {"a": FloatDistribution(0, 1), "b": FloatDistribution(0, 1)}
    points = qmc.Sobol(2, seed=7, scramble=True).random(8)
    past: list[optuna.trial.FrozenTrial] = []
    for place, point in enumerate(points):
        foresight = Foresight(past, 1, optuna.pruners.NopPruner(), Sobol(7, place, searched))
        drawn = foresight.propose(searched)
        assert [drawn["a"], drawn["b"]] == pytest.approx(list(point), abs=1e-12)
        past.append(
            optuna.trial.create_trial(params=drawn, distributions=dict(searched), value=1.0)
        )
