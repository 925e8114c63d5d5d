"""`cluster/check.py` on an emulated AWS: one sentence for each thing that is wrong."""

import json
from typing import Any

import pytest
import yaml

from tests.cluster.ec2 import SUBNET, Cloud
from tests.cluster.hosts import USER
from tests.cluster.laptop import Laptop
from tests.cluster.test_gpu_yaml import overrides
from tests.conftest import ROOT

NO_PUT = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "*"},
    ],
}


def check(laptop: Laptop, edits: dict[str, str], flags: str = "", **env: str) -> tuple[int, str]:
    """Exit code and words of the check of gpu.yaml with these edits."""
    launcher: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    overrides(launcher)
    text = yaml.safe_dump(launcher)
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    (laptop.home / "checked.yaml").write_text(text)
    command = f"python cluster/check.py /home/{USER}/checked.yaml --ssh-from {SUBNET} {flags}"
    return laptop.attempt(command, **env)


@pytest.fixture(scope="module")
def account(cloud: Cloud) -> Cloud:
    """An account with a bucket that may be written and one that may not."""
    storage = cloud.client("s3")
    for bucket in ("mine", "readonly"):
        storage.create_bucket(Bucket=bucket)
    storage.put_bucket_policy(Bucket="readonly", Policy=json.dumps(NO_PUT))
    return cloud


@pytest.mark.parametrize(
    ("edits", "env", "words"),
    [
        ({}, {}, "the bucket 'nflab-results' does not exist"),
        ({"s3://nflab-results": "s3://readonly"}, {}, "the bucket 'readonly' may not be written"),
        ({"s3://nflab-results": "/mnt/nflab"}, {}, "name a bucket"),
        ({"NFLAB_PYTHON=3": "NFLAB_PYTHON=2"}, {}, "the cluster would have 2."),
        ({"s3://nflab-results": "s3://mine/"}, {}, "ends with a slash"),
        (
            {"cluster_name: nflab-gpu": "cluster_name: a"},
            {},
            "name it after this one, as a-head",
        ),
        ({"cluster_name: nflab-gpu": "cluster_name: nflab"}, {}, "name it after this one"),
        ({" NFLAB_IDLE_HOURS=8": ""}, {}, "after how many hours without a job"),
        ({"g5.2xlarge": "g99.large"}, {}, "'g99.large' is not sold in us-east-1"),
        ({"us-east-1": "moon-1"}, {}, "AWS has no region 'moon-1'"),
        ({}, {"AWS_ACCESS_KEY_ID": ""}, "there are no AWS credentials"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    laptop: Laptop, account: Cloud, edits: dict[str, str], env: dict[str, str], words: str
) -> None:
    code, said = check(laptop, edits, **env)
    assert code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert words in said
    assert account.launched == []


def test_a_quota_that_allows_no_worker_is_told_before_anything_is_made(
    laptop: Laptop, account: Cloud
) -> None:
    try:
        account.front.quota = 4
        code, said = check(laptop, {"nflab-results": "mine"})
        assert code == 2
        assert said.startswith("error: the account may launch no GPU worker in us-east-1: ")
        assert "gpu-spot needs 8 vCPUs and the quota is 4" in said
        assert "gpu-on-demand needs 8 vCPUs and the quota is 4" in said
    finally:
        account.front.quota = None
    named = {"Name": "group-name", "Values": ["nflab-gpu"]}
    assert not account.client("ec2").describe_security_groups(Filters=[named])["SecurityGroups"]


def test_two_clusters_that_run_never_share_an_address_of_results(
    laptop: Laptop, account: Cloud
) -> None:
    compute = account.client("ec2")
    tags = [{"Key": "ray-cluster-name", "Value": "a"}, {"Key": "ray-node-type", "Value": "head"}]
    image = compute.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    account.boots.clear()
    (head,) = compute.run_instances(
        MinCount=1,
        MaxCount=1,
        ImageId=image,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )["Instances"]
    try:
        account.client("s3").put_object(Bucket="mine", Key=".nflab-cluster", Body=b"a")
        code, said = check(laptop, {"nflab-results": "mine"})
        assert code == 2
        assert "s3://mine is where the cluster 'a' keeps its results, and it runs" in said
        assert check(laptop, {"nflab-results": "mine/of-mine"})[0] == 0
    finally:
        compute.terminate_instances(InstanceIds=[head["InstanceId"]])
        account.boots.set()
    assert check(laptop, {"nflab-results": "mine"})[0] == 0
    held = account.client("s3").get_object(Bucket="mine", Key=".nflab-cluster")
    assert held["Body"].read() == b"nflab-gpu"


def test_another_address_takes_the_place_of_the_last_one(laptop: Laptop, account: Cloud) -> None:
    for network in (SUBNET, "198.51.100.7/32"):
        code, said = check(laptop, {"nflab-results": "mine"}, f"--ssh-from {network}")
        assert code == 0, said
    groups = account.client("ec2").describe_security_groups(GroupNames=["nflab-gpu"])
    (group,) = groups["SecurityGroups"]
    allowed = [r["CidrIp"] for rule in group["IpPermissions"] for r in rule["IpRanges"]]
    assert allowed == ["198.51.100.7/32"]
    assert account.launched == []
