"""`cluster/onprem.yaml` on two hosts: a run shared by both, whose network fails in mid-run."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import key_pair
from tests.cluster.ec2 import Cloud, installed
from tests.cluster.hosts import USER, Host, Network
from tests.cluster.laptop import Laptop
from tests.cluster.test_gpu_yaml import JOBS, MAKE
from tests.conftest import ROOT

HEAD, WORKER = "172.31.254.1", "172.31.254.2"

BUCKET = "onprem-results"

FILE = f"CLUSTER=/home/{USER}/onprem.yaml"

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
    laptop.run("ray get-auth-token --generate")
    laptop.run(f"ray up --yes /home/{USER}/onprem.yaml")

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
