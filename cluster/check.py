"""What can go wrong with a cluster, found before anything costs money.

On AWS it then makes what `ray up` must find: the security group and the roles (see access.py).

Example:
  python cluster/check.py cluster/gpu.yaml
"""

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import access
import boto3
import down
import launcher
import ray
import tokens
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from launcher import TOKEN, Launcher, told_in_a_sentence

from nflab.settings.errors import ConfigError

QUOTAS = {
    ("g", "spot"): "L-3819A6DF",
    ("g", "on-demand"): "L-DB2E81BA",
    ("p", "spot"): "L-7212CCBC",
    ("p", "on-demand"): "L-417A185B",
    ("p5", "spot"): "L-C4BD4855",  # its own; on demand it is one of P's
}
"""AWS's codes of the quotas on vCPUs, by family of instances and market."""

MARK = ".nflab-cluster"
"""Holds the name of the last cluster that kept its results where it lies."""

PROPAGATION_SECONDS = 60.0
"""Until all of AWS knows a new role."""


def main() -> None:
    """Checks, or ends with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument(
        "--print-policy",
        action="store_true",
        help="print what the roles may do, for an administrator who makes them, and end",
    )
    parser.add_argument(
        "--ssh-from", help="network that may log in, as 203.0.113.0/24; default: this machine"
    )
    asked = parser.parse_args()
    with told_in_a_sentence():
        cluster = launcher.read(asked.file)
        if asked.print_policy:
            account = cluster.client("sts").get_caller_identity()["Account"]
            print(json.dumps(access.policies(cluster, account), indent=2))
            return
        check(cluster)
        if cluster.on_aws:
            access.make(cluster, asked.ssh_from)
            check_launch(cluster)
    print(f"{asked.file} can be launched; results go to {cluster.results}")


def check(cluster: Launcher) -> None:
    """All that can be known without making anything.

    Raises:
        ConfigError: in one sentence.
    """
    check_versions(cluster)
    if not cluster.on_aws:
        check_token(cluster)
        return
    if cluster.idle_hours is None:
        raise ConfigError(
            f"{cluster.path} does not say after how many hours without a job the cluster ends: add "
            "NFLAB_IDLE_HOURS=8 to its first setup command"
        )
    check_names(cluster)
    check_token(cluster)
    check_cards(cluster)
    check_credentials(cluster)
    check_types(cluster)
    check_bucket(cluster)
    check_results(cluster)
    check_quotas(cluster)


def check_versions(cluster: Launcher) -> None:
    """This machine's Ray and Python are the cluster's."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != cluster.python:
        raise ConfigError(
            f"this machine has Python {here} and the cluster would have {cluster.python}: "
            f"say NFLAB_PYTHON={here} in {cluster.path}, or install here with another PYTHON"
        )
    constraints = Path(__file__).resolve().parents[1] / "constraints.txt"
    pinned = re.search(r"^ray==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is not None and pinned[1] != ray.__version__:
        raise ConfigError(
            f"this machine has Ray {ray.__version__} and the cluster would have {pinned[1]}: "
            "run make install"
        )


def check_names(cluster: Launcher) -> None:
    """Its roles are its own: they say which bucket may be used, and which machines be ended."""
    head, workers = access.profiles(cluster)
    for name in (head, *workers):
        if not re.fullmatch(rf"{re.escape(cluster.name)}-[^-]+", name):
            raise ConfigError(
                f"the instance profile {name!r} in {cluster.path} would be another cluster's too: "
                f"name it after this one, as {cluster.name}-head"
            )


def check_token(cluster: Launcher) -> None:
    """Its token is its own; one that a file of before shares among clusters is told."""
    if cluster.token != Path(TOKEN).expanduser():
        tokens.require_own(cluster)
        return
    print(
        f"note: {cluster.path} gives {cluster.name} {TOKEN}, the token of every cluster whose file "
        f"does: write {TOKEN}: ~/.ray/nflab/{cluster.name}.token in its file_mounts, then make up "
        "goes on with the token that the cluster has, and make rotate-token gives it its own"
    )


def check_cards(cluster: Launcher) -> None:
    """Network cards that are named, as EFA's must be, say where they are: Ray asks no less."""
    for name, node_type in cluster.node_types.items():
        cards = node_type["node_config"].get("NetworkInterfaces", [])
        if not all(card.get("SubnetId") and card.get("Groups") for card in cards):
            raise ConfigError(
                f"the node type {name!r} in {cluster.path} has NetworkInterfaces without SubnetId "
                "or Groups: state both of each, a subnet and the security group's id"
            )


def check_credentials(cluster: Launcher) -> None:
    """AWS knows who asks, and the region exists."""
    if cluster.region not in boto3.Session().get_available_regions("ec2"):
        raise ConfigError(f"AWS has no region {cluster.region!r}: name another in {cluster.path}")
    try:
        cluster.client("sts").get_caller_identity()
    except NoCredentialsError:
        raise ConfigError(
            "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or run aws configure"
        ) from None
    except ClientError as error:
        raise ConfigError(f"AWS refuses the credentials: {_reason(error)}") from None
    except BotoCoreError as error:
        raise ConfigError(f"AWS cannot be reached in {cluster.region!r}: {error}") from None


def check_types(cluster: Launcher) -> None:
    """Every instance type is sold in the region."""
    wanted = {t["node_config"]["InstanceType"] for t in cluster.node_types.values()}
    try:
        pages = cluster.client("ec2").get_paginator("describe_instance_type_offerings")
        offers = pages.paginate(Filters=[{"Name": "instance-type", "Values": sorted(wanted)}])
        sold = {offer["InstanceType"] for page in offers for offer in page["InstanceTypeOfferings"]}
    except (BotoCoreError, ClientError) as error:
        raise ConfigError(
            f"the region {cluster.region!r} cannot be used: {_reason(error)}"
        ) from None
    for instance_type in sorted(wanted - sold):
        raise ConfigError(
            f"the instance type {instance_type!r} is not sold in {cluster.region}: choose another "
            f"in {cluster.path}"
        )


def check_bucket(cluster: Launcher) -> None:
    """The bucket exists and may be written."""
    storage, key = cluster.client("s3"), ".nflab-check"
    try:
        storage.head_bucket(Bucket=cluster.bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchBucket"):
            raise ConfigError(
                f"the bucket {cluster.bucket!r} does not exist: "
                f"aws s3 mb s3://{cluster.bucket} --region {cluster.region} makes it"
            ) from None
        raise ConfigError(
            f"the bucket {cluster.bucket!r} is not yours to use: name another in {cluster.path}"
        ) from None
    try:
        storage.put_object(Bucket=cluster.bucket, Key=key, Body=b"")
        storage.delete_object(Bucket=cluster.bucket, Key=key)
    except ClientError as error:
        raise ConfigError(
            f"the bucket {cluster.bucket!r} may not be written: {_reason(error)}"
        ) from None


def check_results(cluster: Launcher) -> None:
    """No other cluster that runs keeps its results at the same address."""
    storage = cluster.client("s3")
    folder = cluster.results.removeprefix(f"s3://{cluster.bucket}")
    key = f"{folder}/{MARK}".lstrip("/")
    try:
        other = storage.get_object(Bucket=cluster.bucket, Key=key)["Body"].read().decode()
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
            raise
        other = cluster.name
    named = replace(cluster, content={**cluster.content, "cluster_name": other})
    if other != cluster.name and down.heads(named):
        raise ConfigError(
            f"{cluster.results} is where the cluster {other!r} keeps its results, and it runs: "
            f"give {cluster.name!r} an address of its own as NFLAB_RESULTS, such as "
            f"s3://{cluster.bucket}/{cluster.name}"
        )
    storage.put_object(Bucket=cluster.bucket, Key=key, Body=cluster.name.encode())


def check_quotas(cluster: Launcher) -> None:
    """The account may run one GPU worker at least, as far as AWS tells."""
    refused = []
    for name, node_type in cluster.node_types.items():
        wanted, allowed = node_type["resources"].get("CPU", 0), vcpu_quota(cluster, node_type)
        if not node_type["resources"].get("GPU"):
            continue
        if allowed is None or allowed >= wanted:
            return
        refused.append(f"{name} needs {wanted} vCPUs and the quota is {allowed:g}")
    if refused:
        raise ConfigError(
            f"the account may launch no GPU worker in {cluster.region}: {'; '.join(refused)}: ask "
            "for more at https://console.aws.amazon.com/servicequotas"
        )


def vcpu_quota(cluster: Launcher, node_type: dict[str, Any]) -> float | None:
    """How many vCPUs of a node type's family may run at once; None where AWS does not tell."""
    config = node_type["node_config"]
    market = "spot" if "InstanceMarketOptions" in config else "on-demand"
    kind = str(config["InstanceType"])
    code = QUOTAS.get((kind[:2], market)) or QUOTAS.get((kind[0], market))
    if code is None:
        return None
    try:
        told = cluster.client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=code)
    except (BotoCoreError, ClientError):  # the account may not ask
        return None
    return float(told["Quota"]["Value"])


def check_launch(cluster: Launcher) -> None:
    """AWS would launch every node type: image, role and permissions are right."""
    deadline = time.monotonic() + PROPAGATION_SECONDS
    subnet = access.own_subnet(cluster)["SubnetId"]
    for name, node_type in cluster.node_types.items():
        machine = dict(node_type["node_config"])
        if "NetworkInterfaces" not in machine:  # which say their own
            machine["SubnetId"] = subnet
        while (refusal := _dry_run(cluster, machine)) is not None:
            if "IAM Instance Profile" not in refusal or time.monotonic() > deadline:
                raise ConfigError(f"AWS would not launch the node type {name!r}: {refusal}")
            time.sleep(3)


def _dry_run(cluster: Launcher, config: dict[str, Any]) -> str | None:
    """Why AWS would not launch a machine; None if it would."""
    try:
        cluster.client("ec2").run_instances(DryRun=True, MinCount=1, MaxCount=1, **config)
    except ClientError as error:
        if error.response["Error"]["Code"] != "DryRunOperation":
            return _reason(error)
    return None


def _reason(error: BotoCoreError | ClientError) -> str:
    told = error.response["Error"].get("Message") if isinstance(error, ClientError) else None
    return (told or str(error)).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    main()
