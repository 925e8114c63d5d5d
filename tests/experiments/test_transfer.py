"""Pre-training compared, run as a user runs it and read back from MLflow."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import Script

SMALL = ("--source-epochs", "2", "--epochs", "1", "--batch-size", "128")


def runs_of(store: dict[str, str]) -> list[Run]:
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("transfer")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_networks_are_compared_and_only_what_is_missing_is_run(
    script: Script, store: dict[str, str], tmp_path: Path, ray_address: str
) -> None:
    one = script("transfer.py", *SMALL, "--seeds", "1", RAY_ADDRESS=ray_address)
    assert one.returncode == 0, one.stdout + one.stderr
    first = {run.info.run_id: run for run in runs_of(store)}
    assert len(first) == 1 + 2 + 4
    two = script("transfer.py", *SMALL, "--seeds", "2", RAY_ADDRESS=ray_address)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "4 cells (2 done)" in two.stdout
    assert "8 cells (4 done)" in two.stdout
    runs = runs_of(store)
    assert len(runs) == 1 + 4 + 8
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    for run in runs:
        assert run.data.tags["outcome"] == "finished"
        if run is not parent and run.info.run_id in first:
            assert run.data.metrics == first[run.info.run_id].data.metrics
    children = [run for run in runs if run is not parent]
    tuned = [run for run in children if run.data.params["dataset"] == "digits:5-9"]
    started = [run for run in tuned if run.data.params["pretrained"] != "none"]
    assert len(started) == 4
    for run in started:
        weights = Path(run.data.params["pretrained"])
        assert weights.is_file()
        source = run.data.params["model"], run.data.params["seed"]
        (before,) = [
            other
            for other in children
            if weights.parts[-4] == other.data.tags["cell"]
            and (other.data.params["model"], other.data.params["seed"]) == source
        ]
        assert before.data.params["dataset"] == "digits:0-4"
    mean = sum(
        run.data.metrics["test_top1"]
        for run in started
        if run.data.params["model"] == "preact_resnet_digits"
    )
    assert f"{mean / 2:.2f} ± " in two.stdout
    assert "pre-training gives batch norm" in parent.data.tags["mlflow.note.content"]
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"config.json", "transfer.png", "cells.csv", "best_cell"}


@pytest.mark.parametrize(
    ("flags", "said", "cold"),
    [
        ("--seeds 0", "seeds 0 must be at least 1", False),
        ("--model dm_nfnet_f0", "has no batch-normalised twin", True),
        ("--source letters", "'letters' is neither", False),
    ],
)
def test_bad_input_is_said_at_once(script: Script, flags: str, said: str, cold: bool) -> None:
    done = script("transfer.py", *flags.split(), cold=cold)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
