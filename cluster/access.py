"""Who may reach a cluster's machines, and what these may do: made once, before the first launch.

Nothing here costs money, so it outlives the cluster.
"""

import contextlib
import copy
import io
import ipaddress
import json
import re
from typing import Any
from urllib.request import urlopen

import click
from botocore.exceptions import ClientError
from launcher import Launcher
from ray.autoscaler._private.aws import config as ray_aws

from nflab.settings.errors import ConfigError

OWN_ADDRESS = "https://checkip.amazonaws.com"
"""Answers with the address that a request came from."""

OF_PERSON = "SSH of "
"""Begins the description of a rule that lets a person log in; who it is follows."""

SSM = "resolve:ssm:"
"""How an image begins that a parameter names."""

WRITING = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]

EVERY_MACHINE = "arn:aws:ec2:*:*:instance/*"

SPOT_ROLE = "arn:aws:iam::*:role/aws-service-role/spot.amazonaws.com/*"

TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}


def make(cluster: Launcher, ssh_from: str | None) -> None:
    """The security group and the roles that the launcher file names.

    Args:
        ssh_from: network that may log in; this machine's own address if None.

    Raises:
        ConfigError: the network is none, or this machine's address cannot be found.
        ClientError: AWS refuses.
    """
    make_group(cluster, network(ssh_from), own_subnet(cluster)["VpcId"])
    head, workers = profiles(cluster)
    made = [make_profile(cluster, name, worker_policy(cluster)) for name in workers]
    make_profile(cluster, head, head_policy(cluster, [role["Arn"] for role in made]))


def network(ssh_from: str | None) -> str:
    """The network that may log in, in CIDR notation.

    Raises:
        ConfigError: it is none, or this machine's address cannot be found.
    """
    if ssh_from is None:
        try:
            with urlopen(OWN_ADDRESS, timeout=10) as answer:
                ssh_from = answer.read().decode().strip()
        except OSError as error:
            raise ConfigError(
                f"this machine's own address cannot be asked of {OWN_ADDRESS} ({error}): say who "
                "may log in with --ssh-from"
            ) from None
    try:
        return str(ipaddress.ip_network(ssh_from))
    except ValueError:
        raise ConfigError(f"--ssh-from {ssh_from!r} is no network such as 203.0.113.0/24") from None


def make_group(cluster: Launcher, allowed: str, vpc: str) -> None:
    """The security group: all among the cluster's machines, and SSH from one network for each
    person who has typed `make up`; whoever types it again has another."""
    compute = cluster.client("ec2")
    name = cluster.content["provider"]["security_group"]["GroupName"]
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [name]}]
    found = compute.describe_security_groups(Filters=filters)["SecurityGroups"]
    if not found:
        group = compute.create_security_group(
            GroupName=name, VpcId=vpc, Description="nflab: SSH from its user, all among its nodes"
        )["GroupId"]
        found = compute.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    group, rules = found[0]["GroupId"], found[0]["IpPermissions"]
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    leaving = found[0]["IpPermissionsEgress"]
    if not any(pair["GroupId"] == group for r in rules for pair in r["UserIdGroupPairs"]):
        compute.authorize_security_group_ingress(GroupId=group, IpPermissions=[among])
    if not any(p["GroupId"] == group for r in leaving for p in r["UserIdGroupPairs"]):
        # For EFA, to which the rule that lets all out to everywhere does not apply.
        compute.authorize_security_group_egress(GroupId=group, IpPermissions=[among])
    own = f"{OF_PERSON}{person(cluster.client('sts').get_caller_identity()['Arn'])}"
    wanted, there = ssh_rule(allowed, own), False
    for rule in _single(rules):
        told = _told(rule)
        of_person = told.startswith(OF_PERSON) and _essence(rule)[:3] == _essence(wanted)[:3]
        if _essence(rule) == _essence(wanted) and of_person:
            there = True  # two people may share an address
        elif told == own or not of_person:
            compute.revoke_security_group_ingress(GroupId=group, IpPermissions=[rule])
    if not there:
        compute.authorize_security_group_ingress(GroupId=group, IpPermissions=[wanted])


