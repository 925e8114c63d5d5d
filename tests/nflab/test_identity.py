"""A run is its id: what is refused when folder, study and MLflow do not mean the same one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from nflab.recording.roots import begin_root, find_root, refuse_taken
from nflab.recording.tracker import Tracker
from nflab.searching.study import open_study
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.storage.run_folder import (
    Identity,
    identify,
    new_identity,
    read_identity,
    stored_config,
    write_config,
    write_identity,
)


class Place:
    """A storage and a tracking store."""

    def __init__(self, folder: Path) -> None:
        self.storage, self.uri = folder / "runs", f"sqlite:///{folder}/mlflow.db"

    @property
    def tracker(self) -> Tracker:
        """A new process's."""
        return Tracker(self.uri, str(self.storage), "train")

    def folder(self, name: str) -> str:
        return str(self.storage / name)

    def begin(self, name: str, experiment: str = "train") -> Identity:
        """A run's folder, as a session writes it."""
        identity = new_identity(name, experiment, "digest")
        write_identity(self.folder(name), identity)
        write_config(self.folder(name), replace(Config(), name=name))
        return identity


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_run_is_what_its_folder_says(place: Place) -> None:
    identity = place.begin("a")
    assert identify(place.folder("a"), "a", "train") == identity
    assert read_identity(place.folder("b")) is None


def test_a_copied_folder_is_refused(place: Place) -> None:
    place.begin("a")
    shutil.copytree(place.folder("a"), place.folder("b"))
    with pytest.raises(ConfigError, match=r"b holds the run 'a', as its run.json says, not 'b'"):
        identify(place.folder("b"), "b", "train")
    # So it is where the command line looks first, for the configuration to go on with.
    with pytest.raises(ConfigError, match=r"b holds the run 'a', as its config.json says"):
        stored_config(Config, "b", str(place.storage))
    # So is one from before folders had run.json, by the name in its configuration.
    Path(place.folder("b"), "run.json").unlink()
    with pytest.raises(ConfigError, match=r"b holds the run 'a', as its config.json says"):
        identify(place.folder("b"), "b", "train")


def test_a_folder_whose_configuration_names_another_run_is_refused(place: Place) -> None:
    place.begin("a")
    write_config(place.folder("a"), replace(Config(), name="z"))
    with pytest.raises(ConfigError, match=r"a holds the run 'z', as its config.json says"):
        identify(place.folder("a"), "a", "train")


def test_a_run_of_another_script_is_refused(place: Place) -> None:
    place.begin("a")
    with pytest.raises(ConfigError, match=r"was started by experiments/train\.py"):
        identify(place.folder("a"), "a", "agc_sweep")


def test_a_damaged_identity_is_told(place: Place) -> None:
    place.begin("a")
    Path(place.folder("a"), "run.json").write_text('{"id": 1')
    with pytest.raises(ConfigError, match=r"run.json is damaged: put a copy of it back"):
        identify(place.folder("a"), "a", "train")


@pytest.mark.parametrize("name", ["../runs/a/../c", "a/b", "", ".", "-x", "a\nb", "x" * 101])
def test_what_is_resumed_is_a_name_and_no_path(place: Place, name: str) -> None:
    place.begin("a")
    with pytest.raises(ConfigError, match="must name a folder"):
        stored_config(Config, name, str(place.storage))


def test_a_run_of_another_folder_is_not_gone_on_with(place: Place) -> None:
    begin_root(place.tracker, place.begin("a"), place.folder("a"), {})
    # The same name, begun in another storage.
    other = new_identity("a", "train", "digest")
    for ask in (
        lambda: begin_root(place.tracker, other, "/elsewhere/a", {}),
        lambda: refuse_taken(place.tracker, "a"),
    ):
        with pytest.raises(ConfigError, match=r"'a' exists in MLflow at .* kept in .*/runs/a"):
            ask()
    assert len(place.tracker.search("")) == 1


def test_a_run_begun_again_is_the_same(place: Place) -> None:
    identity, tags = place.begin("a"), {"kind": "training"}
    first = begin_root(place.tracker, identity, place.folder("a"), tags)
    assert first[1]
    assert begin_root(place.tracker, identity, place.folder("a"), tags) == (first[0], False)


def test_a_moved_storage_is_followed_and_a_copied_one_is_refused(
    place: Place, tmp_path: Path
) -> None:
    identity = place.begin("a")
    run_id, _ = begin_root(place.tracker, identity, place.folder("a"), {})
    copy = str(tmp_path / "copy" / "a")
    shutil.copytree(place.folder("a"), copy)
    with pytest.raises(ConfigError, match=r"copy/a is a copy of .*runs/a"):
        begin_root(place.tracker, identity, copy, {})
    shutil.rmtree(place.folder("a"))
    assert begin_root(place.tracker, identity, copy, {}) == (run_id, False)
    assert find_root(place.tracker, identity, copy) is not None


