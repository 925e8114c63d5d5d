"""What the head and the workers of a cluster on AWS may do, and what they may not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from tests.clouds import emulated_aws
from tests.cluster.iam import allows
from tests.conftest import ROOT

POLICIES = """
import json, sys, access, launcher
cluster = launcher.read(sys.argv[1])
roles = ["arn:aws:iam::111122223333:role/nflab-gpu-worker"]
print(json.dumps([access.head_policy(cluster, roles), access.worker_policy(cluster)]))
"""


def policies(file: Path) -> tuple[list[Any], list[Any]]:
    """The head's and the workers' statements."""
    done = subprocess.run(
        [sys.executable, "-c", POLICIES, str(file)],
        cwd=ROOT / "cluster",
        capture_output=True,
        text=True,
        check=True,
    )
    head, workers = json.loads(done.stdout)
    return head, workers


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Of gpu.yaml, with results in a folder of a bucket."""
    file = tmp_path_factory.mktemp("access") / "gpu.yaml"
    text = (ROOT / "cluster/gpu.yaml").read_text()
    file.write_text(text.replace("RESULTS=s3://nflab-results ", "RESULTS=s3://shared/mine "))
    return policies(file)


EC2 = "arn:aws:ec2:us-east-1:111122223333"

NEW = {
    "ec2__InstanceType": "g5.2xlarge",
    "aws__RequestTag___ray-cluster-name": "nflab-gpu",
    "aws__RequestedRegion": "us-east-1",
}
"""Of a request that launches a worker."""

AMI = "parameter/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest"

HERE = {"aws__RequestedRegion": "us-east-1"}

TAGGED = {"aws__ResourceTag___ray-cluster-name": "nflab-gpu"}


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("ec2:RunInstances", f"{EC2}:instance/*", NEW),
        *[
            ("ec2:RunInstances", resource, NEW)
            for resource in (
                "arn:aws:ec2:us-east-1::image/ami-1",
                "arn:aws:ec2:us-east-1::snapshot/snap-1",
                *(f"{EC2}:{kind}/x" for kind in ("subnet", "security-group", "key-pair")),
                *(f"{EC2}:{kind}/*" for kind in ("network-interface", "volume")),
            )
        ],
        *[
            ("ec2:CreateTags", f"{EC2}:{kind}/x", {"ec2__CreateAction": "RunInstances"})
            for kind in ("instance", "volume", "spot-instances-request")
        ],
        ("ec2:CreateTags", f"{EC2}:instance/i-1", TAGGED),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", TAGGED),
        ("ec2:DescribeInstances", "*", HERE),
        ("ssm:GetParameters", f"arn:aws:ssm:us-east-1::{AMI}/ami-id", {}),
        (
            "iam:PassRole",
            "arn:aws:iam::111122223333:role/nflab-gpu-worker",
            {"iam__PassedToService": "ec2.amazonaws.com"},
        ),
        ("s3:GetObject", "arn:aws:s3:::shared/imagenet/train-0.arrow", {}),
        ("s3:PutObject", "arn:aws:s3:::shared/mine/backup/mlflow.db", {}),
        ("s3:PutObject", "arn:aws:s3:::shared/mine/environments/a.tar.zst", {}),
        ("s3:DeleteObject", "arn:aws:s3:::shared/mine/runs/a/run.json", {}),
        ("s3:ListBucket", "arn:aws:s3:::shared", {}),
    ],
)
def test_the_head_may_do_what_it_must(
    ours: tuple[list[Any], list[Any]], action: str, resource: str, context: dict[str, str]
) -> None:
    assert allows(ours[0], action, resource, **context)


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        # Another type, region or cluster's name, or none.
        ("ec2:RunInstances", f"{EC2}:instance/*", {**NEW, "ec2__InstanceType": "p5.48xlarge"}),
        ("ec2:RunInstances", "arn:aws:ec2:eu-west-1:111122223333:instance/*", NEW),
        (
            "ec2:RunInstances",
            "arn:aws:ec2:eu-west-1::image/a",
            {"aws__RequestedRegion": "eu-west-1"},
        ),
        (
            "ec2:RunInstances",
            f"{EC2}:instance/*",
            {**NEW, "aws__RequestTag___ray-cluster-name": "other"},
        ),
        ("ec2:RunInstances", f"{EC2}:instance/*", HERE),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", {}),
        ("ec2:CreateTags", f"{EC2}:instance/i-1", {}),
        ("ec2:CreateTags", f"{EC2}:volume/vol-1", {}),
        ("ec2:ModifyInstanceAttribute", f"{EC2}:instance/i-1", TAGGED),
        # Parameters of the account, which may be secrets, and other ways to read them.
        ("ssm:GetParameters", "arn:aws:ssm:us-east-1:111122223333:parameter/database/password", {}),
        ("ssm:GetParameter", f"arn:aws:ssm:us-east-1::{AMI}/ami-id", {}),
        ("ssm:GetParametersByPath", f"arn:aws:ssm:us-east-1::{AMI}", {}),
        # Roles of others, or ours for another service.
        (
            "iam:PassRole",
            "arn:aws:iam::111122223333:role/admin",
            {"iam__PassedToService": "ec2.amazonaws.com"},
        ),
        (
            "iam:PassRole",
            "arn:aws:iam::111122223333:role/nflab-gpu-worker",
            {"iam__PassedToService": "lambda.amazonaws.com"},
        ),
        ("s3:DeleteObject", "arn:aws:s3:::shared/imagenet/train-0.arrow", {}),
        ("s3:PutObject", "arn:aws:s3:::shared/mine-too/a", {}),
        ("s3:DeleteBucket", "arn:aws:s3:::shared", {}),
        ("s3:GetObject", "arn:aws:s3:::other/a", {}),
    ],
)
def test_the_head_may_do_nothing_else(
    ours: tuple[list[Any], list[Any]], action: str, resource: str, context: dict[str, str]
) -> None:
    assert not allows(ours[0], action, resource, **context)


