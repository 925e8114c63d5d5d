"""A driver in a Slurm job takes the job's Ray, and starts none where there should be one."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nflab.cluster import connection
from nflab.cluster.slurm import ray_of_job
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError
from tests.conftest import free_port, stop_marked

JOB = f"4711{os.getpid()}"
"""Of this process alone: a Ray that another one's tests have started is no Ray of this job."""


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process in no Slurm job."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_outside_of_slurm_and_on_its_only_machine_a_driver_starts_its_own(
    outside: pytest.MonkeyPatch,
) -> None:
    assert ray_of_job() is None
    outside.setenv("SLURM_JOB_ID", JOB)
    assert ray_of_job() is None
    outside.setenv("SLURM_JOB_NUM_NODES", "1")
    assert ray_of_job() is None


@pytest.mark.parametrize("ask", [connection.connect, connection.foresee])
def test_on_several_machines_without_a_ray_a_driver_starts_none(
    outside: pytest.MonkeyPatch, ask: object
) -> None:
    outside.setenv("SLURM_JOB_ID", JOB)
    outside.setenv("SLURM_JOB_NUM_NODES", "2")
    outside.setattr("ray.init", lambda **_: pytest.fail("a Ray was started"))
    with pytest.raises(ConfigError, match=f"job {JOB} has 2 machines and no Ray here: submit with"):
        ask(ScaleConfig())  # type: ignore[operator]
    outside.setenv("RAY_ADDRESS", "local")  # who says so has their way
    assert connection.foresee(ScaleConfig()).num_workers == 1


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a process of a Slurm job has in its environment, whose Ray `ray start` has started."""
    mark, port = f"slurm-of-test-{tmp_path}", free_port()
    folder = tempfile.mkdtemp(prefix="nflab-")  # a path short enough for sockets
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))} | {
        "HOME": str(tmp_path),
        "NFLAB_TEST": mark,
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    start = f"ray start --head --port {port} --num-cpus 3 --include-dashboard=false"
    start += f" --disable-usage-stats --temp-dir {folder}"
    try:
        subprocess.run("ray get-auth-token --generate".split(), env=env, check=True, timeout=60)
        subprocess.run(start.split(), env=env | {"RAY_AUTH_MODE": "token"}, check=True, timeout=120)
        yield {**env, "PORT": str(port)}
    finally:
        stop_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def told(env: dict[str, str], code: str) -> str:
    """What Python code prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.slow
def test_a_driver_joins_the_ray_of_its_job(job: dict[str, str]) -> None:
    """Not that of another job, nor one that another driver of the job has started for itself."""
    ask = "from nflab.cluster.slurm import ray_of_job; print(ray_of_job())"
    address = told(job, ask)
    assert address.partition(":")[2] == job["PORT"]
    other = {**job, "SLURM_JOB_ID": f"{JOB}0", "SLURM_JOB_NUM_NODES": "1"}
    assert told(other, ask) == "None"
    driver = "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); "
    assert told(other, driver + ask) == "None"
    assert told(job, driver + ask).splitlines()[-1] == address
    code = "from nflab.cluster import connection; from nflab.settings.config import ScaleConfig; "
    code += "import ray; print(connection.connect(ScaleConfig())); "
    code += "print(ray.get_runtime_context().gcs_address)"
    assert told(job, code).splitlines() == [
        "1 worker a run, on CPU; 3 at once",
        address,
    ]
