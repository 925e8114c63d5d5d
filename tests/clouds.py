"""Clouds on this machine: a Ray cluster of a launcher file, and an emulated AWS."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)
from ray.util import get_node_ip_address

from tests.conftest import free_port, stop_marked

COMMANDS = (
    "initialization",
    "setup",
    "head_setup",
    "worker_setup",
    "head_start_ray",
    "worker_start_ray",
)


@contextmanager
def head(
    folder: Path,
    node_types: dict[str, dict[str, Any]],
    provider: dict[str, Any] | None = None,
    instance: str = FAKE_HEAD_NODE_ID,
) -> Iterator[dict[str, str]]:
    """A head of the first type, started as `ray up` does, whose autoscaler may launch the others.

    They are of Ray's own fake of a cloud, whose machines are processes here.

    Args:
        provider: another cloud, in which the head is `instance`.

    Yields:
        the environment of drivers.
    """
    port = free_port()
    head_type, (first, *others) = FAKE_HEAD_NODE_TYPE, node_types.items()
    launcher = {
        "max_workers": 8,
        "provider": provider
        or {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "region": "us-east-1",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"{get_node_ip_address()}:{port}",
        },
        "auth": {},
        "head_node_type": head_type,
        "available_node_types": {head_type: first[1], **dict(others)},
    }
    env = {}
    if provider is None:
        env = {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": instance}
    with started(folder, launcher, instance, port, env) as driver:
        yield driver


@contextmanager
def started(
    folder: Path, launcher: dict[str, Any], machine: str, port: int, env: dict[str, str]
) -> Iterator[dict[str, str]]:
    """The head of a launcher file, started as `ray up` does.

    Args:
        launcher: its content, as far as it is of this cluster.
        machine: id of the head's, with the launcher's cloud.
        env: of the head alone.

    Yields:
        the environment of drivers.
    """
    mark = f"head-of-test-{folder}"
    launcher = {
        "cluster_name": "fake",
        "idle_timeout_minutes": 1,
        "upscaling_speed": 1.0,
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in COMMANDS},
        **launcher,
    }
    file = folder / "cluster.json"
    file.write_text(json.dumps(launcher))
    driver = {
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    head_type = launcher["head_node_type"]
    of_head = {
        "NFLAB_TEST": mark,
        "RAY_NODE_TYPE_NAME": head_type,
        # As `ray up` has it.
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": machine,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        **env,
    }
    env = {**os.environ, **driver, **of_head}
    cpus = launcher["available_node_types"][head_type]["resources"]["CPU"]
    start = f"ray start --head --port {port} --num-cpus {cpus} --autoscaling-config {file}"
    start += " --include-dashboard=false --disable-usage-stats --node-ip-address 127.0.0.1"
    try:
        subprocess.run(["ray", "get-auth-token", "--generate"], env=env, check=True, timeout=240)
        subprocess.run(start.split(), env=env, check=True, timeout=240)
        yield driver
    finally:
        stop_marked(mark)


@contextmanager
def emulated_aws() -> Iterator[None]:
    """A new account on an emulated AWS, which is the environment's while in use."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
            }.items():
                patch.setenv(name, value)
            # The emulator's state is the process's: what other tests left of machines and rights.
            for service in ("ec2", "iam"):
                for account in get_backend(service).values():
                    account.reset()
            # Ray keeps the clients of the last account, whose server has gone.
            for cache in (resource_cache, client_cache):
                cache.cache_clear()
            yield
    finally:
        server.stop()
