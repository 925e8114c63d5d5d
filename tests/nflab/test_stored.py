"""Runs that were stored before there were rooms and identities are read, and gone on with.

`stored/before_rooms.tar.xz` was made by the commit 636be88 in /tmp/old: a training, a sweep and a
grid of two epochs each, and a sweep that was killed after three (weights that nothing reads, models
and figures were taken out to make it small).
"""

import json
import sqlite3
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from nflab.auditing.audit import run_audit
from nflab.recording.archive import Archive
from nflab.reporting.report import write_report
from nflab.settings.studies import SweepConfig
from nflab.storage.run_folder import read_identity, stored_config
from tests.conftest import ROOT, run_script

MADE_IN = "/tmp/old"


class Before:
    """The stored runs, in a folder of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder, folder / "runs"
        self.uri = f"sqlite:///{folder}/mlflow.db"
        with tarfile.open(ROOT / "tests" / "stored" / "before_rooms.tar.xz") as stored:
            stored.extractall(folder, filter="data")
        columns = {
            "runs": "artifact_uri",
            "experiments": "artifact_location",
            "params": "value",
            "tags": "value",
        }
        with closing(sqlite3.connect(folder / "mlflow.db")) as database:
            for table, column in columns.items():
                database.execute(
                    f"update {table} set {column} = replace({column}, ?, ?)", (MADE_IN, str(folder))
                )
            database.commit()
        for config in self.storage.rglob("config.json"):
            config.write_text(config.read_text().replace(MADE_IN, str(folder)))

    def run(self, address: str, name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        env = {
            "MLFLOW_TRACKING_URI": self.uri,
            "NFLAB_STORAGE": str(self.storage),
            "RAY_ADDRESS": address,
        }
        return run_script(self.folder, env, name, *arguments)


@pytest.fixture
def before(tmp_path: Path) -> Before:
    return Before(tmp_path)


def test_their_configurations_and_records_are_read(before: Before, tmp_path: Path) -> None:
    config = stored_config(SweepConfig, "killed-sweep", str(before.storage))
    assert (config.optimizer.batch_size, config.schedule.epochs) == (128, 40)
    archive = Archive(before.uri)
    assert len(archive.rows("agc_sweep")) == 7
    (report, _) = write_report(before.uri, tmp_path / "report")
    assert "Sweep a-sweep" in report.read_text()


def test_they_agree_as_far_as_they_did(before: Before) -> None:
    told = run_audit(before.uri, str(before.storage), dry_run=True).told
    assert not [one for one in told if "run.json" in one.what or "holds the run" in one.what]
    assert {one.where.split(",")[0] for one in told} <= {
        "killed-sweep",  # left running
        "killed-training",  # left running, and without its folder here
        "a-sweep",  # without the weights of its best trial here
    }


def test_a_grid_finds_its_cells_again(before: Before, ray_address: str) -> None:
    flags = "--epochs 2 --seeds 1 --batch-sizes 64 --clippings 0.08 --name a-grid".split()
    done = before.run(ray_address, "clipping_vs_batch_size.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a-grid: 3 cells (3 done)" in done.stdout
    identity = read_identity(str(before.storage / "a-grid"))
    client = MlflowClient(before.uri)
    (parent,) = [r for r in Archive(before.uri).runs(identity.experiment) if r.parent is None]
    assert client.get_run(parent.run_id).data.tags["record"] == identity.id


def test_a_sweep_that_was_killed_goes_on(before: Before, ray_address: str) -> None:
    done = before.run(ray_address, "agc_sweep.py", "--resume", "killed-sweep")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [
        (before.storage / "killed-sweep" / "trials" / number / "logs" / "rank-0.log").read_text()
        for number in ("0001", "0002")
    ]
    assert "continues after epoch 3" in logs[0] and "continues after epoch 4" in logs[1]
    marker = json.loads((before.storage / "killed-sweep" / "study.json").read_text())
    assert marker["run"] == read_identity(str(before.storage / "killed-sweep")).id
    trials = [
        run
        for run in Archive(before.uri).runs("agc_sweep")
        if run.tags.get("kind") == "trial" and run.params["parent"] == "killed-sweep"
    ]
    assert sorted(run.tags["trial"] for run in trials) == ["001", "002", "003"]
    for run in trials:
        steps = [step for step, _ in Archive(before.uri).history(run.run_id, "val_top1")]
        assert steps == list(range(1, len(steps) + 1))
