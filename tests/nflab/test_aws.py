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
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (
    ClusterResourceConstraint,
    GangResourceRequest,
    NodeState,
)
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

from nflab.cluster import aws, waiting
from nflab.cluster.aws import Provider, order
from nflab.cluster.placement import ON_HEAD, TYPE_LABEL, launchable, place
from nflab.settings.config import ScaleConfig
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


def with_more_gpus(text: str) -> dict[str, Any]:
    """gpu.yaml with its examples of machines of several GPUs taken in."""
    begin = text.index("  # four-gpus:")
    end = text.index("\n\n", begin)
    return dict(yaml.safe_load(text[:begin] + text[begin:end].replace("  # ", "  ") + text[end:]))


@pytest.fixture(scope="module")
def several_gpus(account: Any) -> AutoscalingConfig:
    """What the head's autoscaler is given of it."""
    config = with_more_gpus((ROOT / "cluster" / "gpu.yaml").read_text())
    config["max_workers"] = 8
    subnets = [subnet["SubnetId"] for subnet in account.describe_subnets()["Subnets"]]
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["SubnetIds"] = subnets
    prepared = Provider(config["provider"], "several").prepare_for_head_node(config)
    return AutoscalingConfig(prepared, skip_content_hash=True)


def launches(
    config: AutoscalingConfig, workers: int, of_trial: dict[str, float], how: str = "pack"
) -> dict[str, int]:
    """The machines that Ray's autoscaler launches for a run: first for the process that waits, as
    `of_trial` asks, then for its workers as Ray Train asks, once by itself and once as a group."""
    fleet = launchable(config._configs)
    placement = place(ScaleConfig(num_workers=workers, placement=how), fleet)
    selected: list[Any] | None = None
    if placement.labels:
        operator = LabelSelectorOperator.LABEL_OPERATOR_IN
        selected = [[(TYPE_LABEL, operator, list(placement.labels))]]
    together = [(ResourceRequestUtil.PlacementConstraintType.AFFINITY, "group", "it")]
    bundles = [
        ResourceRequestUtil.make(
            placement.per_worker, together if how == "strict_pack" else None, selected
        )
        for _ in range(workers)
    ]
    apart = [ResourceRequestUtil.make(placement.per_worker, None, selected)] * workers
    here = {"node:__internal_head__": 1.0}
    there = [
        AutoscalerInstance(
            im_instance=Instance(
                instance_id="head",
                instance_type="head",
                status=Instance.RAY_RUNNING,
                node_kind=NodeKind.HEAD,
            ),
            ray_node=NodeState(node_id=b"h", total_resources=here, available_resources=here),
        )
    ]
    waits = GangResourceRequest(requests=[ResourceRequestUtil.make(of_trial)])
    launched: Counter[str] = Counter()
    for group, alone in ((waits, []), (GangResourceRequest(requests=bundles), apart)):
        by_count = ResourceRequestUtil.group_by_count(alone)
        asked = [ClusterResourceConstraint(resource_requests=by_count)] if alone else []
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=[group],
            cluster_resource_constraints=asked,
            current_instances=there,
        )
        reply = ResourceDemandScheduler().schedule(request)
        assert not reply.infeasible_gang_resource_requests
        for launch in reply.to_launch:
            launched[launch.instance_type] += launch.count
            there += [
                AutoscalerInstance(
                    im_instance=Instance(
                        instance_id=f"{launch.instance_type}-{number}",
                        instance_type=launch.instance_type,
                        status=Instance.REQUESTED,
                    )
                )
                for number in range(launch.count)
            ]
    return launched


@pytest.mark.parametrize(
    ("workers", "how", "launched"),
    [
        (1, "pack", {"gpu-spot": 1}),
        (2, "pack", {"four-gpus": 1}),
        (4, "pack", {"four-gpus": 1}),
        (4, "strict_pack", {"four-gpus": 1}),
        (5, "pack", {"eight-gpus": 1}),
        (8, "strict_pack", {"eight-gpus": 1}),
        (3, "spread", {"gpu-spot": 3}),
        (12, "pack", {"four-gpus": 2, "gpu-spot": 4}),
    ],
)
def test_workers_of_one_run_come_up_on_one_machine_where_there_is_such_a_type(
    several_gpus: AutoscalingConfig, workers: int, how: str, launched: dict[str, int]
) -> None:
    assert launches(several_gpus, workers, ON_HEAD, how) == launched


def test_a_process_that_waits_anywhere_would_launch_a_machine_of_its_own(
    several_gpus: AutoscalingConfig,
) -> None:
    assert launches(several_gpus, 4, {"CPU": 0.01}) == {"gpu-spot": 1, "four-gpus": 1}
