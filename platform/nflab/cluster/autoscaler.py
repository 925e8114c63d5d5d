"""What the cluster's autoscaler may launch, as its head knows it.

A process of its own on the head reads it, so this imports nothing large.
"""

import os
from pathlib import Path
from typing import Any

import ray
import yaml


@ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})
def launcher_file() -> dict[str, Any] | None:
    """The launcher file of the cluster, as far as it tells of machines; None if it has none.

    Ray tells no driver what its autoscaler may launch, so this reads, on the head, the file that
    the running autoscaler was given, or on Kubernetes what KubeRay's is given in place of one.
    """
    told = ("cluster_name", "max_workers", "provider", "head_node_type", "available_node_types")
    if "RAY_CLUSTER_NAMESPACE" in os.environ:  # KubeRay sets it in the containers of Ray
        try:
            found = _of_kuberay()
        except OSError:  # only a cluster with an autoscaler may ask Kubernetes
            return None
        return {key: found[key] for key in told}
    flag = "--autoscaling-config="
    # Of this cluster: there may be another one on the machine.
    own = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # that process has ended, or is another user's
            continue
        files = [Path(w.removeprefix(flag)).expanduser() for w in words if w.startswith(flag)]
        if own in words and files and files[0].is_file():
            found = yaml.safe_load(files[0].read_text(encoding="utf-8"))
            return {key: found[key] for key in told if key in found}
    return None


def _of_kuberay() -> dict[str, Any]:
    """The cluster on Kubernetes whose head this is, as a launcher file would describe it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    name, namespace = os.environ["RAY_CLUSTER_NAME"], os.environ["RAY_CLUSTER_NAMESPACE"]
    return dict(AutoscalingConfigProducer(name, namespace)())
