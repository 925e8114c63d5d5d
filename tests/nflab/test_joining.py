"""Machines that come and never join, on an emulated AWS."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    STATUS_UP_TO_DATE,
    STATUS_UPDATE_FAILED,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from nflab.cluster import aws, joining, waiting
from nflab.cluster.aws import Provider
from tests.clouds import emulated_aws


@pytest.fixture(scope="module")
def account() -> Iterator[Any]:
    """An emulated account, as a client of its machines."""
    with emulated_aws():
        yield boto3.client("ec2")


class Cluster:
    """Its head's autoscaler, as far as it launches workers, of one type or the one that follows."""

    def __init__(self, account: Any, name: str) -> None:
        images, subnets = account.describe_images(Owners=["amazon"]), account.describe_subnets()
        self._node = {
            "ImageId": images["Images"][0]["ImageId"],
            "InstanceType": "g5.2xlarge",
            "SubnetIds": [subnet["SubnetId"] for subnet in subnets["Subnets"]],
        }
        worker = {"resources": {"GPU": 1}, "max_workers": 9, "node_config": self._node}
        config: dict[str, Any] = {
            "head_node_type": "head",
            "provider": {"type": "external", "region": "us-east-1", "cache_stopped_nodes": False},
            "auth": {},
            "available_node_types": {
                "head": {"resources": {}, "node_config": self._node},
                "spot": {**worker, "priority": 1},
                "dear": worker,
            },
        }
        self._account = account
        provider = Provider(config["provider"], name).prepare_for_head_node(config)["provider"]
        self.provider = Provider(provider, name)

    def launch(self) -> Counter[str]:
        """Types of the machines that are there after one of the first was asked for."""
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: "spot"}
        with suppress(NodeLaunchException):
            self.provider.create_node(self._node, tags, 1)
        tagged = [self.provider.node_tags(machine) for machine in self.there()]
        return Counter(tags[TAG_RAY_USER_NODE_TYPE] for tags in tagged)

    def there(self) -> list[str]:
        return self.provider.non_terminated_nodes({})

    def end(self, status: str) -> None:
        """What is there has come so far, and goes."""
        machines = self.there()
        for machine in machines:
            self.provider.set_node_tags(machine, {TAG_RAY_NODE_STATUS: status})
        self.there()
        self._account.terminate_instances(InstanceIds=machines)
        assert self.there() == []


@pytest.fixture
def cluster(account: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(aws, "VISIBLE_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "REFUSALS", tmp_path / "refusals.jsonl")
    return Cluster(account, tmp_path.name)


@pytest.mark.slow
def test_after_three_that_never_joined_a_type_is_left_out_for_an_hour(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for _ in range(3):
        assert cluster.launch() == {"spot": 1}
        cluster.end(STATUS_UPDATE_FAILED)
    assert cluster.launch() == {"dear": 1}
    (refusal,) = waiting.refusals(0.0)
    assert str(refusal).startswith("there is no spot (NeverJoined: 3 machines in a row went away ")
    assert refusal.following == "dear"
    cluster.end(STATUS_UPDATE_FAILED)
    for _ in range(2):
        cluster.launch()
        cluster.end("setting-up")
    assert cluster.launch() == {}
    last = {refusal.node_type: refusal.following for refusal in waiting.refusals(0.0)}
    assert last == {"spot": "dear", "dear": None}
    monkeypatch.setattr(time, "time", lambda: now + joining.LEFT_OUT_SECONDS + 600)
    assert cluster.launch() == {"spot": 1}
    cluster.end(STATUS_UPDATE_FAILED)
    assert cluster.launch() == {"dear": 1}  # one is enough now


@pytest.mark.slow
def test_a_machine_that_joins_ends_the_row(cluster: Cluster) -> None:
    for status in 2 * [STATUS_UPDATE_FAILED] + [STATUS_UP_TO_DATE] + 2 * [STATUS_UPDATE_FAILED]:
        assert cluster.launch() == {"spot": 1}
        cluster.end(status)
    assert cluster.launch() == {"spot": 1}


def test_a_machine_that_the_lists_do_not_show_yet_is_not_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = joining.Joining()
    machines.launched(["a", "b", "c"], "spot")
    machines.found({})
    assert machines.left_out("spot") is None
    now = time.time() + joining.VISIBLE_SECONDS
    monkeypatch.setattr(time, "time", lambda: now)
    machines.found({})
    assert machines.left_out("spot") is not None


def test_a_type_of_which_a_machine_joins_is_left_out_no_longer() -> None:
    followed = joining.Joining()
    followed.launched("abcd", "spot")
    followed.found(dict.fromkeys("abcd"))
    followed.found({"d": None})
    assert followed.left_out("spot") is not None
    followed.found({"d": STATUS_UP_TO_DATE})
    assert followed.left_out("spot") is None
