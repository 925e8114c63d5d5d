"""Which jobs keep a cluster up, on a real Ray whose jobs train, hang, or do something else."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_port, stop_marked
from tests.stores import new_store

ASKED = """
import json, os, sys, time
import idle
idle.JOBS, idle.GCS, idle.STALLED_SECONDS = sys.argv[1], sys.argv[2], float(sys.argv[3])
print(json.dumps(idle.working()))
"""

WATCHED = """
import sys, time
from collections import Counter
from nflab.cluster import trained
told, deadline = set(), time.monotonic() + 200
while max(Counter(job for job, _ in told).values(), default=0) < 2:
    assert time.monotonic() < deadline
    told |= set(trained.by_job(sys.argv[1]).items())
    time.sleep(0.05)
"""

HANGS = """
import time, ray
from nflab.cluster import trained
ray.init()
with trained.training():
    open(f"{__file__}.begun", "w").close()
    time.sleep(600)
"""

ENDED = """
import time, ray
from nflab.cluster import trained
ray.init()
with trained.training():
    pass
open(f"{__file__}.begun", "w").close()
time.sleep(600)
"""

OTHER = """
import time, ray
ray.init()
open(f"{__file__}.begun", "w").close()
time.sleep(600)
"""


class Head:
    """A head of Ray, and what is run there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"idle-of-test-{folder}"
        self.gcs, self.jobs = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.env = {
            **os.environ,
            **new_store(folder),
            "HOME": str(folder),
            "NFLAB_TEST": self.mark,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": f"http://{self.jobs}",
        }

    def attempt(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=ROOT / "cluster",
            env=self.env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def run(self, *command: str) -> str:
        """What a command prints."""
        done = self.attempt(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def working(self, stalled: float) -> bool:
        """Whether the timer finds the cluster at work, if what has not trained for so many seconds
        does not."""
        told = self.run(sys.executable, "-c", ASKED, f"http://{self.jobs}", self.gcs, str(stalled))
        return bool(json.loads(told.splitlines()[-1]))

    def submit(self, name: str, *command: str) -> None:
        """Begins a job."""
        submit = ("ray", "job", "submit", "--submission-id", name, "--no-wait", "--", *command)
        self.wait_for(lambda: self.attempt(*submit).returncode == 0)  # a new head takes none yet

    def begin(self, name: str, code: str) -> None:
        """Begins a job, and waits until it says so."""
        file = self.folder / f"{name}.py"
        file.write_text(code)
        self.submit(name, sys.executable, str(file))
        self.wait_for(Path(f"{file}.begun").exists)

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not there():
            assert time.monotonic() < deadline, self.run("ray", "job", "list")
            time.sleep(0.5)


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("head"))
    port, dashboard = (address.rpartition(":")[2] for address in (head.gcs, head.jobs))
    start = f"ray start --head --port {port} --dashboard-port {dashboard} --num-cpus 2"
    start += f" --dashboard-agent-listen-port {free_port()}"  # the usual one may be another Ray's
    try:
        head.run("ray", "get-auth-token", "--generate")
        head.run(*start.split(), "--disable-usage-stats")
        yield head
    finally:
        stop_marked(head.mark)


def test_a_job_that_trains_nothing_keeps_no_cluster_up_and_others_do(ray_head: Head) -> None:
    assert not ray_head.working(stalled=7200)
    ray_head.begin("hangs", HANGS)
    assert ray_head.working(stalled=7200)
    ray_head.wait_for(lambda: not ray_head.working(stalled=1))
    ray_head.begin("other", OTHER)  # never said that it would train
    assert ray_head.working(stalled=1)
    ray_head.run("ray", "job", "stop", "other")
    ray_head.wait_for(lambda: not ray_head.working(stalled=1))
    ray_head.begin("ended", ENDED)  # does something else now
    assert ray_head.working(stalled=1)
    for name in ("ended", "hangs"):
        ray_head.run("ray", "job", "stop", name)
    ray_head.wait_for(lambda: not ray_head.working(stalled=7200))


@pytest.mark.long
@pytest.mark.parametrize(
    "script", ["train.py", "agc_sweep.py --trials 1", "train.py --num-workers 2"]
)
def test_workers_say_that_a_training_goes_on(ray_head: Head, script: str) -> None:
    name, *flags = script.split()
    job = script.replace(" ", "").replace(".py", "")
    path = str(ROOT / "experiments" / name)
    ray_head.submit(job, sys.executable, path, *flags, "--epochs", "1", "--name", job)
    # The driver says that it begins, and the worker, that it does its first step.
    watched = ray_head.attempt(sys.executable, "-c", WATCHED, ray_head.gcs)
    assert watched.returncode == 0, watched.stderr + ray_head.run("ray", "job", "logs", job)
    ray_head.run("ray", "job", "stop", job)
