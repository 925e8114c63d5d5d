"""Results in Google's object storage, on an emulator; Azure's is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from gcp_storage_emulator.server import create_server

from nflab.recording.archive import Archive
from nflab.recording.client import artifact_root
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.locations import located
from nflab.storage import files
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import (
    Away,
    delete,
    exists,
    list_files,
    read_bytes,
    read_text,
    write_bytes,
    write_text,
)
from tests.buckets import Front
from tests.conftest import ROOT, free_port
from tests.stores import new_database

BUCKET = "nflab-results"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """What leads to an emulator with an empty bucket, which is the environment's while in use."""
    folder = tmp_path_factory.mktemp("google")
    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    way = Front(("127.0.0.1", port))
    endpoint = f"http://127.0.0.1:{way.port}"
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {
        "type": "service_account",
        "project_id": "nflab",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": "nflab@nflab.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }
    (folder / "account.json").write_text(json.dumps(account))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "account.json"))
            patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)  # Arrow's, of C++
            patch.setenv("STORAGE_EMULATOR_HOST", endpoint)  # MLflow's, of Python
            patch.setattr(files, "RETRY_SECONDS", 0.05)
            patch.setattr(files, "GCS_SECONDS", 1)
            yield way
    finally:
        way.close()
        server.stop()


def test_files_are_written_read_listed_and_deleted(front: Front) -> None:
    root = f"gs://{BUCKET}/files/a run"
    assert read_text(f"{root}/x.txt") is None and list_files(root) == []
    write_text(f"{root}/x.txt", "é")
    write_bytes(f"{root}/x.txt", b"new")
    write_text(f"{root}/empty", "")
    assert read_bytes(f"{root}/x.txt") == b"new" and read_text(f"{root}/empty") == ""
    assert exists(f"{root}/x.txt") and not exists(root)
    assert sorted(list_files(root)) == [f"{root}/empty", f"{root}/x.txt"]
    delete(f"{root}/x.txt")
    delete(f"{root}/x.txt")
    assert list_files(root) == [f"{root}/empty"]


def test_a_file_is_whole_or_what_it_was(front: Front) -> None:
    address = f"gs://{BUCKET}/whole/state.json"
    write_text(address, "old")
    opened, path = files.open_uri(address)
    stream = opened.open_output_stream(path)
    stream.write(b"half")
    assert read_text(address) == "old"
    stream.close()
    assert read_text(address) == "half"


@pytest.mark.slow
def test_checkpoints_come_back_whole(front: Front, tmp_path: Path) -> None:
    checkpoints = Checkpoints.of_run(f"gs://{BUCKET}/run")
    for epoch in (1, 2, 3, 4):
        made = tmp_path / str(epoch)
        made.mkdir()
        (made / "state.pt").write_text(f"state {epoch}")
        (made / "weights.pt").write_bytes(bytes([epoch]) * (3 << 20))
        checkpoints.save(made, epoch, best=1)
    with checkpoints.last() as found:
        assert found.folder is not None
        assert (found.folder / "state.pt").read_text() == "state 4"
        assert (found.folder / "weights.pt").read_bytes() == bytes([4]) * (3 << 20)
    assert [mark[0] for mark in checkpoints._marks()] == [1, 3, 4]


@pytest.mark.slow
def test_a_store_that_is_away_is_waited_for(front: Front) -> None:
    address = f"gs://{BUCKET}/away/x.txt"
    write_text(address, "kept")
    with ThreadPoolExecutor() as pool:
        front.fail("refuses")
        try:
            with pytest.raises(Away, match="cannot be used: "):
                read_text(address, patience=0)
            asked = pool.submit(read_text, address)
        finally:
            front.recover()
        assert asked.result(60) == "kept"
    with pytest.raises(FileNotFoundError):
        write_text("gs://no-such-bucket/x.txt", "x")


@pytest.mark.slow
def test_a_training_keeps_all_it_has_in_the_bucket(front: Front, tmp_path: Path) -> None:
    new_database(tmp_path / "mlflow.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "experiments/train.py", "--epochs", "1", "--name", "t"]
    command += ["--storage", f"gs://{BUCKET}/runs", "--tracking-uri", store]
    env = {**os.environ, "NFLAB_OF_DRIVERS": str(tmp_path / "own")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Checkpoints.of_run(f"gs://{BUCKET}/runs/t").last_mark() is not None
    assert read_text(f"gs://{BUCKET}/runs/t/config.json")
    archive = Archive(store)
    (run,) = archive.runs("train")
    assert run.artifacts.startswith(f"gs://{BUCKET}/runs/mlflow-artifacts/")
    with archive.artifact(run.run_id, "config.json") as file:
        assert file is not None and json.loads(file.read_text())["run"]["name"] == "t"


def test_artifacts_need_googles_client_unless_a_server_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = f"gs://{BUCKET}/runs"
    assert artifact_root("sqlite:///m.db", storage, "train") == f"{storage}/mlflow-artifacts/train"
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)  # not installed
    assert artifact_root("http://127.0.0.1:5000", storage, "train") is None
    with pytest.raises(ConfigError, match="pip install google-cloud-storage"):
        artifact_root("sqlite:///m.db", storage, "train")


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "wasbs", "az"])
def test_azures_object_storage_is_refused_before_anything(scheme: str) -> None:
    address = f"{scheme}://results@account.dfs.core.windows.net/runs"
    with pytest.raises(ConfigError, match="mount the container") as told:
        located(replace(Config(), storage=address))
    assert "\n" not in str(told.value)
