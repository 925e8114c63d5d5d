"""Machines that never join, launched by Ray's own autoscaler in its loop, on an emulated AWS."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from ray.autoscaler.tags import (
    STATUS_UP_TO_DATE,
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from nflab.cluster import joining
from nflab.cluster.aws import Provider
from tests.clouds import emulated_aws, started
from tests.conftest import free_port

HERE = """
from pathlib import Path
from nflab.cluster import waiting
from nflab.cluster.aws import Provider
waiting.REFUSALS = Path(__file__).with_name("refusals.jsonl")
"""
"""What head and driver import: their refusals stand apart from those of other Rays here."""

WAIT = """
import here, ray
from nflab.cluster.waiting import told_of_waiting
from nflab.settings.errors import ConfigError
from nflab.terminal.interrupts import raise_on_interrupt

raise_on_interrupt()  # as scripts do: a shell that starts the tests in the background ignores it
ray.init(log_to_driver=False)
work = ray.remote(num_cpus=0, num_gpus=1)(lambda: "it runs")
try:
    with told_of_waiting(print):
        print(ray.get(work.remote()))
except ConfigError as error:
    print("error:", error)
"""


class Account:
    """An emulated account whose machines never answer."""

    def __init__(self) -> None:
        self.compute = boto3.client("ec2")
        image = self.compute.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        # No address beyond this machine may be tried over SSH.
        vpc = self.compute.create_vpc(CidrBlock="127.77.0.0/16")["Vpc"]["VpcId"]
        subnet = self.compute.create_subnet(VpcId=vpc, CidrBlock="127.77.0.0/20")["Subnet"]
        self.node = {
            "ImageId": image,
            "InstanceType": "g5.2xlarge",
            "SubnetIds": [subnet["SubnetId"]],
        }

    def head(self, cluster: str) -> str:
        """Launches a cluster's head."""
        tags = {
            TAG_RAY_CLUSTER_NAME: cluster,
            TAG_RAY_NODE_KIND: "head",
            TAG_RAY_USER_NODE_TYPE: "head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        tagged = [{"Key": key, "Value": value} for key, value in tags.items()]
        (machine,) = self.compute.run_instances(
            ImageId=self.node["ImageId"],
            SubnetId=self.node["SubnetIds"][0],
            MinCount=1,
            MaxCount=1,
            TagSpecifications=[{"ResourceType": "instance", "Tags": tagged}],
        )["Instances"]
        return str(machine["InstanceId"])

    def machines(self) -> dict[str, list[str]]:
        """Type in the launcher file -> the states of all machines of it that there ever were."""
        found: dict[str, list[str]] = {}
        for reservation in self.compute.describe_instances()["Reservations"]:
            for machine in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
                states = found.setdefault(tags[TAG_RAY_USER_NODE_TYPE], [])
                states.append(machine["State"]["Name"])
        return found


@pytest.mark.long
@pytest.mark.slow
def test_a_run_ends_when_three_of_its_type_came_and_never_joined(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text(HERE)
    with emulated_aws():
        account = Account()
        worker = {"resources": {"GPU": 1}, "max_workers": 4, "node_config": account.node}
        launcher: dict[str, Any] = {
            "cluster_name": "short",
            "max_workers": 4,
            "provider": {
                "type": "external",
                "module": "here.Provider",
                "region": "us-east-1",
                "cache_stopped_nodes": False,
            },
            "auth": {"ssh_user": "ubuntu"},
            "head_node_type": "head",
            "available_node_types": {
                "head": {"resources": {"CPU": 0}, "max_workers": 0, "node_config": account.node},
                "spot": worker,
            },
        }
        launcher = Provider(launcher["provider"], "short").prepare_for_head_node(launcher)
        env = {
            "PYTHONPATH": str(tmp_path),
            "RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S": "1",
        }
        with started(tmp_path, launcher, account.head("short"), free_port(), env) as driver:
            done = subprocess.run(
                [sys.executable, "-c", WAIT],
                env={**os.environ, **driver, "PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=480,
            )
        machines = account.machines()
    assert done.stdout, done.stderr
    last = done.stdout.splitlines()[-1]
    start = "error: the run waits for machines, and every type of them is left out: "
    assert last.startswith(start), done.stdout + done.stderr
    assert "spot (NeverJoined: " in last
    # Ray launches the next one while the last is going.
    assert joining.IN_A_ROW <= len(machines["spot"]) <= joining.IN_A_ROW + 2
    assert set(machines["spot"]) == {"terminated"}
    assert "it runs" not in done.stdout
