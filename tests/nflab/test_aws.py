"""Which type of machine follows which, and what is launched when there are few."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from nflab.cluster import aws, waiting
from nflab.cluster.aws import Provider, order
from tests.clouds import emulated_aws
from tests.conftest import ROOT


def test_types_with_the_same_resources_follow_each_other_by_priority() -> None:
    gpu = {"CPU": 8, "GPU": 1}
    config = {
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}},
            "dear": {"resources": gpu},
            "spot": {"resources": gpu, "priority": 2},
            "large": {"resources": {"CPU": 96, "GPU": 8}, "priority": 9},
            "other": {"resources": gpu, "priority": 1},
        },
    }
    assert order(config) == {"spot": "other", "other": "dear"}


def test_the_launcher_file_goes_from_spot_to_on_demand() -> None:
    config = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    assert config["provider"]["module"] == "nflab.cluster.aws.Provider"
    assert order(config) == {"gpu-spot": "gpu-on-demand"}


@pytest.fixture(scope="module")
def account() -> Iterator[Any]:
    """An emulated account, as a client of its machines."""
    with emulated_aws():
        yield boto3.client("ec2")


@pytest.fixture(autouse=True)
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is waited for, and refusals are written down here."""
    monkeypatch.setattr(aws, "VISIBLE_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "REFUSALS", tmp_path / "refusals.jsonl")


def cluster(account: Any, most: int) -> dict[str, Any]:
    """A launcher file as Ray resolves it, with at most so many machines of the second type."""
    subnets = account.describe_subnets()["Subnets"]
    node = {
        "ImageId": account.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
        "InstanceType": "g5.2xlarge",
        "SubnetIds": [subnet["SubnetId"] for subnet in subnets],
    }
    resources = {"resources": {"GPU": 1}}
    return {
        "head_node_type": "head",
        "provider": {"type": "external", "region": "us-east-1", "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": node},
            "spot": {**resources, "priority": 1, "max_workers": 9, "node_config": node},
            "dear": {
                **resources,
                "max_workers": most,
                "node_config": {**node, "InstanceType": "g5.4xlarge"},
            },
        },
    }


def supply(patch: pytest.MonkeyPatch, provider: Provider, there: Counter[str]) -> None:
    """Lets AWS have so many machines of each instance type, and launch as many as it has."""
    launch: Callable[..., list[Any]] = provider.ec2_fail_fast.create_instances

    def create_instances(**asked: Any) -> list[Any]:
        kind = asked["InstanceType"]
        if there[kind] < asked["MinCount"]:
            told = {"Code": "InsufficientInstanceCapacity", "Message": f"no {kind}"}
            raise ClientError({"Error": told}, "RunInstances")
        made = launch(**{**asked, "MaxCount": min(asked["MaxCount"], there[kind])})
        there[kind] -= len(made)
        return made

    patch.setattr(provider.ec2_fail_fast, "create_instances", create_instances)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "there", "launched"),
    [
        (9, {"g5.2xlarge": 4, "g5.4xlarge": 4}, {"spot": 4}),
        (9, {"g5.2xlarge": 1, "g5.4xlarge": 4}, {"spot": 1, "dear": 3}),
        (2, {"g5.2xlarge": 1, "g5.4xlarge": 4}, {"spot": 1, "dear": 2}),
        (0, {"g5.2xlarge": 1, "g5.4xlarge": 4}, {"spot": 1}),
        (9, {"g5.2xlarge": 0, "g5.4xlarge": 1}, {"dear": 1}),
    ],
)
def test_what_aws_has_not_is_launched_as_the_following_type(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    account: Any,
    most: int,
    there: dict[str, int],
    launched: dict[str, int],
) -> None:
    config = cluster(account, most)
    name = tmp_path.name  # each has a cluster of its own
    config = Provider(config["provider"], name).prepare_for_head_node(config)
    provider = Provider(config["provider"], name)
    supply(monkeypatch, provider, Counter(there))
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: "spot"}
    node = config["available_node_types"]["spot"]["node_config"]
    if launched == {"spot": 4}:
        assert len(provider.create_node(node, tags, 4)) == 4
    else:
        with pytest.raises(NodeLaunchException):
            provider.create_node(node, tags, 4)
    machines = provider.non_terminated_nodes({})
    kinds = [provider.node_tags(machine)[TAG_RAY_USER_NODE_TYPE] for machine in machines]
    assert Counter(kinds) == launched
    told = {refusal.node_type: refusal.following for refusal in waiting.refusals(0.0)}
    assert told.get("spot") == ("dear" if "dear" in launched else None)
    assert ("dear" in told) == (sum(launched.values()) < 4 and most == 9)


def test_workers_are_launched_in_zones_that_sell_their_type(account: Any) -> None:
    config = cluster(account, 1)
    config["available_node_types"]["spot"]["node_config"]["InstanceType"] = "g5.2xlarge"
    provider = Provider(config["provider"], "c")
    prepared = provider.prepare_for_head_node(config)["available_node_types"]
    offers = account.describe_instance_type_offerings(
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": ["g5.2xlarge"]}],
    )
    zones = {offer["Location"] for offer in offers["InstanceTypeOfferings"]}
    kept = prepared["spot"]["node_config"]["SubnetIds"]
    subnets = account.describe_subnets(SubnetIds=kept)["Subnets"]
    assert {subnet["AvailabilityZone"] for subnet in subnets} == zones
    everywhere = config["available_node_types"]["head"]["node_config"]["SubnetIds"]
    assert prepared["head"]["node_config"]["SubnetIds"] == everywhere
    assert len(kept) < len(everywhere)
