"""Artifacts in a bucket that fails wait in the outbox, behind a server and behind a file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from nflab.data import example_image
from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.recording.client import is_away
from nflab.recording.outbox import Outbox
from nflab.recording.serving import log_model
from nflab.recording.tracker import Tracker
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.storage.checkpoints import Checkpoints
from tests.buckets import Bucket, Failure
from tests.servers import MlflowServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with Bucket() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.env.items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # so that tests are over soon
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield started


@pytest.fixture(scope="module", params=["server", "file"])
def uri(
    request: pytest.FixtureRequest, bucket: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Of a store whose artifacts are in the bucket."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "file":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    with MlflowServer(folder, f"s3://{bucket.name}/server") as server:
        yield server.uri


@pytest.mark.parametrize("how", ["refuses", "answers 503", "resets"])
def test_an_artifact_waits_for_the_bucket(
    bucket: Bucket, uri: str, tmp_path: Path, how: Failure
) -> None:
    tracker = Tracker(uri, f"s3://{bucket.name}/file", how)
    outbox = Outbox(tracker, tmp_path / "unsent")
    run = tracker.start("a", {})
    with bucket.failing(how):
        outbox.put_file(run, "x.txt", partial(Path.write_text, data="of a figure"))
        outbox.put("add_text", run, text="{}", file="config.json")
        outbox.put("finish", run, outcome="finished", when=2000)
        with pytest.raises(ConfigError, match="does not answer: what it has not taken is kept in"):
            outbox.drain(patience=4)
        outbox.close()
    assert [file.read_text() for file in tmp_path.glob("unsent/*/x.txt")] == ["of a figure"]
    again = Outbox(tracker, tmp_path / "unsent")
    again.drain()
    again.close()
    client = MlflowClient(uri)
    assert client.get_run(run).info.end_time == 2000
    copies = [Path(client.download_artifacts(run, name)) for name in ("x.txt", "config.json")]
    assert [copy.read_text() for copy in copies] == ["of a figure", "{}"]
    assert not list(tmp_path.glob("unsent/*/x.txt"))


def test_a_model_waits_for_the_bucket_and_is_one(
    bucket: Bucket, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nflab.recording.outbox.PATIENCE_SECONDS", 0)
    config = replace(RECIPES["digits"].config, dataset="digits:3-4", epochs=1)
    train(config, Worker(report=lambda metrics: None, checkpoints=Checkpoints(str(tmp_path))))
    tracker = Tracker(uri, f"s3://{bucket.name}/file", "model")
    outbox = Outbox(tracker, tmp_path / "unsent")
    run = tracker.start("a", {})

    def add() -> None:
        tracker.add_model(run, tmp_path / "epoch-000001", example_image(config))

    # As if the bucket went away between the network's files and the model's.
    files = partial(log_model, uri, tracker.experiment_id, run, tmp_path / "epoch-000001")
    with bucket.failing("answers 503"):
        with pytest.raises(ConfigError, match="does not answer"):
            outbox.read(add)
        with pytest.raises(Exception, match=r".") as failed:
            files(example_image(config))
        assert is_away(failed.value)
    outbox.read(add)
    outbox.close()
    client = MlflowClient(uri)
    (model,) = client.search_logged_models([tracker.experiment_id])
    assert model.status == LoggedModelStatus.READY
    assert client.get_run(run).data.tags["model_uri"] == model.model_uri
    assert files(example_image(config)) == model.model_uri  # killed before it was written down


def test_what_a_bucket_that_there_is_not_would_hold_is_kept_until_there_is(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "s3://not-yet", "x")
    outbox = Outbox(tracker, tmp_path / "unsent")
    outbox.put("add_text", tracker.start("a", {}), text="{}", file="config.json")
    with pytest.raises(ConfigError, match="NoSuchBucket"):
        outbox.drain(patience=5)
    assert capsys.readouterr().out.count("NoSuchBucket") == 1
    bucket.behind.create_bucket(Bucket="not-yet")
    outbox.drain()
    outbox.close()
    found = bucket.behind.list_objects_v2(Bucket="not-yet")["Contents"]
    assert [file["Key"].rpartition("/")[2] for file in found] == ["config.json"]
