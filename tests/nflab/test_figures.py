from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nflab.analysis import figures
from nflab.analysis.figures.augmentation import draw_augmentation
from nflab.searching import importances
from nflab.searching.distributions import distributions, draw
from nflab.settings.recipes import RECIPES

SPACE = RECIPES["digits"].space
SEARCHED = ("clipping", "batch_size", "augmentation_level")


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
    found = importances.importances(trials, SPACE, SEARCHED)
    assert next(iter(found)) == "batch_size"
    assert found["batch_size"].share > 0.9
    assert 0.5 < found["batch_size"].low <= found["batch_size"].high <= 1
    assert sum(importance.share for importance in found.values()) == pytest.approx(1)
    assert len(importances.judged(trials)) == 40
    trials.loc[trials.outcome == "pruned", "val_top1"] = 0.0
    assert importances.importances(trials, SPACE, SEARCHED)["batch_size"].share < 0.9


@pytest.mark.parametrize("trials", [0, 3])
def test_too_few_trials_have_no_importances(trials: int) -> None:
    assert importances.importances(made_up(trials), SPACE, SEARCHED) == {}


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
    figures.draw_importances(
        importances.importances(trials, SPACE, SEARCHED), tmp_path / "b.png", "title"
    )
    figures.draw_learning_curves(
        [("x", o, [(1, 10.0), (2, 20.0)]) for o in trials.outcome], tmp_path / "c.png", "title"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize("name", SEARCHED)
def test_a_draw_stands_for_the_settings_it_is_made_of(name: str) -> None:
    for value in (None, 0.02) if name == "clipping" else (16, 64) if name == "batch_size" else (3,):
        assert SPACE.settings(draw(SPACE, {name: value})) == {name: value}
        assert distributions(SPACE, (name,))[name]._contains(draw(SPACE, {name: value})[name])


def test_the_search_spaces_are_the_papers_and_the_laptops() -> None:
    assert SPACE.batch_sizes() == [16, 32, 64, 128]
    assert RECIPES["nf_resnet50_ablation"].space.batch_sizes() == [256, 512, 1024, 2048, 4096]
    assert RECIPES["nf_resnet50_ablation"].space.clipping == (0.01, 0.16)
