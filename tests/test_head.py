"""`make head`, then job submissions as its output tells: from anywhere, and of an edited copy."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import ROOT, edited_copy, free_port, stop_marked

SWEEP = "experiments/agc_sweep.py --trials 2 --epochs 1 --batch-size 64"


@dataclass(frozen=True)
class Head:
    shell: dict[str, str]
    """All that a new shell has that exported what `make head` printed."""
    tracking_uri: str

    def submit(self, folder: str | Path, *options: str) -> Run:
        """Submits the small sweep from `folder`; returns its parent run."""
        done = subprocess.run(
            [*["ray", "job", "submit"], *options, *f"-- python {SWEEP}".split()],
            cwd=folder,
            env=self.shell,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Five best trials" in done.stdout
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name("agc_sweep")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        return next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)

    def children(self, parent: Run) -> list[Run]:
        client = MlflowClient(self.tracking_uri)
        return list(
            client.search_runs(
                [parent.info.experiment_id],
                f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
            )
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head started by the script behind `make head`, with a fresh home and its own ports."""
    folder = tmp_path_factory.mktemp("head")
    mark = f"head-of-test-{folder}"
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    env = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "NFLAB_TEST": mark,
        "RAY_PORT": str(free_port()),
        "DASHBOARD_PORT": str(free_port()),
        "MLFLOW_TRACKING_URI": tracking_uri,
        "NFLAB_STORAGE": str(folder / "runs"),
    }
    script = ["bash", str(ROOT / "cluster" / "local_head.sh")]
    try:
        started = subprocess.run(
            script, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr
        exports = [
            line.removeprefix("export ").split("=", 1)
            for line in started.stdout.splitlines()
            if line.startswith("export ")
        ]
        assert {name for name, _ in exports} >= {"PATH", "RAY_AUTH_MODE"}
        yield Head({"HOME": str(folder), **dict(exports)}, tracking_uri)
    finally:
        stop_marked(mark)


def test_a_job_runs_from_any_folder(head: Head) -> None:
    parent = head.submit("/")
    assert parent.info.status == "FINISHED"
    assert len(head.children(parent)) == 2


def test_an_edited_copy_runs_its_own_code_of_both_packages_on_workers_too(
    head: Head, tmp_path: Path
) -> None:
    copy = edited_copy(
        tmp_path / "copy",
        {
            "nfnet/schedule.py": ("    if step < warmup_steps:", "    return 0.0625\n"),
            "platform/nflab/learning/loop.py": (
                "        history.append(metrics)",
                "        metrics['train_loss'] = 7\n",
            ),
        },
    )
    before = time.time()
    parent = head.submit(copy, "--working-dir", ".")
    assert parent.info.start_time > before * 1000  # found in the store of the checkout's head
    children = head.children(parent)
    assert len(children) == 2
    for run in children:
        assert run.data.metrics["learning_rate"] == 0.0625
        assert run.data.metrics["train_loss"] == 7


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_submission_without_the_right_token_is_refused(head: Head, token: str | None) -> None:
    request = urllib.request.Request(
        f"{head.shell['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        data=json.dumps({"entrypoint": "true"}).encode(),
        headers={"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {token}"} if token else {}),
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code in (401, 403)
