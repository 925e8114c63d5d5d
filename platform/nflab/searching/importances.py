"""How much each searched setting mattered to the trials of a sweep."""

import numpy as np
import optuna
import pandas as pd

from nflab.analysis.statistics import Importance
from nflab.searching.distributions import Scales, distributions, draw
from nflab.settings.search_space import setting

RESAMPLES = 20
"""How often trials are drawn anew for the interval of an importance."""


def importances(trials: pd.DataFrame, scales: Scales) -> dict[str, Importance]:
    """How much each searched setting mattered (fANOVA), the most important first.

    Rests on the last value of every trial that reported one (see `judged`), pruned or not: what
    was cut early says as much about its settings. Empty if fewer than four did, or if all came
    out the same.
    """
    told = judged(trials)
    if len(told) < 4 or told.val_top1.nunique() < 2 or not scales:
        return {}
    shares = _shares(told, scales)
    samples = [told.sample(len(told), replace=True, random_state=s) for s in range(RESAMPLES)]
    drawn = [_shares(s, scales) for s in samples if s.val_top1.nunique() > 1]
    return {
        name: Importance(shares[name], *np.quantile([d[name] for d in drawn], [0.1, 0.9]).tolist())
        for name in sorted(shares, key=lambda name: -shares[name])
    }


def judged(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials whose results say something: all that reported a validation top-1."""
    return trials[trials.val_top1.notna()]


def _shares(trials: pd.DataFrame, scales: Scales) -> dict[str, float]:
    study = optuna.create_study(direction="maximize")
    drawn_from = distributions(scales)
    for _, row in trials.iterrows():
        drawn = draw(scales, {name: setting(name, row[name]) for name in scales})
        study.add_trial(
            optuna.trial.create_trial(params=drawn, distributions=drawn_from, value=row.val_top1)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
