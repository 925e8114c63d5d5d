"""Recorded runs repeated, as a user does it and read back from MLflow."""

import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import Script, run_script

GRID = "--batch-sizes 64 --clippings 0.08 --seeds 1 --epochs 3 --name g"


@pytest.fixture(scope="module")
def store(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store with a grid of three cells and a sweep of two trials."""
    folder = tmp_path_factory.mktemp("replay")
    env = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "NFLAB_STORAGE": str(folder / "runs"),
        "RAY_ADDRESS": ray_address,
    }
    done = run_script(folder, env, "clipping_vs_batch_size.py", *GRID.split())
    assert done.returncode == 0, done.stdout + done.stderr
    return env


def cells(store: dict[str, str]) -> dict[str, str]:
    """Clipping -> id, of the normalizer-free cells; and the grid's own."""
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("clipping_vs_batch_size")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    found = {
        run.data.params["clipping"]: run.info.run_id
        for run in runs
        if run.data.params.get("model") == "dm_nf_resnet_digits" and "cell" in run.data.tags
    }
    (parent,) = [r.info.run_id for r in runs if "mlflow.parentRunId" not in r.data.tags]
    return {**found, "grid": parent}


def test_a_cell_comes_out_the_same(script: Script, store: dict[str, str]) -> None:
    done = script("replay.py", cells(store)["0.08"], **store)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"the same in all (\d+) points, bit for bit", done.stdout)
    assert found is not None
    # Three epochs of losses, accuracies, the learning rate and what was clipped; then the test's.
    assert int(found[1]) > 3 * 6 + 3
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("replay")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id])[0]
    assert run.data.tags["outcome"] == "finished"


def test_what_differs_is_said(script: Script, store: dict[str, str], tmp_path: Path) -> None:
    run_id = cells(store)["none"]
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    path = Path(client.download_artifacts(run_id, "config.json"))
    config = json.loads(path.read_text())
    config["run"]["seed"] += 1
    changed = tmp_path / "config.json"
    changed.write_text(json.dumps(config))
    client.log_artifact(run_id, str(changed))
    done = script("replay.py", run_id, **store)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"train_loss, epoch 1: [\d.]+ was, [\d.]+ is", done.stdout)
    assert re.search(r"\d+ of \d+ points differ", done.stdout)


def test_one_that_was_cut_is_repeated_as_far_as_it_came(
    script: Script, store: dict[str, str], tmp_path: Path
) -> None:
    """Its schedule is the whole one's: two epochs of a training of three are not one of two."""
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    whole = client.get_run(cells(store)["0.08"])
    kept = ("outcome", "dataset_fingerprint", "code_fingerprint", "world_size", "placement")
    tags = {name: whole.data.tags[name] for name in (*kept, "mlflow.parentRunId")}
    cut = client.create_run(whole.info.experiment_id, tags=tags, run_name="cut")
    recorded = client.download_artifacts(whole.info.run_id, "config.json")
    client.log_artifact(cut.info.run_id, recorded)
    for name in {name for name in whole.data.metrics if not name.startswith("test_")}:
        for point in client.get_metric_history(whole.info.run_id, name):
            if point.step <= 2:
                client.log_metric(cut.info.run_id, name, point.value, step=point.step)
    client.set_tag(cut.info.run_id, "outcome", "pruned")
    done = script("replay.py", cut.info.run_id, **store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch   2/3" in done.stdout
    assert "epoch   3/3" not in done.stdout
    assert "bit for bit" in done.stdout


def test_what_cannot_be_repeated_is_said(script: Script, store: dict[str, str]) -> None:
    for run_id, said in (
        ("0" * 32, "there is no run"),
        (cells(store)["grid"], "no single training"),
    ):
        done = script("replay.py", run_id, **store)
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
