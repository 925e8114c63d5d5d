"""What machines of several GPUs need of the network: EFA, and one card for NCCL."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.clouds import emulated_aws
from tests.conftest import ROOT

MAKE_GROUP = """
import sys, access, launcher
cluster = launcher.read("gpu.yaml")
for _ in range(2):  # the second finds what it wants
    access.make_group(cluster, "198.51.100.0/24", sys.argv[1])
"""

CHECK_CARDS = """
import check, launcher
cluster = launcher.read("gpu.yaml")
machine = cluster.node_types["gpu-on-demand"]["node_config"]
card = {"DeviceIndex": 0, "InterfaceType": "efa", "SubnetId": "subnet-1", "Groups": ["sg-1"]}
machine["NetworkInterfaces"] = [card]
check.check_cards(cluster)
del machine["NetworkInterfaces"][0]["SubnetId"]
try:
    check.check_cards(cluster)
except check.ConfigError as error:
    print(error)
"""


@pytest.fixture
def account() -> Iterator[Any]:
    """A new account, as a client of its machines."""
    with emulated_aws():
        yield boto3.client("ec2")


def run(program: str, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT / "cluster",
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    ).stdout


@pytest.mark.slow
def test_the_security_group_lets_all_among_its_machines_both_ways(account: Any) -> None:
    vpc = account.describe_vpcs()["Vpcs"][0]["VpcId"]
    run(MAKE_GROUP, vpc)
    (group,) = account.describe_security_groups(GroupNames=["nflab-gpu"])["SecurityGroups"]
    for way in ("IpPermissions", "IpPermissionsEgress"):
        among = [rule for rule in group[way] if rule["UserIdGroupPairs"]]
        assert [rule["IpProtocol"] for rule in among] == ["-1"]
        assert [p["GroupId"] for p in among[0]["UserIdGroupPairs"]] == [group["GroupId"]]


@pytest.mark.slow
def test_cards_without_a_subnet_are_refused_before_ray_does() -> None:
    (said,) = run(CHECK_CARDS).splitlines()
    assert said.startswith(
        "the node type 'gpu-on-demand' in gpu.yaml has NetworkInterfaces without"
    )


def test_gloo_and_nccl_take_the_card_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / ".nflab").write_text("export NFLAB_RESULTS=/mnt NFLAB_PYTHON=3.12\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ip").write_text("#!/bin/sh\necho default via 10.0.0.1 dev ens5 proto dhcp\n")
    (programs / "ip").chmod(0o755)
    show = f'. {ROOT}/cluster/env.sh; bash -c "echo \\$GLOO_SOCKET_IFNAME \\$NCCL_SOCKET_IFNAME"'
    env = {"HOME": str(tmp_path), "PATH": f"{programs}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", show], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "ens5 ens5\n"