def person(arn: str) -> str:
    """Who an ARN of STS is of: a role's sessions are one, but those of single sign-on, which are
    called after a person."""
    role = re.fullmatch(r"(.*:assumed-role/(?!AWSReservedSSO_)[^/]+)/.*", arn)
    return role[1] if role else arn


def own_subnet(cluster: Launcher) -> dict[str, Any]:
    """The subnet in which Ray will launch first, which it chooses by its own rules, as AWS
    describes it.

    Raises:
        ConfigError: it would find none.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            resolved = ray_aws._configure_subnet(copy.deepcopy(cluster.content))
    except click.ClickException:
        raise ConfigError(
            f"there is no public subnet to launch in, in {cluster.region}: "
            f"aws ec2 create-default-vpc --region {cluster.region} makes the usual ones"
        ) from None
    head = resolved["available_node_types"][resolved["head_node_type"]]["node_config"]
    found = cluster.client("ec2").describe_subnets(SubnetIds=head["SubnetIds"][:1])
    return dict(found["Subnets"][0])


def ssh_rule(allowed: str, told: str) -> dict[str, Any]:
    """The rule that lets a network log in, with its description."""
    version = ipaddress.ip_network(allowed).version
    ranges = (
        {"IpRanges": [{"CidrIp": allowed, "Description": told}]}
        if version == 4
        else {"Ipv6Ranges": [{"CidrIpv6": allowed, "Description": told}]}
    )
    return {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **ranges}


def _single(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules for addresses outside, one for each address."""
    return [
        {key: rule[key] for key in ("IpProtocol", "FromPort", "ToPort") if key in rule}
        | {kind: [one]}
        for rule in rules
        for kind in ("IpRanges", "Ipv6Ranges")
        for one in rule.get(kind, [])
    ]