def test_workers_use_the_bucket_but_for_what_heads_begin_with(
    ours: tuple[list[Any], list[Any]],
) -> None:
    _, workers = ours
    mine = "arn:aws:s3:::shared/mine"
    reading, writing = "s3:GetObject", ("s3:PutObject", "s3:DeleteObject")
    assert allows(workers, reading, "arn:aws:s3:::shared/imagenet/train-0.arrow")
    assert allows(workers, reading, f"{mine}/environments/a.tar.zst")
    assert all(allows(workers, verb, f"{mine}/runs/a/state.pt") for verb in writing)
    for verb in (*writing, reading):
        assert not allows(workers, verb, f"{mine}/backup/mlflow.db")
    for verb in writing:
        assert not allows(workers, verb, f"{mine}/environments/a.tar.zst")
        assert not allows(workers, verb, "arn:aws:s3:::shared/other/a")
    for action in (
        "ec2:RunInstances",
        "ec2:DescribeInstances",
        "iam:PassRole",
        "ssm:GetParameters",
    ):
        assert not allows(workers, action, "*", **NEW)


def test_what_the_launcher_file_says_is_what_may_be_launched(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "cluster/gpu.yaml").read_text())
    spot = content["available_node_types"]["gpu-spot"]["node_config"]
    spot |= {"InstanceType": "g6.xlarge", "ImageId": "resolve:ssm:/team/image"}
    content["provider"]["region"] = "eu-central-1"
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump(content))
    head, _ = policies(file)
    new = {**NEW, "aws__RequestedRegion": "eu-central-1"}
    machines = "arn:aws:ec2:eu-central-1:111122223333:instance/*"
    for kind, may in (("g6.xlarge", True), ("g5.2xlarge", True), ("m7i.large", False)):
        assert (
            allows(head, "ec2:RunInstances", machines, **{**new, "ec2__InstanceType": kind}) is may
        )
    own = "arn:aws:ssm:eu-central-1:111122223333:parameter/team/"
    assert allows(head, "ssm:GetParameters", f"{own}image")
    assert not allows(head, "ssm:GetParameters", f"{own}password")
    assert not allows(head, "ec2:RunInstances", f"{EC2}:instance/*", **NEW)


TWICE = """
import json, sys, access, launcher, botocore.client
from moto import mock_aws
cluster = launcher.read(sys.argv[1])
send, calls = botocore.client.BaseClient._make_api_call, []
def sent(self, name, told):
    calls.append(name)
    return send(self, name, told)
botocore.client.BaseClient._make_api_call = sent
with mock_aws():
    wanted = access.worker_policy(cluster)
    for statements in (wanted, wanted, wanted[:2]):
        access.make_profile(cluster, "nflab-gpu-worker", statements)
        print(json.dumps([name for name in calls if not name.startswith("Get")]))
        calls.clear()
"""