def test_a_run_that_was_deleted_in_mlflow_is_told_with_the_way_out(place: Place) -> None:
    identity = place.begin("a")
    run_id, _ = begin_root(place.tracker, identity, place.folder("a"), {})
    MlflowClient(place.uri).delete_run(run_id)
    with pytest.raises(ConfigError, match=f"restore it there .*run {run_id}.*or start anew"):
        begin_root(place.tracker, identity, place.folder("a"), {})
    MlflowClient(place.uri).restore_run(run_id)
    assert begin_root(place.tracker, identity, place.folder("a"), {}) == (run_id, False)


def test_an_experiment_that_was_deleted_in_mlflow_is_restored(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = place.begin("a")
    run_id, _ = begin_root(place.tracker, identity, place.folder("a"), {})
    MlflowClient(place.uri).delete_experiment(place.tracker.experiment_id)
    capsys.readouterr()
    assert begin_root(place.tracker, identity, place.folder("a"), {}) == (run_id, False)
    assert "the experiment train, which was deleted in MLflow, is restored" in (
        capsys.readouterr().out
    )


def test_what_is_concluded_twice_is_recorded_once(place: Place) -> None:
    tracker = place.tracker
    run_id = tracker.start("a", {})
    for _ in range(2):
        tracker.log_anew(run_id, {"val_top1": 50.0, "seconds": 2.5})
    tracker.log_anew(run_id, {"val_top1": 50.0, "seconds": 3.5})
    assert tracker.history(run_id, "val_top1") == [(0, 50.0)]
    assert tracker.history(run_id, "seconds") == [(0, 2.5), (0, 3.5)]


@pytest.mark.slow
def test_two_first_processes_lay_out_one_store(tmp_path: Path) -> None:
    ask = f"from nflab.recording.client import connect; connect('sqlite:///{tmp_path}/new/m.db')"
    processes = [
        subprocess.Popen([sys.executable, "-c", ask], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told


class Sweep:
    """A sweep's folder and study."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = str(folder), folder / "study.db"
        self.identity = Identity("a" * 32, "s", "agc_sweep")

    def open(self, begun: bool = False, identity: Identity | None = None) -> optuna.Study:
        return open_study(self.file, identity or self.identity, self.folder, begun)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_a_study_says_whose_it_is(sweep: Sweep) -> None:
    sweep.open().ask()
    assert len(sweep.open(begun=True).trials) == 1
    with pytest.raises(ConfigError, match=r"study.db is the study of another sweep than 's'"):
        sweep.open(identity=Identity("b" * 32, "s", "agc_sweep"))


@pytest.mark.parametrize("begun", [False, True])
def test_a_sweep_whose_study_is_gone_is_not_begun_anew(sweep: Sweep, begun: bool) -> None:
    sweep.open().ask()
    sweep.file.unlink()
    with pytest.raises(ConfigError, match=r"put .*study.db back \(it was written as .* on .*\)"):
        sweep.open(begun)
    assert not sweep.file.exists()


def test_another_study_of_the_name_does_not_take_its_place(sweep: Sweep) -> None:
    sweep.open().ask()
    sweep.file.unlink()
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{sweep.file}")
    study.ask()
    with pytest.raises(ConfigError, match="is the study of another sweep"):
        sweep.open()


@pytest.mark.parametrize("left", ["nothing", "another sweep's"])
def test_a_study_without_trials_is_not_that_of_a_sweep_that_has_some(
    sweep: Sweep, left: str
) -> None:
    sweep.open().ask()
    sweep.file.unlink()
    Path(sweep.folder, "study.json").unlink()  # as of a sweep from before there was one
    if left == "nothing":
        sweep.file.touch()
    else:
        optuna.create_study(study_name="x", storage=f"sqlite:///{sweep.file}").ask()
    with pytest.raises(ConfigError, match="is the study of another sweep"):
        sweep.open(begun=True)


def test_a_study_from_before_they_said_whose_they_are_is_gone_on_with(sweep: Sweep) -> None:
    study = optuna.create_study(
        study_name="s", storage=f"sqlite:///{sweep.file}", direction="maximize"
    )
    study.ask()
    assert len(sweep.open(begun=True).trials) == 1
    marker = json.loads(Path(sweep.folder, "study.json").read_text())
    assert (marker["run"], marker["file"]) == (sweep.identity.id, str(sweep.file))


def test_a_damaged_study_is_told(sweep: Sweep) -> None:
    sweep.open()
    sweep.file.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=r"cannot open the study .*study.db"):
        sweep.open()
