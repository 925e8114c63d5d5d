"""What `make down` finds that is still there, on an emulated AWS."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from tests.clouds import emulated_aws
from tests.conftest import ROOT

REMAINS = """
import json, down, launcher
print(json.dumps(down.remains(launcher.read("gpu.yaml"))))
"""


@pytest.fixture
def account() -> Iterator[Any]:
    """An account without anything, as a client of its machines."""
    with emulated_aws():
        yield boto3.client("ec2")


def remains() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", REMAINS],
        cwd=ROOT / "cluster",
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return set(json.loads(done.stdout))


def tagged(kind: str, cluster: str) -> dict[str, Any]:
    tags = [{"Key": "ray-cluster-name", "Value": cluster}]
    return {"TagSpecifications": [{"ResourceType": kind, "Tags": tags}]}


def make(account: Any, cluster: str) -> dict[str, str]:
    """One thing of each kind that costs money, with what it is called."""
    image = account.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    machine = {"ImageId": image, "InstanceType": "t3.micro"}
    (instance,) = account.run_instances(
        MinCount=1, MaxCount=1, **machine, **tagged("instance", cluster)
    )["Instances"]
    volume = account.create_volume(
        Size=8, AvailabilityZone="us-east-1a", **tagged("volume", cluster)
    )
    (request,) = account.request_spot_instances(
        LaunchSpecification=machine, **tagged("spot-instances-request", cluster)
    )["SpotInstanceRequests"]
    return {
        "instance": instance["InstanceId"],
        "volume": volume["VolumeId"],
        "spot request": request["SpotInstanceRequestId"],
    }


def test_all_that_bears_the_clusters_tag_is_named_until_it_is_gone(account: Any) -> None:
    make(account, "another")
    assert remains() == set()
    made = make(account, "nflab-gpu")
    assert remains() == {f"{kind} {name}" for kind, name in made.items()}
    account.terminate_instances(InstanceIds=[made["instance"]])
    account.delete_volume(VolumeId=made["volume"])
    assert remains() == {f"spot request {made['spot request']}"}
    account.cancel_spot_instance_requests(SpotInstanceRequestIds=[made["spot request"]])
    assert remains() == set()