def test_a_role_is_written_only_where_it_differs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(ROOT / "cluster/gpu.yaml")],
        cwd=ROOT / "cluster",
        env={**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made, again, changed = map(json.loads, done.stdout.splitlines())
    assert made == [
        "CreateRole",
        "PutRolePolicy",
        "CreateInstanceProfile",
        "AddRoleToInstanceProfile",
    ]
    assert again == []
    assert changed == ["PutRolePolicy"]


def test_an_administrator_is_shown_what_would_be_written(
    ours: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    file = tmp_path / "gpu.yaml"
    text = (ROOT / "cluster/gpu.yaml").read_text()
    file.write_text(text.replace("RESULTS=s3://nflab-results ", "RESULTS=s3://shared/mine "))
    with emulated_aws():
        done = subprocess.run(
            [sys.executable, str(ROOT / "cluster/check.py"), str(file), "--print-policy"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.replace("123456789012", "111122223333"))
    assert {name: policy["Statement"] for name, policy in shown.items()} == {
        "nflab-gpu-head": ours[0],
        "nflab-gpu-worker": ours[1],
    }


QUOTA = """
import sys, check, launcher
cluster = launcher.read(sys.argv[1])
class Quotas:
    def get_service_quota(self, ServiceCode, QuotaCode):
        print(QuotaCode)
        return {"Quota": {"Value": 0}}
object.__setattr__(cluster, "client", lambda service: Quotas())
for kind in ("g5.xlarge", "p4d.24xlarge", "p5.48xlarge"):
    for market in ({"InstanceMarketOptions": {}}, {}):
        check.vcpu_quota(cluster, {"node_config": {"InstanceType": kind, **market}})
"""


def test_each_family_is_asked_for_by_the_quota_that_bounds_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUOTA, str(ROOT / "cluster/gpu.yaml")],
        cwd=ROOT / "cluster",
        capture_output=True,
        text=True,
        check=True,
    )
    # Spot, on demand: G and VT; P4, P3 and P2; P5, by the names that AWS gives the codes.
    spot, on_demand = done.stdout.split()[::2], done.stdout.split()[1::2]
    assert spot == ["L-3819A6DF", "L-7212CCBC", "L-C4BD4855"]
    assert on_demand == ["L-DB2E81BA", "L-417A185B", "L-417A185B"]


MAKE_GROUP = """
import sys, access, launcher
access.make_group(launcher.read("gpu.yaml"), *sys.argv[1:])
"""


def test_each_person_has_one_address_and_takes_none_from_another() -> None:
    """By who AWS says that they are; a rule of nobody goes."""
    with emulated_aws():
        compute, iam = boto3.client("ec2"), boto3.client("iam")
        vpc = compute.describe_vpcs()["Vpcs"][0]["VpcId"]

        def log_in_from(network: str, person: dict[str, str]) -> list[str]:
            command = [sys.executable, "-c", MAKE_GROUP, network, vpc]
            env = {**os.environ, **person}
            subprocess.run(command, cwd=ROOT / "cluster", env=env, check=True)
            (group,) = compute.describe_security_groups(GroupNames=["nflab-gpu"])["SecurityGroups"]
            rules = group["IpPermissions"]
            return sorted(r["CidrIp"] for rule in rules for r in rule["IpRanges"])

        persons = []
        for name in ("first", "second"):
            iam.create_user(UserName=name)
            key = iam.create_access_key(UserName=name)["AccessKey"]
            secret = key["SecretAccessKey"]
            persons.append(
                {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": secret}
            )
        first, second = persons
        assert log_in_from("198.51.100.7/32", first) == ["198.51.100.7/32"]
        compute.authorize_security_group_ingress(
            GroupName="nflab-gpu", IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
        )
        both = ["198.51.100.7/32", "203.0.113.1/32"]
        assert log_in_from("203.0.113.1/32", second) == both
        assert log_in_from("203.0.113.1/32", second) == both
        assert log_in_from("203.0.113.2/32", second) == ["198.51.100.7/32", "203.0.113.2/32"]
        assert log_in_from("203.0.113.2/32", first) == ["203.0.113.2/32"]  # one that both have
