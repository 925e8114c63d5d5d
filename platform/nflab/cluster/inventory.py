"""What of a cluster on AWS costs money, found by the tag that all of it bears."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nflab.cluster.prices import disk_price, machine_price

PROVIDER = "nflab.cluster.aws.Provider"
"""Of launcher files: Ray's own of AWS, which goes on to the next type."""

PAID = ("pending", "running")
"""States of a machine that costs money."""


class Cluster(NamedTuple):
    """A cluster on AWS, as its machines and disks are found."""

    region: str
    name: str


class Item(NamedTuple):
    """A machine or a disk that is there."""

    id: str
    since: float
    """When it was launched or made, in seconds since 1970."""
    kind: str
    """In words."""
    usd_per_hour: float | None
    """None if the tables of prices do not tell."""


def cluster_of(launcher: Mapping[str, Any]) -> Cluster | None:
    """The cluster that a launcher file makes, if it is on AWS."""
    provider = launcher["provider"]
    if provider.get("type") != "aws" and provider.get("module") != PROVIDER:
        return None
    return Cluster(str(provider["region"]), str(launcher["cluster_name"]))


def client_of(cluster: Cluster) -> Any:
    """boto3's client of its machines, which waits for seconds where others wait for minutes."""
    import boto3  # only where there is AWS
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": 2}
    short = Config(connect_timeout=5, read_timeout=20, retries=retries)
    return boto3.client("ec2", region_name=cluster.region, config=short)


def inventory(cluster: Cluster, client: Any) -> list[Item]:
    """The machines of a cluster that are being started or run, and its disks.

    Args:
        client: see `client_of`.

    Raises:
        BotoCoreError, ClientError: AWS does not tell.
    """
    return [*_machines(cluster, client), *_disks(cluster, client)]


def _machines(cluster: Cluster, client: Any) -> Iterator[Item]:
    state = {"Name": "instance-state-name", "Values": list(PAID)}
    pages = client.get_paginator("describe_instances")
    for page in pages.paginate(Filters=[_tag(cluster), state]):
        for machine in (m for made in page["Reservations"] for m in made["Instances"]):
            kind, spot = machine["InstanceType"], machine.get("InstanceLifecycle") == "spot"
            price = machine_price(cluster.region, kind, spot)
            told = f"{kind} as a spot machine" if spot else kind
            yield Item(machine["InstanceId"], machine["LaunchTime"].timestamp(), told, price)


def _disks(cluster: Cluster, client: Any) -> Iterator[Item]:
    for page in client.get_paginator("describe_volumes").paginate(Filters=[_tag(cluster)]):
        for disk in page["Volumes"]:
            kind, since = disk["VolumeType"], disk["CreateTime"].timestamp()
            price = disk_price(cluster.region, kind, disk["Size"])
            yield Item(disk["VolumeId"], since, f"{kind} disks", price)


def _tag(cluster: Cluster) -> dict[str, Any]:
    return {"Name": "tag:ray-cluster-name", "Values": [cluster.name]}
