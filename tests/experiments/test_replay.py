"""Recorded runs repeated, as a user does it and read back from MLflow."""

import json
import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import Recorded, Script
from tests.records import family


@pytest.fixture
def store(recorded: Recorded, tmp_path: Path) -> dict[str, str]:
    """The session's sweep and grid, to which runs may be added."""
    shutil.copy(recorded.folder / "mlflow.db", tmp_path)
    return {
        **recorded.env,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "NFLAB_STORAGE": str(tmp_path / "runs"),
    }


@pytest.fixture
def client(store: dict[str, str]) -> MlflowClient:
    return MlflowClient(store["MLFLOW_TRACKING_URI"])


def whole_trial(store: dict[str, str]) -> Run:
    """A trial of the sweep that trained all of its 3 epochs, with clipping."""
    _, trials = family(store["MLFLOW_TRACKING_URI"], "agc_sweep")
    return next(
        run
        for run in trials
        if run.data.tags["outcome"] == "finished" and run.data.params["clipping"] != "none"
    )


def record_again(
    client: MlflowClient, run: Run, outcome: str, epochs: int, folder: Path, **changed: object
) -> str:
    """Records a run once more, as far as an epoch, with another `run` part of the configuration.

    Returns:
        the new run's id.
    """
    kept = ("dataset_fingerprint", "code_fingerprint", "world_size", "placement")
    tags = {name: run.data.tags[name] for name in (*kept, "mlflow.parentRunId")}
    again = client.create_run(
        run.info.experiment_id, tags={**tags, "outcome": outcome}, run_name="again"
    )
    config = json.loads(Path(client.download_artifacts(run.info.run_id, "config.json")).read_text())
    config["run"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    client.log_artifact(again.info.run_id, str(folder / "config.json"))
    names = {name for name in run.data.metrics if not name.startswith("test_")}
    for name in names if outcome == "pruned" else run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            if point.step <= epochs:
                client.log_metric(again.info.run_id, name, point.value, step=point.step)
    return str(again.info.run_id)


def test_a_trial_comes_out_the_same(
    script: Script, store: dict[str, str], client: MlflowClient
) -> None:
    done = script("replay.py", whole_trial(store).info.run_id, **store)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"the same in all (\d+) points, bit for bit", done.stdout)
    assert found is not None
    # Three epochs of losses, accuracies, the learning rate and what was clipped; then the test's.
    assert int(found[1]) > 3 * 6 + 3
    experiment = client.get_experiment_by_name("replay")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id])[0]
    assert run.data.tags["outcome"] == "finished"


def test_what_differs_is_said(
    script: Script, store: dict[str, str], client: MlflowClient, tmp_path: Path
) -> None:
    """A cell's numbers, as if they were another seed's."""
    _, cells = family(store["MLFLOW_TRACKING_URI"], "clipping_vs_batch_size")
    cell = next(run for run in cells if run.data.tags["outcome"] == "finished")
    seed = int(cell.data.params["seed"]) + 1
    run_id = record_again(client, cell, "finished", 1, tmp_path, seed=seed)
    done = script("replay.py", run_id, **store)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"train_loss, epoch 1: [\d.]+ was, [\d.]+ is", done.stdout)
    assert re.search(r"\d+ of \d+ points differ", done.stdout)


def test_one_that_was_cut_is_repeated_as_far_as_it_came(
    script: Script, store: dict[str, str], client: MlflowClient, tmp_path: Path
) -> None:
    """Its schedule is the whole one's: two epochs of a training of three are not one of two."""
    run_id = record_again(client, whole_trial(store), "pruned", 2, tmp_path)
    done = script("replay.py", run_id, **store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch   2/3" in done.stdout
    assert "epoch   3/3" not in done.stdout
    assert "bit for bit" in done.stdout


def test_what_cannot_be_repeated_is_said(script: Script, store: dict[str, str]) -> None:
    grid, _ = family(store["MLFLOW_TRACKING_URI"], "clipping_vs_batch_size")
    for run_id, said, cold in (
        ("0" * 32, "there is no run", True),
        (grid.info.run_id, "no single training", False),
    ):
        done = script("replay.py", run_id, cold=cold, **store)
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