def _told(rule: dict[str, Any]) -> str:
    """What a rule for one address says of itself."""
    (one,) = [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
    return str(one.get("Description", ""))


def _essence(rule: dict[str, Any]) -> tuple[Any, ...]:
    v4 = sorted(r["CidrIp"] for r in rule.get("IpRanges", []))
    v6 = sorted(r["CidrIpv6"] for r in rule.get("Ipv6Ranges", []))
    return rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort"), v4, v6


def profiles(cluster: Launcher) -> tuple[str, list[str]]:
    """Names of the head's instance profile and of the workers', as the launcher file has them."""
    head = cluster.content["head_node_type"]
    names = {
        name: node_type["node_config"]["IamInstanceProfile"]["Name"]
        for name, node_type in cluster.node_types.items()
    }
    return names.pop(head), sorted(set(names.values()))


def worker_policy(cluster: Launcher) -> list[dict[str, Any]]:
    """What workers may: read the bucket, and write below the cluster's own results, but for the
    copies of what only the head has, and for the environment that new machines unpack and run."""
    _, own = _results(cluster)
    return [
        *_bucket_policy(cluster),
        {"Effect": "Deny", "Action": "s3:*", "Resource": f"{own}/backup/*"},
        {"Effect": "Deny", "Action": WRITING, "Resource": f"{own}/environments/*"},
    ]


def head_policy(cluster: Launcher, roles: list[str]) -> list[dict[str, Any]]:
    """What the head may: read the bucket, and write below the cluster's own results; launch the
    launcher file's types in its region, with workers' `roles` and the cluster's tag; end machines
    that bear it."""
    region, name = cluster.region, cluster.name
    here = {"StringEquals": {"aws:RequestedRegion": region}}
    machines, tag = f"arn:aws:ec2:{region}:*:instance/*", "ec2:CreateTags"
    # Who may tag any machine as the cluster's may end any machine.
    own = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": name}}
    new = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    workers = [t for n, t in cluster.node_types.items() if n != cluster.content["head_node_type"]]
    types = sorted({node_type["node_config"]["InstanceType"] for node_type in workers})
    asked = {
        "StringEquals": {"ec2:InstanceType": types, "aws:RequestTag/ray-cluster-name": name},
    }
    launching, ending = "ec2:RunInstances", ["ec2:TerminateInstances", tag]
    ids = sorted({str(node_type["node_config"].get("ImageId")) for node_type in workers})
    images = [_parameter(region, i.removeprefix(SSM)) for i in ids if i.startswith(SSM)]
    passed = {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    return [
        *_bucket_policy(cluster),
        {"Effect": "Allow", "Action": "ec2:Describe*", "Resource": "*", "Condition": here},
        {"Effect": "Allow", "Action": launching, "Resource": machines, "Condition": asked},
        # What a machine is made of: its image, disk, network, group and key.
        {"Effect": "Allow", "Action": launching, "NotResource": EVERY_MACHINE, "Condition": here},
        {"Effect": "Allow", "Action": ending, "Resource": machines, "Condition": own},
        *(
            {"Effect": "Allow", "Action": tag, "Resource": resource, "Condition": new}
            for resource in (machines, f"arn:aws:ec2:{region}:*:volume/*")
        ),
        {
            "Effect": "Allow",
            "Action": tag,
            "Resource": f"arn:aws:ec2:{region}:*:spot-instances-request/*",
        },
        *(
            [{"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": images}]
            if images
            else []
        ),
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": roles, "Condition": passed},
        # The first spot request of an account makes the role of spot requests.
        {"Effect": "Allow", "Action": "iam:CreateServiceLinkedRole", "Resource": SPOT_ROLE},
    ]


def _results(cluster: Launcher) -> tuple[str, str]:
    """ARNs of the bucket, and of what the cluster keeps in it."""
    return f"arn:aws:s3:::{cluster.bucket}", f"arn:aws:s3:::{cluster.results.removeprefix('s3://')}"


def _bucket_policy(cluster: Launcher) -> list[dict[str, Any]]:
    bucket, own = _results(cluster)
    # Listing is of the whole bucket: else S3 answers for what is not there that it is forbidden.
    return [
        {
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:GetBucketLocation"],
            "Resource": bucket,
        },
        {"Effect": "Allow", "Action": "s3:GetObject", "Resource": f"{bucket}/*"},
        {"Effect": "Allow", "Action": WRITING, "Resource": f"{own}/*"},
    ]


def document(statements: list[dict[str, Any]]) -> dict[str, Any]:
    """A policy as AWS takes it."""
    return {"Version": "2012-10-17", "Statement": statements}


def policies(cluster: Launcher, account: str) -> dict[str, dict[str, Any]]:
    """Name of each role, which its instance profile shares -> the policy that it needs, `nflab`.

    Args:
        account: id of the account, of which the roles are.
    """
    head, workers = profiles(cluster)
    roles = [f"arn:aws:iam::{account}:role/{name}" for name in workers]
    needed = {head: document(head_policy(cluster, roles))}
    return needed | {name: document(worker_policy(cluster)) for name in workers}


def _parameter(region: str, path: str) -> str:
    """ARN of a parameter that names an image: of AWS's own, else of the account."""
    account = "" if path.startswith("/aws/") else "*"
    return f"arn:aws:ssm:{region}:{account}:parameter{path}"


def make_profile(cluster: Launcher, name: str, statements: list[dict[str, Any]]) -> dict[str, Any]:
    """An instance profile with a role of the same name that may do what `statements` say.

    Returns:
        The role, as AWS describes it.
    """
    iam = cluster.client("iam")
    try:
        role = iam.get_role(RoleName=name)["Role"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchEntity":
            raise
        role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(TRUST))["Role"]
    policy = document(statements)
    try:
        known = iam.get_role_policy(RoleName=name, PolicyName="nflab")["PolicyDocument"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchEntity":
            raise
        known = None
    if known != policy:  # most may read IAM, and few write it
        iam.put_role_policy(RoleName=name, PolicyName="nflab", PolicyDocument=json.dumps(policy))
    try:
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchEntity":
            raise
        profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    if not profile["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return dict(role)
