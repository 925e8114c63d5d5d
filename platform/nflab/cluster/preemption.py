"""The notice that a machine is about to be taken away."""

import functools
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import ray
from ray.core.generated import autoscaler_pb2

POLL_SECONDS = 5.0
"""Between two looks; a spot machine of AWS has two minutes."""

_MUTE = 10
"""So many looks without an answer say that there is none, as in a container."""

_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Where a machine's own facts are asked for, by the name that AWS's libraries give it."""

_VENDOR = Path("/sys/devices/virtual/dmi/id/sys_vendor")
"""Says who made a machine."""


@functools.cache
def notice() -> Callable[[], str | None]:
    """What tells, at once, that this process's machine is about to be taken away; None: it is not.

    It is once Ray drains the machine, as a launcher or Kubernetes may ask of it. On AWS the notice
    of a spot machine makes Ray drain it, so that nothing else begins there.
    """
    given = threading.Event()

    def drained() -> bool:
        with suppress(Exception):  # another look may succeed
            return _is_drained()
        return False

    def watch() -> None:
        mute = 0  # looks in a row at which AWS did not tell
        while not given.is_set():
            if drained():
                given.set()
            elif mute < _MUTE:
                try:
                    end, mute = spot_end(), 0
                except OSError as error:
                    end, mute = None, mute + 1
                    if mute == _MUTE:
                        print(f"AWS does not tell when it takes this machine: {error}", flush=True)
                if end is not None:
                    given.set()
                    with suppress(Exception):  # what matters is the checkpoint
                        drain(ray.get_runtime_context().get_node_id(), end)
            given.wait(POLL_SECONDS)

    threading.Thread(target=watch, name="notice", daemon=True).start()
    told = "this machine is about to be taken away"
    return lambda: told if given.is_set() else None


def spot_end() -> float | None:
    """When AWS will stop or end this spot machine, in seconds since 1970; None if it has not said
    so, or elsewhere.

    Raises:
        OSError: a machine of AWS does not tell.
    """
    told = metadata("spot/instance-action")
    return None if told is None else datetime.fromisoformat(json.loads(told)["time"]).timestamp()


def metadata(name: str) -> str | None:
    """What AWS tells this machine of itself; None elsewhere, or if there is nothing of this name.

    Raises:
        OSError: a machine of AWS does not tell.
    """
    endpoint = os.environ.get(_ENDPOINT)
    if endpoint is None:
        if not _VENDOR.exists() or not _VENDOR.read_text().startswith("Amazon EC2"):
            return None
        endpoint = "http://169.254.169.254"
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{endpoint}/latest/api/token", "PUT", lifetime)
    address = f"{endpoint}/latest/meta-data/{name}"
    try:
        return _ask(address, "GET", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _ask(address: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(address, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=2) as answer:
        return str(answer.read().decode())


def _is_drained() -> bool:
    """Whether Ray lets nothing begin on this machine any more."""
    return ray.get_runtime_context().get_node_id() in ray._private.state.state.get_draining_nodes()


def drain(node_id: str, end: float) -> None:
    """Lets nothing begin on a machine any more, which ends then (in seconds since 1970)."""
    address = ray.get_runtime_context().gcs_address
    client = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    client.drain_node(node_id, reason, "this machine is taken away", round(1000 * end))
