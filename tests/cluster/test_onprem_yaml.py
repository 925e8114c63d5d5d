"""`cluster/onprem.yaml` on two hosts: a run shared by both, whose network fails in mid-run, jobs
that `make up` does not end, and a new token."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import key_pair
from tests.cluster.ec2 import Cloud, installed
from tests.cluster.hosts import USER, Host, Network
from tests.cluster.laptop import Laptop
from tests.cluster.test_gpu_yaml import MAKE, ON_HEAD
from tests.conftest import ROOT

HEAD, WORKER = "172.31.254.1", "172.31.254.2"

BUCKET = "onprem-results"

FILE = f"CLUSTER=/home/{USER}/onprem.yaml"

UP = f"{MAKE} up {FILE} ARGS=--yes"

TOKEN = f"/home/{USER}/.ray/nflab/nflab-onprem.token"
"""Of the cluster, on the laptop."""

JOBS = ON_HEAD | {"RAY_AUTH_TOKEN_PATH": TOKEN}

TRAINING = "python experiments/train.py --num-workers 2 --epochs 20"

CUT_SECONDS = int(os.environ.get("NFLAB_TEST_CUT_SECONDS", "8"))
"""How long the worker's cable is out: a switch that restarts. After 150 Ray has given the machine
up, and its launcher brings it back."""

METRICS = """
import json
from mlflow import MlflowClient
client = MlflowClient("http://127.0.0.1:5000")
experiment = client.get_experiment_by_name("train")
runs = client.search_runs([experiment.experiment_id]) if experiment else []
print(json.dumps({r.info.run_name: r.data.metrics | {"ended": r.info.status} for r in runs}))
"""


def overrides(launcher: dict[str, Any]) -> None:
    """What a person changes, and that each host has one of this machine's cores."""
    launcher["provider"].update(head_ip=HEAD, worker_ips=[WORKER])
    launcher["auth"]["ssh_private_key"] = f"/home/{USER}/key"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    results = f"echo 'export NFLAB_RESULTS=s3://{BUCKET} NFLAB_PYTHON={here}' > ~/.nflab"
    launcher["setup_commands"][0] = results
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        launcher[commands][-1] += " --num-cpus=1 --num-gpus=0"


@pytest.fixture(scope="module")
def worker(
    network: Network, cloud: Cloud, laptop: Laptop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """The worker's host, in a cluster that is up and whose ports are on the laptop."""
    _, public = key_pair(laptop.home / "key")
    for address in (HEAD, WORKER):
        network.add(address, public, cloud.env, installed(ROOT))
    launcher = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text())
    overrides(launcher)
    (laptop.home / "onprem.yaml").write_text(yaml.safe_dump(launcher, sort_keys=False))
    cloud.client("s3").create_bucket(Bucket=BUCKET)
    said = laptop.run(UP)
    assert len(token_of(laptop)) == 64 and token_of(laptop) not in said

    def ready() -> bool:
        return laptop.answers("http://127.0.0.1:5000/health")

    with laptop.running(f"{MAKE} tunnel {FILE}", laptop.home / "onprem.log", ready):
        yield network.hosts[WORKER]
    for address in (HEAD, WORKER):
        network.remove(address)


@pytest.mark.long
def test_a_run_whose_network_is_cut_ends_as_the_undisturbed_one(
    laptop: Laptop, worker: Host
) -> None:
    wait_for_nodes(laptop)
    laptop.run(f"ray job submit -- {TRAINING} --name undisturbed", **JOBS)

    said: list[str] = []
    command = f"ray job submit -- {TRAINING} --name cut"
    job = threading.Thread(target=lambda: said.append(laptop.run(command, **JOBS)))
    job.start()
    deadline = time.monotonic() + 300
    while laptop.ask(METRICS).get("cut", {}).get("epoch", 0) < 2:
        assert job.is_alive() and time.monotonic() < deadline, said
        time.sleep(0.5)
    worker.cut()
    assert laptop.ask(METRICS)["cut"]["epoch"] < 20
    time.sleep(CUT_SECONDS)
    assert job.is_alive(), "the run ended before its network came back"
    worker.restore()
    job.join()

    runs = laptop.ask(METRICS)
    assert runs["cut"]["ended"] == "FINISHED"
    for metric in ("epoch", "train_loss", "val_loss", "val_top1", "test_top1"):
        assert runs["cut"][metric] == runs["undisturbed"][metric], metric


def wait_for_nodes(laptop: Laptop) -> None:
    """Both hosts are in the cluster."""
    code = """
import json
from ray.util.state import list_nodes
print(json.dumps(sorted(n.node_ip for n in list_nodes() if n.state == "ALIVE")))
"""
    deadline = time.monotonic() + 300
    while laptop.ask(code, **JOBS) != [HEAD, WORKER]:
        assert time.monotonic() < deadline
        time.sleep(2)


def token_of(laptop: Laptop) -> str:
    """The cluster's, as the laptop has it."""
    return (laptop.home / Path(TOKEN).relative_to(f"/home/{USER}")).read_text()


def edit(laptop: Laptop, **changes: Any) -> None:
    """Changes the launcher file as a person would; None takes something out."""
    file = laptop.home / "onprem.yaml"
    launcher = yaml.safe_load(file.read_text()) | changes
    file.write_text(yaml.safe_dump(launcher, sort_keys=False))


@pytest.fixture(scope="module")
def head(network: Network, worker: Host) -> Host:
    """The head's host, in a cluster that is up."""
    return network.hosts[HEAD]


