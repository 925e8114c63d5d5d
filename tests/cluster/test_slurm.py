"""`cluster/slurm.sbatch` on a small Slurm of two nodes (see slurm.py): a training that is preempted
in its midst."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nflab.storage.checkpoints import Checkpoints
from tests.cluster.conftest import key_pair
from tests.cluster.hosts import Network
from tests.cluster.slurm import Slurm, missing
from tests.conftest import ROOT, edited_copy, run_script
from tests.faults.stores import Stores

NODES = ("172.31.252.1", "172.31.252.2")

COMMAND = re.search(
    r"^(sbatch cluster/slurm\.sbatch) ", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE
)
"""What the page on clusters tells a person to type."""

TRAINING = "--num-workers 2 --epochs 6 --batch-size 64"

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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "with a script: sbatch cluster/slurm.sbatch experiments/agc_sweep.py"),
        ("x.py --trials 4 --name mine", "give sbatch --job-name in place of --name"),
        ("x.py --name=mine", "give sbatch --job-name in place of --name"),
        ("x.py --storage /disk", "and NFLAB_STORAGE in place of --storage"),
    ],
)
def test_what_would_not_go_on_is_refused_in_one_sentence(words: str, told: str) -> None:
    done = subprocess.run(
        ["bash", "cluster/slurm.sbatch", *words.split()],
        cwd=ROOT,
        env={**os.environ, "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "nflab"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr


@pytest.mark.long
def test_a_job_that_is_preempted_goes_on_and_ends_as_the_undisturbed_run(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Its nodes are taken by a more urgent job: it makes a checkpoint within the epoch, goes back
    into the queue, begins again under its name, and has the very result of a run on one machine
    that nothing has happened to."""
    whole = Stores(tmp_path / "whole", "train", "whole")
    whole.folder.mkdir()
    done = run_script(whole.folder, whole.env, "train.py", *TRAINING.split(), "--name", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    copy = edited_copy(tmp_path / "copy", {"platform/nflab/learning/loop.py": SLOW})
    (copy / ".venv").symlink_to(ROOT / ".venv")
    script = copy / "cluster" / "slurm.sbatch"
    text = script.read_text()
    script.write_text(text.replace("notice_seconds=60", "notice_seconds=20"))
    assert script.read_text() != text
    stores = Stores(tmp_path, "train", "nflab-1")
    job = submit(slurm, copy, stores, f"experiments/train.py {TRAINING}")
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
    while (state := slurm.state(job)["JobState"]) != "PENDING":
        seen.add(checkpoints.last_mark())
        assert state in ("RUNNING", "COMPLETING"), (state, log.read_text())
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    assert any(mark is not None and mark[1] > 0 for mark in seen), seen
    wait_for(slurm, job, "COMPLETED", log)

    told = slurm.state(job)
    assert (told["Restarts"], told["ExitCode"], told["NumNodes"]) == ("1", "0:0", "2")
    (disturbed,), (undisturbed,) = stores.runs(), whole.runs()
    assert disturbed.data.tags["mlflow.runName"] == f"nflab-{job}"
    assert stores.outcome() == ("FINISHED", "finished")
    assert stores.steps(disturbed) == whole.steps(undisturbed) == [1, 2, 3, 4, 5, 6]
    for metric in ("train_loss", "val_loss", "val_top1", "test_top1"):
        assert disturbed.data.metrics[metric] == undisturbed.data.metrics[metric], metric
    logs = (folder / "logs" / "rank-0.log").read_text()
    assert logs.count("this machine is about to be taken away") == 1
    assert "continues after" in logs
