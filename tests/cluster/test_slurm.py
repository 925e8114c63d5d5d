"""`cluster/slurm.sbatch` on a small Slurm of two nodes (see slurm.py): a training that is preempted
in its midst."""

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nflab.storage.checkpoints import Checkpoints
from tests.cluster.conftest import key_pair
from tests.cluster.hosts import Network
from tests.cluster.slurm import Slurm, missing
from tests.conftest import ROOT, edited_copy
from tests.faults.runs import check_exact
from tests.faults.stores import Stores

NODES = ("172.31.252.1", "172.31.252.2")

COMMAND = re.search(
    r"^(sbatch cluster/slurm\.sbatch) ", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE
)
"""What the page on clusters tells a person to type."""

TRAINING = "experiments/train.py --num-workers 2 --epochs 3 --batch-size 64 --augmentation-level 0"

SLOW = ("            optimizer.zero_grad()", "            __import__('time').sleep(0.5)\n")
"""On no machine is a run through before something has happened to it."""


@pytest.fixture(scope="module")
def slurm(network: Network) -> Iterator[Slurm]:
    """Two nodes with one CPU each, whose people have one home."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    _, public = key_pair(network.folder / "slurm-key")
    head, other = (network.add(address, public) for address in NODES)
    (head.home / ".ray").mkdir()
    (other.home / ".ray").symlink_to(head.home / ".ray")
    with Slurm(network.folder / "slurm", [head, other]) as running:
        yield running
    for address in NODES:
        network.remove(address)


def submit(slurm: Slurm, root: Path, stores: Stores, words: str, **env: str) -> str:
    """Submits from a checkout, and returns the job's number."""
    assert COMMAND
    command = COMMAND[1].replace(
        "sbatch", f"sbatch --parsable --gpus-per-node=0 --output={stores.folder}/output.log", 1
    )
    # Each host has one of this machine's cores.
    env |= stores.env | {"OMP_NUM_THREADS": "1"}
    return slurm.shell.run(f"cd {shlex.quote(str(root))} && {command} {words}", **env).strip()


def wait_for(slurm: Slurm, job: str, state: str, log: Path) -> None:
    deadline = time.monotonic() + 400
    while (now := slurm.state(job)["JobState"]) != state:
        said = log.read_text() if log.exists() else ""
        assert now not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), (now, said)
        assert time.monotonic() < deadline, (now, said)
        time.sleep(1)


def test_a_job_that_is_preempted_goes_on_and_ends_as_the_undisturbed_run(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Its nodes are taken by a more urgent job: it makes a checkpoint within the epoch, goes back
    into the queue, begins again under its name, and has the very result of a run that nothing has
    happened to."""
    copy = edited_copy(tmp_path / "copy", {"platform/nflab/learning/loop.py": SLOW})
    (copy / ".venv").symlink_to(ROOT / ".venv")
    script = copy / "cluster" / "slurm.sbatch"
    text = script.read_text()
    script.write_text(text.replace("notice_seconds=60", "notice_seconds=20"))
    assert script.read_text() != text
    # What takes the nodes for other jobs is a site's own: GraceTime=60 here.
    stores = Stores(tmp_path, "train", "nflab-1")
    job = submit(slurm, copy, stores, TRAINING)
    folder, log = tmp_path / "runs" / f"nflab-{job}", tmp_path / "output.log"
    checkpoints = Checkpoints.of_run(str(folder))
    wait_for(slurm, job, "RUNNING", log)
    deadline = time.monotonic() + 300
    while not folder.exists() or checkpoints.last_mark() is None:
        assert slurm.state(job)["JobState"] == "RUNNING", log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)

    urgent = "sbatch --parsable --partition=urgent --exclusive --nodes=2 --output=/dev/null"
    slurm.shell.run(f"{urgent} --wrap true")
    seen = set()
    while slurm.state(job)["JobState"] != "PENDING":
        seen.add(checkpoints.last_mark())
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    assert any(mark is not None and mark[1] > 0 for mark in seen), seen
    wait_for(slurm, job, "COMPLETED", log)

    told = slurm.state(job)
    assert (told["Restarts"], told["ExitCode"], told["NumNodes"]) == ("1", "0:0", "2")
    run = stores.parent()
    assert run.data.tags["mlflow.runName"] == f"nflab-{job}"
    assert run.data.tags["world_size"] == "2"
    assert stores.outcome() == ("FINISHED", "finished")
    assert stores.steps(run) == [1, 2, 3]
    check_exact(stores, run)
    logs = (folder / "logs" / "rank-0.log").read_text()
    assert logs.count("this machine is about to be taken away") == 1
    assert "continues after" in logs