@pytest.fixture
def job(laptop: Laptop, head: Host) -> Iterator[str]:
    """The id of a job that runs for as long as a test."""
    name = f"raysubmit_of_test_{time.time_ns()}"
    laptop.run(f"ray job submit --no-wait --submission-id {name} -- sleep 3000", **JOBS)
    await_status(laptop, name, "RUNNING")
    yield name
    laptop.attempt(f"ray job stop {name}", **JOBS)


def await_status(laptop: Laptop, job: str, status: str) -> None:
    deadline = time.monotonic() + 120
    while status not in (said := laptop.attempt(f"ray job status {job}", **JOBS)[1]):
        assert time.monotonic() < deadline, said
        time.sleep(1)


def test_the_token_is_the_clusters_own_and_its_owners_alone_read_it(
    laptop: Laptop, head: Host
) -> None:
    brought = head.home / ".ray" / "auth_token"
    assert brought.read_text() == token_of(laptop)
    for path in (brought, laptop.home / ".ray" / "nflab" / "nflab-onprem.token"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not (laptop.home / ".ray" / "auth_token").exists()


@pytest.mark.long
def test_make_up_changes_what_it_can_and_ends_no_job(
    laptop: Laptop, head: Host, worker: Host, job: str
) -> None:
    wait_for_nodes(laptop)
    ours = head.processes("gcs_server"), worker.processes("raylet/raylet")
    launcher = yaml.safe_load((laptop.home / "onprem.yaml").read_text())
    commands = launcher["setup_commands"]
    edit(laptop, setup_commands=[*commands, "touch ~/changed"])
    said = laptop.run(UP)
    assert f"1 job runs on nflab-onprem ({job}: sleep 3000): Ray is not restarted" in said
    assert (head.home / "changed").exists()
    deadline = time.monotonic() + 120
    while not (worker.home / "changed").exists():
        assert time.monotonic() < deadline
        time.sleep(1)

    # Ray keeps its notes of the cluster where laptops empty what is left when they start anew.
    laptop.run("rm -r $TMPDIR/ray/cluster-nflab-onprem.*")
    assert f"1 job runs on nflab-onprem ({job}: sleep 3000)" in laptop.run(UP)

    laptop.run("cp -p ~/key ~/other-key && echo >> ~/other-key")
    edit(laptop, auth=launcher["auth"] | {"ssh_private_key": f"/home/{USER}/other-key"})
    code, said = laptop.attempt(UP)
    assert code != 0 and "is not that of the head that runs" in said, said
    edit(laptop, auth=launcher["auth"])

    installed = head.home / "nflab" / ".venv" / "installed"
    before = installed.read_text()
    installed.write_text(f"{'0' * 64}  -\n")
    code, said = laptop.attempt(UP)
    installed.write_text(before)
    assert code != 0 and "would change the packages that they run with" in said, said

    await_status(laptop, job, "RUNNING")
    assert (head.processes("gcs_server"), worker.processes("raylet/raylet")) == ours


@pytest.mark.long
def test_make_up_brings_the_token_of_a_cluster_that_runs_and_gives_it_no_other(
    laptop: Laptop, head: Host, job: str
) -> None:
    """A cluster of before goes on with the token that it has."""
    here, token = laptop.home / ".ray" / "nflab" / "nflab-onprem.token", token_of(laptop)
    here.unlink()
    code, said = laptop.attempt(f"{MAKE} submit {FILE} ARGS=true")
    assert code != 0 and "make up makes it, or brings it from the cluster" in said
    assert f"is now in {TOKEN}" in laptop.run(UP)
    assert token_of(laptop) == token and here.stat().st_mode & 0o777 == 0o600
    laptop.run(f"{MAKE} submit {FILE} ARGS=true")

    here.write_text("0" * 64)
    code, said = laptop.attempt(UP)
    assert code != 0 and f"{TOKEN} is not the token of nflab-onprem" in said
    here.write_text(token)
    assert (head.home / ".ray" / "auth_token").read_text() == token
    await_status(laptop, job, "RUNNING")


@pytest.mark.long
def test_a_rotated_token_is_refused_and_the_new_one_holds_on_every_machine(
    laptop: Laptop, head: Host, worker: Host, job: str
) -> None:
    old, rotate = token_of(laptop), f"{MAKE} rotate-token {FILE}"
    for flags in ("", "ARGS=--yes"):
        code, said = laptop.attempt(f"{rotate} {flags}")
        assert code != 0 and f"1 job runs on nflab-onprem ({job}: sleep 3000)" in said
        assert "make rotate-token ARGS=--end-jobs" in said
    await_status(laptop, job, "RUNNING")

    said = laptop.run(f"{rotate} ARGS=--end-jobs")
    new = token_of(laptop)
    assert new != old and new not in said and old not in said
    wait_for_nodes(laptop)
    for host in (head, worker):
        assert (host.home / ".ray" / "auth_token").read_text() == new
    assert answer(laptop, new) == "200"
    assert answer(laptop, old) in ("401", "403")
    laptop.run(f"{MAKE} submit {FILE} ARGS=true")


def answer(laptop: Laptop, token: str) -> str:
    """The code with which Ray's dashboard answers a token."""
    return laptop.run(
        "curl --silent --output /dev/null --write-out '%{http_code}' "
        f"--header 'Authorization: Bearer {token}' http://127.0.0.1:8265/api/jobs/"
    )
