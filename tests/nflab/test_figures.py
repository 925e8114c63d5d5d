from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from nflab.analysis import figures
from nflab.analysis.figures.augmentation import draw_augmentation
from nflab.searching import importances
from nflab.searching.distributions import distributions, draw, settings_of
from nflab.settings import search_space
from nflab.settings.recipes import RECIPES

SPACE = RECIPES["digits"].space
SCALES = SPACE.scales


def made_up(trials: int) -> pd.DataFrame:
    """Trials whose top-1 depends on the batch size alone; every fourth is without clipping."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([16, 32, 64, 128], trials)
    return pd.DataFrame(
        {
            "clipping": [
                "none" if i % 4 == 0 else f"{c}"
                for i, c in enumerate(rng.uniform(0.01, 0.6, trials))
            ],
            "batch_size": sizes.astype(str),
            "augmentation_level": rng.integers(0, 11, trials).astype(str),
            "val_top1": 100 - sizes / 2,
            "outcome": rng.choice(["finished", "pruned"], trials),
        }
    )


@pytest.mark.slow
def test_importances_find_the_setting_that_matters_and_count_pruned_trials() -> None:
    trials = made_up(40)
    found = importances.importances(trials, SCALES)
    assert next(iter(found)) == "batch_size"
    assert found["batch_size"].share > 0.9
    assert 0.5 < found["batch_size"].low <= found["batch_size"].high <= 1
    assert sum(importance.share for importance in found.values()) == pytest.approx(1)
    assert len(importances.judged(trials)) == 40
    trials.loc[trials.outcome == "pruned", "val_top1"] = 0.0
    assert importances.importances(trials, SCALES)["batch_size"].share < 0.9


@pytest.mark.parametrize("trials", [0, 3])
def test_too_few_trials_have_no_importances(trials: int) -> None:
    assert importances.importances(made_up(trials), SCALES) == {}


def test_figures_are_drawn_of_what_has_a_result(tmp_path: Path) -> None:
    cells = pd.DataFrame(
        {
            "network": ["NF", "batch norm"],
            "step": ["baseline", "baseline"],
            "mixup": [False, False],
            "cutmix": [False, False],
            "augmentation_level": [0, 0],
            "test": [50.0, np.nan],
            "outcome": ["finished", "failed"],
        }
    )
    for rows in (cells, cells[1:]):
        draw_augmentation(rows, ("baseline", "+ MixUp"), "title", tmp_path / "a.png")
    curves = {("NF", "pre-trained"): [[(1, 40.0), (2, 50.0)]]}
    top1 = {
        (network, start): [50.0] if (network, start) in curves else []
        for network in ("NF", "batch norm")
        for start in ("pre-trained", "from scratch")
    }
    figures.draw_transfer(curves, top1, tmp_path / "b.png", "title")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1, 40])
def test_figures_are_drawn_of_any_number_of_trials(kept: int, tmp_path: Path) -> None:
    trials = made_up(40)[:kept]
    figures.draw_top1(trials, tmp_path / "a.png", "title")
    figures.draw_importances(importances.importances(trials, SCALES), tmp_path / "b.png", "title")
    figures.draw_learning_curves(
        [("x", o, [(1, 10.0), (2, 20.0)]) for o in trials.outcome], tmp_path / "c.png", "title"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("clipping=0.01..0.64:log,none", (None, 0.01, 0.02, 0.64)),
        ("sam_rho=none,0.02..0.1:log", (None, 0.02, 0.1)),
        ("weight_decay=0..0.1", (0.0, 0.03, 0.1)),
        ("ema_decay=0.9..0.99,none", (0.9, 0.99, None)),
        ("drop_rate=0..0.5:0.25", (0.0, 0.25, 0.5)),
        ("clipping=0.1..0.7:0.1,none", (0.1, 0.3, 0.7, None)),
        ("clipping=none,0.1..0.55:0.1", (None, 0.1, 0.5)),
        ("batch_size=64,16,48", (16, 48, 64)),
        ("batch_size=16..128:pow2", (16, 32, 128)),
        ("batch_size=16..128:log", (16, 17, 128)),
        ("augmentation_level=0..10", (0, 3, 10)),
        ("augmentation_level=0..10:5", (0, 5, 10)),
        ("image_size=none,16..64:log", (None, 16, 64)),
        ("image_size=16..64,none", (16, 64, None)),
        ("ema_decay=none,0.99,0.999", (None, 0.99, 0.999)),
        ("batch_size=16,48,64", (16, 48, 64)),
        ("model=dm_nf_resnet50,nf_resnet50", ("dm_nf_resnet50", "nf_resnet50")),
        ("mixup", (False, True)),
    ],
)
def test_a_draw_stands_for_the_settings_it_is_made_of(text: str, values: tuple[Any, ...]) -> None:
    scales = search_space.scales((text,))
    ((name, scale),) = scales.items()
    distribution = distributions(scales)[name]
    for value in values:
        drawn = draw(scales, {name: value})
        assert settings_of(scales, drawn) == {name: value}
        assert distribution._contains(distribution.to_internal_repr(drawn[name]))
    seen = set()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(200):
        found = settings_of(scales, {name: study.ask({name: distribution}).params[name]})[name]
        seen.add(found)
        if found is None or not scale.ordered:
            assert found in values
        else:
            assert scale.low is not None and scale.high is not None
            assert scale.low <= found <= scale.high
            assert type(found) is type(scale.low)
    assert (None in seen) == (None in values)
    if scale.step is not None:
        assert seen - {None} == set(scale.values())
    if not scale.ordered:
        assert seen == set(values)


def test_the_search_spaces_are_the_papers_and_the_laptops() -> None:
    assert SPACE.batch_sizes() == [16, 32, 64, 128]
    assert RECIPES["nf_resnet50_ablation"].space.batch_sizes() == [256, 512, 1024, 2048, 4096]
    clipping = RECIPES["nf_resnet50_ablation"].space.scales["clipping"]
    assert (clipping.low, clipping.high, clipping.none) == (0.01, 0.16, "high")


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 200])
def test_figures_of_eight_settings_are_drawn(count: int, tmp_path: Path) -> None:
    trials, scales = made_up_search(count)
    figures.draw_slices(trials, scales, tmp_path / "slices.png", "title")
    two = ("base_learning_rate", "clipping")
    figures.draw_map(trials, scales, two, tmp_path / "map.png", "title")
    figures.draw_parallel(trials, scales, tmp_path / "parallel.png", "title")
    assert len(list(tmp_path.iterdir())) == 3


def made_up_search(count: int) -> tuple[pd.DataFrame, dict[str, search_space.Scale]]:
    """Trials of eight settings."""
    scales = search_space.scales(
        (
            "base_learning_rate=0.05..6.4:log",
            "clipping=0.01..0.64:log,none",
            "batch_size=16..128:pow2",
            "augmentation_level=0..10",
            "model=dm_nf_resnet_digits,preact_resnet_digits",
            "mixup",
            "sam_rho=none,0.02..0.1:log",
            "drop_rate=0..0.5:0.1",
        )
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        drawn = study.ask(distributions(scales)).params
        settings = settings_of(scales, drawn)
        rate = np.log2(settings["base_learning_rate"] / 1.6)
        rows.append(
            {name: "none" if value is None else str(value) for name, value in settings.items()}
            | {"val_top1": 98 - 3 * rate**2 + rng.normal(), "outcome": "finished"}
        )
    frame = pd.DataFrame(rows, columns=[*scales, "val_top1", "outcome"])
    frame.loc[frame.index % 3 == 0, "outcome"] = "pruned"
    frame.loc[frame.index % 11 == 0, ["outcome", "val_top1"]] = ["diverged", 0.0]
    return frame, scales
