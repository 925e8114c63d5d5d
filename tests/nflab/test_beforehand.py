"""What a search begins with: which results of earlier sweeps and grids fit, and who knows them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from nflab.data import load_dataset
from nflab.recording.tracker import Tracker
from nflab.searching.beforehand import Result, as_trials
from nflab.searching.distributions import distributions
from nflab.searching.foresight import STARTUP_TRIALS
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat, replace
from nflab.settings.recipes import scales_of
from nflab.settings.streams import Stream, keys
from nflab.settings.studies import SweepConfig
from nflab.studies.beforehand import FILE, find_results, results_before
from tests.nflab.test_ledger import CONFIG, Stores

pytestmark = pytest.mark.slow

SEARCH = replace(SweepConfig(), search=("clipping=0.01..0.64:log,none", "augmentation_level=0..10"))


class Study:
    """A sweep that has begun, over a store with one earlier sweep or grid, called `old`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.old = Tracker(self.uri, str(folder), "agc_sweep")
        self.parent = self.old.start("old", {})
        self.tracker = Tracker(self.uri, str(folder), "sweep")
        self.run_id = self.tracker.start("new", {})

    def record(self, top1: float, outcome: str = "finished", **settings: Any) -> None:
        """A trial of the earlier sweep."""
        fingerprint = settings.pop("fingerprint", load_dataset(Config()).fingerprint)
        run_id = self.old.start(
            "x", {"trial": "001", "dataset_fingerprint": fingerprint}, self.parent
        )
        params = {**flat(Config()), "num_workers": 2, **settings}
        if params["partners"] is None:
            del params["partners"]
        MlflowClient(self.uri).log_batch(
            run_id,
            metrics=[Metric("val_top1", top1, 0, 1)],
            params=[Param(name, as_text(value)) for name, value in params.items()],
        )
        self.old.finish(run_id, outcome)  # type: ignore[arg-type]

    def begin(self, config: SweepConfig = SEARCH, *names: str) -> list[Result]:
        config = replace(config, earlier=names or ("old",), tracking_uri=self.uri)
        run: Any = SimpleNamespace(
            config=config,
            session=SimpleNamespace(folder=str(self.folder / "new")),
            outbox=SimpleNamespace(read=lambda ask: ask()),
            tracker=self.tracker,
            run_id=self.run_id,
        )
        return results_before(run, find_results(config))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def test_results_that_differ_in_what_is_searched_alone_are_taken(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    study.record(91.0, clipping=0.16)
    study.record(80.0, clipping=None, augmentation_level=3, seed=7)
    study.record(0.0, "diverged", clipping=0.5)
    study.record(50.0, "pruned", clipping=0.02)
    study.record(50.0, clipping=0.9)  # outside of what is searched
    study.record(95.0, clipping=0.1, batch_size=16)
    found = study.begin()
    assert {(r.settings["clipping"], r.outcome, r.val_top1) for r in found} == {
        (0.16, "finished", 91.0),
        (None, "finished", 80.0),
        (0.5, "diverged", 0.0),
    }
    (plain,) = [r.settings for r in found if r.settings["clipping"] is None]
    assert plain == {"clipping": None, "augmentation_level": 3}
    assert {r.origin for r in found} == {"old"}
    assert "begins with 3 of 6 results of old" in capsys.readouterr().out


def test_the_order_in_which_they_began_makes_no_difference(tmp_path: Path) -> None:
    # Trials that run at once begin as the machine pleases.
    done = [(91.0, 0.16), (80.0, None), (85.0, 0.02), (91.0, 0.3)]
    found = []
    for number, order in enumerate((done, done[::-1])):
        (tmp_path / str(number)).mkdir()
        study = Study(tmp_path / str(number))
        for top1, clipping in order:
            study.record(top1, clipping=clipping)
        found.append(study.begin())
    assert len(found[0]) == 4 and found[0] == found[1]


def test_they_are_taken_once(study: Study) -> None:
    study.record(91.0, clipping=0.16)
    before = study.begin()
    study.record(99.0, clipping=0.3)
    assert study.begin() == before
    (study.folder / "new" / FILE).unlink()
    study.tracker.start("001", {"trial": "001"}, study.run_id)
    with pytest.raises(ConfigError, match=f"{FILE} is not there, which says what the search began"):
        study.begin()


def test_a_setting_that_nothing_reads_makes_no_difference(study: Study) -> None:
    study.record(90.0, clipping=0.16, augmentation_layers=2)  # at level 0
    study.record(80.0, clipping=0.16, augmentation_level=5, augmentation_layers=2)
    (found,) = study.begin()
    assert found.val_top1 == 90.0
    assert len(Study(study.folder).begin(replace(SEARCH, augmentation_layers=2))) == 1  # as kept


def test_what_nothing_reads_is_written_as_this_search_would(study: Study) -> None:
    config = replace(SEARCH, search=("augmentation_level=0..10", "augmentation_layers=1..3"))
    study.record(90.0, augmentation_level=0, augmentation_layers=1)
    study.record(80.0, augmentation_level=5, augmentation_layers=2)
    assert [r.settings for r in study.begin(config)] == [
        {"augmentation_level": 0, "augmentation_layers": 1},
        {"augmentation_level": 5, "augmentation_layers": 2},
    ]


def test_images_that_were_mixed_otherwise_before_are_another_training(study: Study) -> None:
    config = replace(SEARCH, mixup=True)
    study.record(80.0, mixup=True, partners=None)  # None: it was recorded without
    with pytest.raises(ConfigError, match="partners earlier -> batch"):
        study.begin(config)
    study.record(90.0, mixup=True)
    assert [r.val_top1 for r in study.begin(config)] == [90.0]


def test_weights_are_known_by_a_path_alone(study: Study) -> None:
    study.record(90.0)
    with pytest.raises(ConfigError, match="--from takes no results of pre-trained weights"):
        study.begin(replace(SEARCH, pretrained="hub"))


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ({"fingerprint": "f" * 64}, "no result of 'old' fits this search: another dataset"),
        ({"epochs": 9}, "no result of 'old' fits this search: epochs 9 -> 40"),
        ({"clipping": 0.9}, r"clipping is searched in 0.01 to 0.64, or none"),
        ({"outcome": "pruned"}, "fits this search: none has ended"),
    ],
)
def test_what_does_not_fit_is_told(study: Study, recorded: dict[str, Any], told: str) -> None:
    study.record(90.0, **recorded)
    with pytest.raises(ConfigError, match=told):
        study.begin()


