import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.serialization import from_json
from nflab.storage.ownership import FolderBoard, Ownership
from tests.conftest import Script

FLAGS = ["--epochs", "2", "--batch-size", "64", "--base-learning-rate", "0.2", "--seed", "4"]


def only_run(store: dict[str, str]) -> Run:
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("train")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_training_on_workers_of_ray_train_is_training_in_one_process(
    script: Script, store: dict[str, str], ray_address: str
) -> None:
    done = script("train.py", *FLAGS, "--num-workers", "2", RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(store)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
    assert run.data.tags["world_size"] == "2"
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    recorded = client.download_artifacts(run.info.run_id, "config.json")
    reports: list[dict[str, Any]] = []
    train(
        from_json(Config, Path(recorded).read_text()),
        Worker(report=reports.append),
    )
    for report in reports:
        for name in ("train_loss", "val_loss"):
            history = client.get_metric_history(run.info.run_id, name)
            value = next(point.value for point in history if point.step == report["epoch"])
            assert value == pytest.approx(report[name], rel=1e-5)
    assert f"test top-1 {run.data.metrics['test_top1']:.2f} %" in done.stdout
    assert "weights.pt" in {file.path for file in client.list_artifacts(run.info.run_id)}
    best = client.get_model_version_by_alias("nflab-digits", "best")
    assert (best.run_id, best.source) == (run.info.run_id, run.data.tags["model_uri"])


def test_a_recorded_configuration_repeats_the_run_on_a_ray_of_its_own(
    script: Script, store: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"schedule": {"epochs": 1, "warmup_epochs": 0.5}, "run": {"name": "old"}}')
    done = script("train.py", "--config", str(path), "--name", "again", cold=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(store)
    assert run.info.run_name == "again"
    assert run.data.params["epochs"] == "1"


def test_a_diverged_training_is_a_result(
    script: Script, store: dict[str, str], ray_address: str
) -> None:
    flags = ["--epochs", "3", "--base-learning-rate", "1e6", "--clipping", "none"]
    done = script("train.py", *flags, RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(store)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "diverged")
    assert "diverged" in done.stdout


def test_bad_input_is_refused_before_ray_is_reached(script: Script) -> None:
    done = script("train.py", "--model", "dm_nf_resnet5", RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "dm_nf_resnet50" in done.stderr


def test_more_workers_than_the_cluster_can_hold_are_refused(
    script: Script, ray_address: str
) -> None:
    done = script("train.py", "--num-workers", "3", RAY_ADDRESS=ray_address)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "num_workers 3" in done.stderr


def test_a_storage_that_cannot_be_written_is_refused(script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = script("train.py", "--storage", str(tmp_path / "file" / "runs"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "file" / "runs") in done.stderr


def test_a_run_that_another_process_runs_is_refused(script: Script, tmp_path: Path) -> None:
    owner = Ownership()
    owner.take(FolderBoard(str(tmp_path / "runs" / "x")), "x")
    done = script("train.py", "--name", "x")
    owner.release()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"another process is running {tmp_path}/runs/x, process {os.getpid()}" in done.stderr


def test_a_tracking_server_that_does_not_answer_is_refused(script: Script) -> None:
    done = script("train.py", "--tracking-uri", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "http://127.0.0.1:9" in done.stderr


def test_a_recipe_of_ones_own_is_kept_with_its_sources(
    script: Script, store: dict[str, str], tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        'settings:\n  batch_size: {value: 32, source: "to see"}\n'
        "  epochs: {value: 1, source: it is short}\n  subset: {value: 0.1, source: it is small}\n"
        "  warmup_epochs: {value: 0.5, source: it is short}\n"
    )
    done = script("train.py", "--recipe", str(own), "--name", "own")
    assert done.returncode == 0, done.stdout + done.stderr
    client, run = MlflowClient(store["MLFLOW_TRACKING_URI"]), only_run(store)
    digest = hashlib.sha256(own.read_bytes()).hexdigest()[:16]
    assert run.data.params["recipe"] == f"{own}#{digest}"
    assert run.data.params["subset"] == "0.1"
    kept = Path(client.download_artifacts(run.info.run_id, "recipe.yaml"))
    assert kept.read_bytes() == own.read_bytes()
    note = run.data.tags["mlflow.note.content"]
    assert f"own.yaml ({digest})" in note
    assert "- batch size 32: to see" in note
