"""What all tests share: one local Ray, and a way to run a script as a user does."""

import gc
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import torch

from tests.warm import ROOT, python_for

# Worker threads of several processes on few cores only get in each other's way.
torch.set_num_threads(1)

# A Ray's workers give way to all others, unless told; here others are tests that run beside these.
# And it starts some for every driver before they are asked for, which no run of nflab can use, and
# for every run of several workers one that asks the cloud whether it will take a machine away.
os.environ |= {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "false",
    "RAY_enable_worker_prestart": "false",
}

# Many processes import the same.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

WHOLE = ("cluster", "experiments", "faults", "ui")
"""Folders of tests of whole commands, services and machines."""

SERVICES = {"cloud", "head", "ray_address", "script", "server"}
"""Fixtures that start processes, or run a script."""


SHARE = os.environ.get("NFLAB_TEST_LONG", "0/1")
"""Of the tests marked as long, which run: K/N is every Nth, from the Kth on."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as slow what needs other processes; some tests are marked by themselves. Leaves out
    long tests that are not of SHARE."""
    first, each = map(int, SHARE.split("/"))
    long = sorted(item.nodeid for item in items if item.get_closest_marker("long"))
    left_out = set(long) - set(long[first::each])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
    for item in items:
        needs = SERVICES & {*getattr(item, "fixturenames", ())}
        if needs or item.path.relative_to(ROOT / "tests").parts[0] in WHOLE:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported is no garbage: it is not searched again, nor at the end, for seconds."""
    if "triton" not in sys.modules:  # it would call what it cannot free leaked
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def new_databases() -> Iterator[None]:
    """MLflow makes new databases quickly."""
    with pytest.MonkeyPatch.context() as patch:
        if "mlflow" in sys.modules:  # else no test uses it
            from tests.stores import fill_by_copy

            fill_by_copy(patch)
        yield


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of the session's Ray, for scripts that connect to a cluster."""
    context = ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> dict[str, str]:
    """Environment that puts a run's results into a temporary folder."""
    from tests.stores import new_store  # takes seconds

    return new_store(tmp_path)


Script = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    folder: Path,
    env: dict[str, str],
    name: str,
    *arguments: str,
    root: Path = ROOT,
    cold: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Runs `experiments/NAME ARGUMENTS` in `folder`, with `env` over the environment of the tests.

    Without a RAY_ADDRESS in `env` the script starts a Ray of its own.

    Args:
        cold: in a Python that imports all of it anew, as a user's; else see `tests/warm.py`. A
            script of another `root` always is.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path, whole = root / "experiments" / name, {**inherited, **env}
    if root == ROOT and not cold:
        return python_for(whole).run(path, arguments, folder, whole)
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=folder,
        env=whole,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture
def script(tmp_path: Path, store: dict[str, str]) -> Script:
    """`run_script` in a temporary folder, with results there too."""

    def run(
        name: str, *arguments: str, cold: bool = False, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        return run_script(tmp_path, {**store, **env}, name, *arguments, cold=cold)

    return run


@dataclass(frozen=True)
class Recorded:
    """A sweep called `small` and a grid in one store, which tests only read."""

    env: dict[str, str]
    """Of scripts on the session's Ray that use the store."""
    folder: Path
    """Holds `mlflow.db`, and `runs` with all files."""
    printed: dict[str, str]
    """Script -> what it printed."""

    @property
    def uri(self) -> str:
        return self.env["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="session")
def recorded(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A sweep of four trials of 3 epochs and a grid of six cells of one, run by their scripts."""
    from tests.stores import new_store

    folder = tmp_path_factory.mktemp("recorded")
    env = {**new_store(folder), "RAY_ADDRESS": ray_address}
    printed = {}
    for name, flags in (
        ("agc_sweep", "--trials 4 --epochs 3 --seed 5 --name small"),
        (
            "clipping_vs_batch_size",
            "--batch-sizes 64 128 --clippings 0.08 --seeds 1 --epochs 1 --warmup-epochs 0.5 "
            "--seed 5",
        ),
    ):
        done = run_script(folder, env, f"{name}.py", *flags.split())
        assert done.returncode == 0, done.stdout + done.stderr
        printed[name] = done.stdout
    return Recorded(env, folder, printed)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_marked(mark: str) -> None:
    """Ends every process that inherited the mark in its environment: the head's, no other Ray's."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NFLAB_TEST") == mark:
                process.kill()
                found.append(process)
        except psutil.Error:  # already gone
            continue
    psutil.wait_procs(found, timeout=10)


def edited_copy(folder: Path, edits: dict[str, tuple[str, str]]) -> Path:
    """A copy of the checkout's files with lines inserted.

    Args:
        edits: for each file, the beginning of a line, and what is inserted before that line.
    """
    listed = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        ["git", "-C", str(ROOT), *listed], capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, (before, inserted) in edits.items():
        text = (folder / name).read_text()
        assert text.count(f"\n{before}") == 1, (name, before)
        (folder / name).write_text(text.replace(f"\n{before}", f"\n{inserted}{before}"))
    return folder