def test_a_name_of_no_sweep_is_told(study: Study) -> None:
    study.record(90.0)
    with pytest.raises(ConfigError, match="there is no sweep or grid 'other' in sqlite"):
        study.begin(SEARCH, "old", "other")


def test_a_trial_is_proposed_as_by_optuna_with_these_results(tmp_path: Path) -> None:
    """In a study of Optuna's that has them as trials; numbers and seeds are as without them."""
    scales = scales_of(CONFIG)
    results = [
        Result({"clipping": c, "batch_size": b, "augmentation_level": 0}, o, v, "old")  # type: ignore[arg-type]
        for c, b, o, v in (
            (0.01, 16, "finished", 95.0),
            (0.02, 32, "finished", 94.0),
            (0.3, 64, "finished", 70.0),
            (None, 128, "diverged", 0.0),
            (0.5, 128, "diverged", 0.0),
        )
    ]
    beforehand = as_trials(scales, results)
    stores = Stores(tmp_path)
    ledger = stores.open()
    ledger._beforehand = beforehand
    proposal = ledger.propose()
    assert proposal is not None
    seed = int(keys(CONFIG.run.seed, Stream.SEARCH, 0)) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    theirs = optuna.create_study(direction="maximize", sampler=sampler)
    theirs.add_trials(beforehand)
    asked = theirs.ask()
    drawn = {name: asked._suggest(name, scale) for name, scale in distributions(scales).items()}
    (own,) = stores.trials()
    assert own.params == drawn
    assert (proposal.number, proposal.settings["seed"]) == (1, CONFIG.run.seed)
    (tmp_path / "without").mkdir()
    assert Stores(tmp_path / "without").open().propose().settings != proposal.settings
    assert json.loads(json.dumps([t.user_attrs["origin"] for t in beforehand])) == ["old"] * 5
