"""Scripts run as a user runs them, to be killed; and what they must come to."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as Recorded

from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.serialization import from_json
from tests.conftest import ROOT, edited_copy
from tests.faults.stores import Stores
from tests.warm import Process, python_for

KILLS = int(os.environ.get("NFLAB_TEST_KILLS", "2"))
"""How often one thing is killed."""

HANGS_SECONDS = 600
"""What takes longer is waiting for something that does not come."""

ENDS_SECONDS = 120
"""What is to end at once ends in this time, on a busy machine too; stores are waited for longer."""

MARK = f"faults-{os.getpid()}"
"""By which all processes that these scripts start are known."""

STARTED: list["subprocess.Popen[bytes] | Process"] = []
"""The scripts' own."""


class Run:
    """A script started in a session of its own, with a Ray of its own."""

    def __init__(
        self,
        stores: Stores,
        script: str,
        *arguments: str,
        elsewhere: bool = False,
        root: Path = ROOT,
    ) -> None:
        """`elsewhere`: as on another machine, whose processes cannot be seen from here; `root`: of
        another copy."""
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.log = (stores.folder / "output.log").open("a+")
        self.begun = self.output().count(" a run, on CPU")
        # A Ray without its GCS is given up sooner than after a minute.
        env |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "20", "NFLAB_TEST": MARK} | stores.env
        path = root / "experiments" / script
        self.process: subprocess.Popen[bytes] | Process
        if elsewhere or root != ROOT:
            apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
            apart = apart if elsewhere else []
            self.process = subprocess.Popen(
                [*apart, sys.executable, str(path), *arguments],
                env=env,
                cwd=stores.folder,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        else:
            log = Path(self.log.name)
            self.process = python_for(env).start(path, arguments, stores.folder, env, log, log)
        STARTED.append(self.process)

    def wait(self, timeout: float = HANGS_SECONDS) -> int:
        return self.process.wait(timeout)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def family(self, word: str) -> list[psutil.Process]:
        """Processes below this one with a word in their command lines."""
        found: list[psutil.Process] = []
        if self.process.poll() is not None:
            return found
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has ended
                continue
        return found


def wait_until(condition: Callable[[], bool], run: Run) -> None:
    deadline = time.monotonic() + HANGS_SECONDS
    while not condition():
        if run.process.poll() is not None:
            return
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.2)


def train_on(run: Run, stores: Stores) -> None:
    """Waits until this run, not one before it, has recorded an epoch."""
    begun = run.begun

    def connected() -> bool:
        return run.output().count(" a run, on CPU") > begun

    wait_until(connected, run)
    before = reported(stores)
    wait_until(lambda: reported(stores) > before, run)


def reported(stores: Stores) -> int:
    """How many epochs have been recorded over all runs."""
    return sum(int(run.data.metrics.get("epoch", 0)) for run in stores.runs())


def check_exact(stores: Stores, run: Recorded, rel: float = 0.0) -> None:
    """A finished run has the very result of the same configuration without interruption, on one
    worker.

    Args:
        rel: by how much it may differ, for rounding.
    """
    config = MlflowClient(stores.uri).download_artifacts(run.info.run_id, "config.json")
    reports: list[dict[str, float]] = []
    train(from_json(Config, Path(config).read_text()), Worker(report=reports.append))
    for metric in ("val_loss", "val_top1", "test_top1"):
        found, expected = run.data.metrics[metric], reports[-1][metric]
        assert expected == pytest.approx(found, rel=rel, abs=0.0), (metric, found, expected)


def slow_copy(folder: Path) -> Path:
    """A copy of the checkout whose epochs take half a second more: on no machine is a run through
    before something has happened to it."""
    slow = ("        sums.begin()", "        __import__('time').sleep(0.5)\n")
    return edited_copy(folder, {"platform/nflab/learning/loop.py": slow})


DISTURBED = "--epochs 10 --batch-size 64 --num-workers 2".split()
"""What is trained by a run that `check_as_undisturbed` looks at."""


def check_as_undisturbed(stores: Stores, undisturbed: Stores) -> None:
    """The training that there is has each epoch once, and the very result of the other."""
    (disturbed,), (whole,) = stores.runs(), undisturbed.runs()
    assert stores.steps(disturbed) == undisturbed.steps(whole) == list(range(1, 11))
    for metric in ("train_loss", "val_loss", "test_top1"):
        assert disturbed.data.metrics[metric] == whole.data.metrics[metric]
