"""The registry of models, in a real MLflow store."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from nflab.data import example_image, load_dataset
from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.recording.registry import BEST, register, registered_name
from nflab.recording.tracker import Tracker
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.storage.checkpoints import Checkpoints

CONFIG = replace(Config(), epochs=1, warmup_epochs=0.5, batch_size=64)
FINGERPRINT = load_dataset(CONFIG).fingerprint


class Store:
    """A store in a temporary folder, with runs that have a network."""

    def __init__(self, folder: Path) -> None:
        self.tracker = Tracker(f"sqlite:///{folder}/mlflow.db", str(folder), "test")
        self.client = MlflowClient(self.tracker.uri)
        self._checkpoints = Checkpoints.of_run(str(folder / "run"))
        train(CONFIG, Worker(report=lambda _: None, checkpoints=self._checkpoints))

    def run(self, name: str, val_top1: float) -> str:
        """A run with these results, and with its network."""
        run_id = self.tracker.start(name, {})
        self.tracker.log(run_id, {"val_top1": val_top1, "test_top1": val_top1 - 1}, 1)
        self.add_model(run_id)
        return run_id

    def add_model(self, run_id: str, trained_by: str | None = None) -> None:
        with self._checkpoints.last() as found:
            assert found.folder is not None
            example = example_image(CONFIG)
            self.tracker.add_model(run_id, found.folder, example, trained_by=trained_by)

    def register(self, run_id: str, dataset: str = "digits", fingerprint: str = FINGERPRINT) -> int:
        uri = self.client.get_run(run_id).data.tags["model_uri"]
        metrics = self.tracker.metrics(run_id)
        version = register(self.client, run_id, uri, dataset, fingerprint, metrics, "as it is")
        return int(version.version)

    def best(self, name: str = "nflab-digits") -> int:
        return int(self.client.get_model_version_by_alias(name, BEST).version)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("registry"))


def test_versions_are_of_runs_and_the_best_is_the_best(trained: Store) -> None:
    client = trained.client
    first, better, worse, equal = (
        trained.run(name, top1)
        for name, top1 in (("first", 90.0), ("better", 95.25), ("worse", 80.0), ("equal", 95.25))
    )
    assert (trained.register(first), trained.best()) == (1, 1)
    assert (trained.register(better), trained.best()) == (2, 2)
    assert (trained.register(worse), trained.best()) == (3, 2)
    assert (trained.register(equal), trained.best()) == (4, 2)
    version = client.get_model_version("nflab-digits", "2")
    tags = {"val_top1": "95.2500", "test_top1": "94.2500", "settings": "as it is"}
    assert (version.run_id, version.tags) == (better, tags)
    assert version.description == "as it is: validation top-1 95.25 %, test top-1 94.25 %"
    assert version.source == client.get_run(better).data.tags["model_uri"]
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == better


def test_a_run_that_is_concluded_again_has_one_model_and_one_version(trained: Store) -> None:
    run_id = trained.run("again", 50.0)
    version = trained.register(run_id)
    uri = trained.client.get_run(run_id).data.tags["model_uri"]
    trained.add_model(run_id)
    assert trained.register(run_id) == version
    assert trained.client.get_run(run_id).data.tags["model_uri"] == uri
    (found,) = trained.client.search_model_versions(f"run_id = '{run_id}'")
    assert int(found.version) == version
    models = trained.client.search_logged_models([trained.tracker.experiment_id])
    own = [f"models:/{m.model_id}" for m in models if m.source_run_id == run_id]
    assert own == [found.source] == [uri]


def test_a_grid_that_found_a_better_cell_has_its_model_too(trained: Store) -> None:
    run_id = trained.run("grid", 50.0)
    models = []
    for cell in ("first", "first", "better", "better"):
        trained.add_model(run_id, trained_by=cell)
        models.append(trained.client.get_run(run_id).data.tags["model_uri"])
        trained.register(run_id)
    assert models[0] == models[1] != models[2] == models[3]
    found = trained.client.search_model_versions(f"run_id = '{run_id}'")
    assert [v.source for v in sorted(found, key=lambda v: int(v.version))] == models[::2]


def test_what_was_cut_short_before_the_alias_moved_is_made_good(trained: Store) -> None:
    run_id = trained.run("cut short", 97.0)
    version = trained.register(run_id)
    trained.client.delete_registered_model_alias("nflab-digits", BEST)
    assert trained.register(run_id) == version
    assert trained.best() == version


def test_versions_that_a_repeated_request_made_are_removed(trained: Store) -> None:
    run_id = trained.run("twice", 60.0)
    version = trained.register(run_id)
    uri = trained.client.get_run(run_id).data.tags["model_uri"]
    trained.client.create_model_version("nflab-digits", uri, run_id)
    assert trained.register(run_id) == version
    assert len(trained.client.search_model_versions(f"run_id = '{run_id}'")) == 1


def test_other_images_under_the_same_name_are_another_model(trained: Store) -> None:
    run_id = trained.run("other images", 99.0)
    before = trained.client.get_registered_model("nflab-digits").aliases
    assert trained.register(run_id, fingerprint="f00dfeed12345678") == 1
    assert trained.best("nflab-digits-f00dfeed") == 1
    assert trained.client.get_registered_model("nflab-digits").aliases == before


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("digits", "nflab-digits"),
        ("digits:0-4", "nflab-digits-0-4"),
        ("/data/my photos/", "nflab-my-photos"),
    ],
)
def test_names_are_those_that_mlflow_allows(trained: Store, dataset: str, name: str) -> None:
    assert registered_name(dataset) == name
    trained.client.create_registered_model(f"{name}-allowed")
