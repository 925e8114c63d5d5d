"""Several processes that want the same run, on one machine and on two."""

import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import run_script
from tests.faults.runs import ENDS_SECONDS, Run, train_on
from tests.faults.stores import Stores

GRID = "--epochs 2 --warmup-epochs 1 --seeds 1 --batch-sizes 64 --clippings 0.08".split()


def test_two_grids_of_one_name_in_two_storages_at_once(tmp_path: Path) -> None:
    experiment = "clipping_vs_batch_size"
    places = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        places.append(Stores(tmp_path / name, experiment, experiment, uri))
    runs = [Run(place, f"{experiment}.py", *GRID) for place in places]
    codes = [run.wait() for run in runs]
    told = [run.output() for run in runs]
    assert sorted(codes) == [0, 2], told
    refused = told[codes.index(2)].splitlines()[-1]
    assert refused.startswith("error: ")
    assert "exists in MLflow" in refused or "another process is running" in refused
    client = MlflowClient(places[0].uri)
    found = places[0].runs()
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    cells = [run for run in found if run is not parent]
    assert len({run.data.tags["cell"] for run in cells}) == len(cells) == 3
    winner = places[codes.index(0)].folder / "runs"
    assert {run.data.tags["folder"].startswith(str(winner)) for run in cells} == {True}
    for run in cells:
        points = client.get_metric_history(run.info.run_id, "val_top1")
        assert [point.step for point in points] == [1, 2]
    for key in parent.data.metrics:
        assert len(client.get_metric_history(parent.info.run_id, key)) == 1, key


@pytest.mark.long
def test_a_run_of_another_machine_is_left_alone_until_its_heart_stands_still(
    tmp_path: Path,
) -> None:
    stores = Stores(tmp_path, "train", "t")
    there = Run(stores, "train.py", "--name", "t", "--epochs", "400", elsewhere=True)
    train_on(there, stores)
    audit = run_script(tmp_path, stores.env, "audit.py")
    assert "t: is being run: not looked at" in audit.stdout, audit.stdout + audit.stderr
    assert stores.outcome() == ("RUNNING", "running")
    second = run_script(tmp_path, stores.env, "train.py", "--resume", "t")
    assert second.returncode == 2, second.stdout + second.stderr
    assert "another process is running" in second.stderr
    assert there.process.poll() is None
    there.process.send_signal(signal.SIGKILL)
    there.wait()
    here = Run(stores, "train.py", "--resume", "t")
    train_on(here, stores)
    assert "t is taken over from process" in here.output()
    here.process.send_signal(signal.SIGINT)
    assert here.wait(ENDS_SECONDS) == 130, here.output()
    assert stores.outcome() == ("KILLED", "interrupted")
    (recorded,) = stores.runs()
    steps = stores.steps(recorded)
    assert steps == list(range(1, len(steps) + 1))
    assert not [key for key in recorded.data.tags if key.startswith("owner.")]
