"""Several aims: what beats what, what is proposed, kept and drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nflab.analysis import figures
from nflab.analysis.figures import front as front_figure
from nflab.analysis.ranking import on_front, ranked
from nflab.learning.validation import validate
from nflab.searching.foresight import STARTUP_TRIALS, Foresight
from nflab.searching.study import as_compared, standing_of, tell
from nflab.settings.errors import ConfigError
from nflab.settings.objectives import OBJECTIVES, losses
from nflab.settings.outcomes import Standing, beats, front
from nflab.settings.studies import SweepConfig
from nflab.studies.sweep import spread
from nflab.terminal.command_line import parse

AIMS = ("val_top1", "val_loss", "images_per_second")
DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)


def results(aims: int) -> Any:
    few = st.integers(0, 3).map(float)  # so that many are equal
    return st.lists(st.tuples(*[few] * aims), max_size=12)


@given(results(1))
def test_of_one_aim_the_front_is_the_best_alone(found: list[tuple[float, ...]]) -> None:
    standings: dict[int, Standing] = {n: (one, n) for n, one in enumerate(found)}
    best = sorted(standings, key=standings.__getitem__)[:1]
    assert front(standings) == best


@given(results(3))
def test_the_front_is_what_optuna_calls_so_but_for_equals(found: list[tuple[float, ...]]) -> None:
    study = optuna.create_study(directions=["minimize"] * 3)
    study.add_trials([optuna.trial.create_trial(values=one) for one in found])
    theirs = {trial.number for trial in study.best_trials}
    ours = front({n: (one, n) for n, one in enumerate(found)})
    # Of equals the first stands for all.
    assert {found[n] for n in ours} == {found[n] for n in theirs}
    assert len({found[n] for n in ours}) == len(ours)
    assert all(min(n for n in theirs if found[n] == found[our]) == our for our in ours)


def test_which_way_is_better() -> None:
    good = {"val_top1": 90.0, "val_loss": 0.1, "images_per_second": 50.0}
    for name in AIMS:
        worse = {**good, name: good[name] * (0.5 if name != "val_loss" else 2)}
        assert beats((losses(good, AIMS), 2), (losses(worse, AIMS), 1)), name
        assert not beats((losses(worse, AIMS), 1), (losses(good, AIMS), 2)), name
    better = {"seconds": 1.0, "cost_usd": 1.0}
    assert losses(better, list(better)) < losses({"seconds": 2.0, "cost_usd": 2.0}, list(better))
    assert not OBJECTIVES["val_loss"].measured and OBJECTIVES["seconds"].measured


def rows(*found: tuple[str, float | None, float | None]) -> pd.DataFrame:
    frame = pd.DataFrame(found, columns=["outcome", "val_top1", "seconds"])
    return frame.assign(number=range(1, len(found) + 1))


def test_those_on_the_front_come_first_and_others_as_ever() -> None:
    trials = rows(
        ("finished", 90, 30),
        ("finished", 95, 40),  # on the front
        ("finished", 94, 40),
        ("diverged", 0, 1),
        ("finished", 60, 5),  # on the front
        ("failed", None, None),
        ("finished", 92, 30),  # on the front
        ("interrupted", 99, 1),
    )
    aims = ("val_top1", "seconds")
    assert ranked(trials, "number", aims).number.tolist()[:5] == [2, 7, 5, 3, 1]
    assert trials.number[on_front(trials, "number", aims)].tolist() == [2, 5, 7]
    assert ranked(trials, "number").number.tolist()[:5] == [2, 3, 7, 1, 5]
    bare = trials.drop(columns="seconds")
    assert not on_front(bare, "number", aims).any()  # no trial came to an end


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (9, [*range(7)])]
)
def test_finals_go_along_the_front(count: int, kept: list[int]) -> None:
    trials = pd.DataFrame({"number": range(7)})
    assert spread(trials, count).number.tolist() == kept


def known(values: list[tuple[float, float]], infeasible: float) -> list[FrozenTrial]:
    """Trials of which every third is infeasible, with a value that nobody is to look at."""
    scale = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    rng = np.random.default_rng(0)
    found = []
    for n, value in enumerate(values):
        bad = n % 3 == 2
        found.append(
            optuna.trial.create_trial(
                values=[infeasible] * 2 if bad else value,
                params={name: float(rng.uniform()) for name in scale},
                distributions=dict(scale),
                constraints={"infeasible": float(bad)},
            )
        )
    return found


def test_what_is_proposed_is_what_optuna_proposes_and_minds_no_infeasible_value() -> None:
    rng = np.random.default_rng(1)
    values = [(float(a), float(b)) for a, b in rng.uniform(size=(20, 2))]
    searched = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    for past in (6, 12, 20):
        drawn = []
        for infeasible in (0.0, 1e9, -1e9):
            trials = known(values[:past], infeasible)
            nothing = optuna.pruners.NopPruner()
            drawn.append(Foresight(trials, 5, nothing, "tpe", DIRECTIONS).propose(searched))
        sampler = optuna.samplers.TPESampler(seed=5, n_startup_trials=STARTUP_TRIALS)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        study.add_trials(known(values[:past], 0.0))
        assert drawn == [study.ask(searched).params] * 3
    minimized = [(a, -b) for a, b in values]
    other = Foresight(known(minimized, 0.0), 5, optuna.pruners.NopPruner(), "tpe", DIRECTIONS)
    assert other.propose(searched) != drawn[0]  # both aims count


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--objectives val_top1 speed --pruner none", "unknown objective 'speed': choose from"),
        ("--objectives val_top1 second --pruner none", "did you mean 'seconds'"),
        ("--objectives seconds --pruner none", "name val_top1 first"),
        ("--objectives seconds val_top1 --pruner none", "name val_top1 first"),
        ("--objectives val_top1 seconds seconds --pruner none", "each once"),
        ("--objectives", "objectives are none"),
        ("--objectives val_top1 seconds", "cannot be had with pruning.*--pruner none"),
        ("--objectives val_top1 seconds --pruner none --sampler gp", "take tpe, random or qmc"),
        ("--objectives val_top1 val_loss --pruner none --from s", "cannot begin --from"),
    ],
)
def test_aims_that_cannot_be_had_are_refused(flags: str, said: str) -> None:
    config = parse(SweepConfig, flags.split())[0]
    with pytest.raises(ConfigError, match=said.replace("'seconds'", "seconds")):
        validate(config)


def test_several_aims_are_a_configuration() -> None:
    flags = "--objectives val_top1 val_loss --pruner none --sampler qmc"
    validate(parse(SweepConfig, flags.split())[0])


@pytest.mark.slow
@pytest.mark.parametrize("aims", [("val_top1", "seconds"), AIMS, tuple(OBJECTIVES)])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_a_front_is_drawn(
    aims: tuple[str, ...], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    trials = pd.DataFrame(rng.uniform(1, 100, (count, len(OBJECTIVES))), columns=[*OBJECTIVES])
    trials = trials.assign(number=range(1, count + 1), outcome="finished")
    trials.loc[trials.index % 5 == 3, "outcome"] = "diverged"
    trials = trials.assign(front=on_front(trials, "number", aims))
    seeds = trials.head(3)
    repeated = {"baseline": seeds.assign(outcome="diverged"), "one": seeds, "two": seeds[:1]}
    drawn: list[Figure] = []
    monkeypatch.setattr(front_figure, "save_figure", lambda figure, path: drawn.append(figure))
    figures.draw_front(trials, aims, tmp_path / "front.png", "title", repeated)
    finished = trials[trials.outcome == "finished"]
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert len(panels) == len(aims) * (len(aims) - 1) // 2
    for axes in panels:
        beaten, best = axes.collections[:2]
        assert len(beaten.get_offsets()) == (~finished.front).sum()
        assert len(best.get_offsets()) == finished.front.sum()
    monkeypatch.undo()
    figures.draw_front(trials, aims, tmp_path / "front.png", "title", repeated)
    assert (tmp_path / "front.png").exists()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_states_of_trials_are_told_to_a_study_of_several_aims() -> None:
    study = optuna.create_study(directions=DIRECTIONS)
    study.set_metric_names(["val_top1", "seconds"])
    ends = (
        ("finished", {"val_top1": 90.0, "seconds": 3.0, "epoch": 2}, None),
        ("diverged", {"val_top1": 0.0}, None),
        ("failed", {}, "CUDA error: out of memory"),
        ("failed", {}, "ValueError: no"),
        ("finished", {"val_top1": 95.0, "epoch": 2}, None),
        ("finished", {"val_top1": 95.0, "seconds": float("nan")}, None),
    )
    for outcome, result, error in ends:
        told, why = as_compared(study, outcome, result, error)  # type: ignore[arg-type]
        tell(study, study.ask(), told, result, why)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.FAIL] * 3
    assert study.trials[0].values == [90.0, 3.0]
    assert [standing_of(study, trial) for trial in study.trials] == [((-90.0, 3.0), 1), *[None] * 5]
    assert [trial.number for trial in study.best_trials] == [0]
