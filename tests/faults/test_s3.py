"""Runs that keep all they have in a bucket, which fails in their midst."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buckets import Bucket
from tests.faults.runs import ENDS_SECONDS, Run, check_exact, reported, train_on, wait_until
from tests.faults.stores import Stores
from tests.servers import MlflowServer

FAILING_SECONDS = 15


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with Bucket() as started:
        for name, value in started.env.items():  # the test reads artifacts too
            monkeypatch.setenv(name, value)
        yield started


class InBucket(Stores):
    """The stores of a run that keeps its results in a bucket."""

    def __init__(
        self, folder: Path, bucket: Bucket, experiment: str, name: str, uri: str | None = None
    ) -> None:
        super().__init__(folder, experiment, name, uri)
        self._bucket = bucket
        self.env["NFLAB_STORAGE"] = f"s3://{bucket.name}/runs"
        self.env["NFLAB_OF_DRIVERS"] = str(folder / "runs")

    def files(self) -> set[str]:
        """What of the run is in the bucket."""
        return set(self._bucket.files(f"runs/{self.name}/"))

    def text(self, name: str) -> str:
        return self._bucket.read(f"runs/{self.name}/{name}").decode()

    def artifacts(self, run_id: str) -> dict[str, str]:
        """The fingerprints of a run's artifacts."""
        prefix = f"runs/mlflow-artifacts/{self.experiment}/{run_id}/artifacts/"
        return {
            name: hashlib.sha256(self._bucket.read(prefix + name)).hexdigest()
            for name in self._bucket.files(prefix)
        }


def test_a_sweep_whose_bucket_fails_for_a_while_has_all_in_it(
    tmp_path: Path, bucket: Bucket
) -> None:
    stores = InBucket(tmp_path, bucket, "agc_sweep", "s")
    arguments = "--name s --trials 3 --epochs 8".split()
    run = Run(stores, "agc_sweep.py", *arguments)
    wait_until(lambda: reported(stores) > 1, run)
    with bucket.failing("answers 503"):
        time.sleep(FAILING_SECONDS)
    assert run.wait() == 0, run.output()
    stores.agree(3)
    assert stores.outcome() == ("FINISHED", "finished")
    assert set(stores.outcomes().values()) <= {"finished", "pruned"}
    finished = [n for n, outcome in stores.outcomes().items() if outcome == "finished"]
    for number in finished:
        check_exact(stores, stores.children()[number])
    best = max(finished, key=lambda n: stores.children()[n].data.metrics["val_top1"])
    epoch = f"trials/{best:04d}/checkpoints/epoch-000008"
    logs = {f"trials/{number:04d}/logs/rank-0.log" for number in (1, 2, 3)}
    files = stores.files()
    assert {"config.json", "run.json", f"{epoch}/complete", f"{epoch}/weights.pt"} <= files
    assert {name for name in files if "/logs/" in name} == logs
    assert {Path(name).parts[1] for name in files if "/checkpoints/" in name} == {f"{best:04d}"}
    assert json.loads(stores.text("config.json"))["search"]["trials"] == 3
    for number, child in stores.children().items():
        log = stores.text(f"trials/{number:04d}/logs/rank-0.log")
        assert all(f"'epoch': {step}," in log for step in stores.steps(child))
        assert "config.json" in stores.artifacts(child.info.run_id)
    artifacts = stores.artifacts(stores.parent().info.run_id)
    figures = {"top1.png", "importances.png", "learning_curves.png"}
    assert figures | {"config.json", "classes.json", "trials.csv"} < set(artifacts)
    weights = bucket.read(f"runs/s/{epoch}/weights.pt")
    assert artifacts["best_trial/weights.pt"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.long
def test_a_training_goes_on_to_the_same_result_whatever_its_bucket_does(
    tmp_path: Path, bucket: Bucket
) -> None:
    with MlflowServer(tmp_path, f"s3://{bucket.name}/mlflow-artifacts") as server:
        stores = InBucket(tmp_path, bucket, "train", "t", server.uri)
        flags = "--epochs 24 --batch-size 32".split()

        def killed(run: Run) -> None:
            run.process.kill()
            run.wait()

        def interrupted_while_it_waits(run: Run) -> None:
            with bucket.failing("answers 503"):
                time.sleep(5)
                run.process.send_signal(signal.SIGINT)
                assert run.wait(ENDS_SECONDS) == 130, run.output()

        def left_waiting(run: Run) -> None:
            with bucket.failing("refuses"):
                time.sleep(FAILING_SECONDS)
            assert run.wait() == 0, run.output()

        arguments = ["--name", "t", *flags]
        for happens in (killed, interrupted_while_it_waits, left_waiting):
            run = Run(stores, "train.py", *arguments)
            train_on(run, stores)
            happens(run)
            arguments = ["--resume", "t"]
        assert stores.outcome() == ("FINISHED", "finished")
        recorded = stores.parent()
        assert stores.steps(recorded) == list(range(1, 25))
        assert sum(name.endswith("/complete") for name in stores.files()) in (1, 2)
        assert {"config.json", "run.json", "checkpoints/epoch-000024/complete"} <= stores.files()
        log = stores.text("logs/rank-0.log")
        assert len({line for line in log.splitlines() if line.endswith("rank 0 begins")}) == 3
        assert "waiting for s3://" in log
        assert all(f"'epoch': {step}," in log for step in range(1, 25))
        check_exact(stores, recorded)
        weights = bucket.read("runs/t/checkpoints/epoch-000024/weights.pt")
        experiment, run_id = recorded.info.experiment_id, recorded.info.run_id
        kept = bucket.read(f"mlflow-artifacts/{experiment}/{run_id}/artifacts/weights.pt")
        assert kept == weights
