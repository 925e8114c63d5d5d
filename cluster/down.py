"""Takes a cluster down: nothing lost, nothing left.

First copies what only the head's disk holds to the other results, and says so; if that fails it
stops. On AWS it last asks for all that bears the cluster's tag: an instance, a volume or a spot
request that is still there is named, and the exit code is 1.

Example:
  python cluster/down.py cluster/gpu.yaml
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import launcher
from launcher import Launcher, told_in_a_sentence

from nflab.settings.errors import ConfigError

TERMINATION_SECONDS = 300.0
"""How long machines and their disks may take to go."""

THERE = ("pending", "running", "shutting-down", "stopping", "stopped")
"""States of a machine that is not gone."""


def main() -> None:
    """Takes it down, or ends with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    asked = parser.parse_args()
    with told_in_a_sentence():
        cluster = launcher.read(asked.file)
        if not cluster.on_aws or heads(cluster):
            save(cluster)
        else:
            print(f"no head of {cluster.name} runs: there is nothing to save")
        ray(cluster, "down", "--yes")
        left = wait_until_gone(cluster) if cluster.on_aws else []
    if left:
        print(f"error: still there, and may cost money: {', '.join(left)}", file=sys.stderr)
        sys.exit(1)
    if cluster.on_aws:
        print(f"nothing of {cluster.name} is left: no instance, no volume, no spot request")


def save(cluster: Launcher) -> None:
    """Copies what only the head has to the bucket.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        ray(cluster, "exec", "python ~/nflab/cluster/backup.py")
    except ConfigError as error:
        again = ""
        if cluster.on_aws:
            again = f"from a new address, first python cluster/check.py {cluster.path}; "
        raise ConfigError(
            f"not all results are in {cluster.results}, and the cluster stays up ({error}): "
            f"{again}to end it all the same, ray down {cluster.path}"
        ) from None


def ray(cluster: Launcher, verb: str, *words: str) -> None:
    """Runs Ray's launcher on the cluster's file.

    Raises:
        ConfigError: it failed.
    """
    command = [str(Path(sys.executable).parent / "ray"), verb, str(cluster.path), *words]
    if subprocess.run(command, check=False).returncode != 0:
        raise ConfigError(f"{' '.join(command[1:])!r} failed")


def heads(cluster: Launcher) -> list[str]:
    """The instances that are the cluster's head and run, or will."""
    head = {"Name": "tag:ray-node-type", "Values": ["head"]}
    return instances(cluster, head, states=("pending", "running"))


def wait_until_gone(cluster: Launcher) -> list[str]:
    """What bears the cluster's tag after a while; all of it costs money."""
    deadline = time.monotonic() + TERMINATION_SECONDS
    while (left := remains(cluster)) and time.monotonic() < deadline:
        time.sleep(5)
    return left


def remains(cluster: Launcher) -> list[str]:
    """Instances, volumes and spot requests of the cluster that are there now."""
    compute = cluster.client("ec2")
    tag = _tag(cluster)
    volumes = compute.describe_volumes(Filters=[tag])["Volumes"]
    waiting = {"Name": "state", "Values": ["open", "active"]}
    requests = compute.describe_spot_instance_requests(Filters=[tag, waiting])
    return [
        *(f"instance {instance}" for instance in instances(cluster)),
        *(f"volume {volume['VolumeId']}" for volume in volumes),
        *(f"spot request {r['SpotInstanceRequestId']}" for r in requests["SpotInstanceRequests"]),
    ]


def instances(
    cluster: Launcher, *filters: dict[str, object], states: Sequence[str] = THERE
) -> list[str]:
    """Ids of the cluster's machines that are in one of these states."""
    state = {"Name": "instance-state-name", "Values": list(states)}
    found = cluster.client("ec2").describe_instances(Filters=[_tag(cluster), state, *filters])
    return [i["InstanceId"] for r in found["Reservations"] for i in r["Instances"]]


def _tag(cluster: Launcher) -> dict[str, object]:
    return {"Name": "tag:ray-cluster-name", "Values": [cluster.name]}


if __name__ == "__main__":
    main()
