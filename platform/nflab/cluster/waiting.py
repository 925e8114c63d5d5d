"""What a person is told while runs wait for machines: how many are asked for, what comes of it."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import ray
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

from nflab.settings.errors import ConfigError

REFUSALS = Path("/tmp/ray/session_latest/logs/refusals.jsonl")
"""On the head, where jobs' drivers run too: what a cloud answered that launched no machine."""

LEFT_OUT = "NeverJoined"
"""Begins the reason of a refusal that is not the cloud's: see joining.py."""

RECENT_SECONDS = 60.0
"""In which the autoscaler asks many times for what it lacks."""

ASKED_AGAIN_SECONDS = 20.0
"""In which it has asked again at least once."""

POLL_SECONDS = 5.0

GRACE_SECONDS = 15.0
"""A wait that is no longer is not worth a word."""


class Refusal(NamedTuple):
    """A cloud launched no machine of a type."""

    when: float
    """Seconds since 1970."""
    node_type: str
    reason: str
    following: str | None
    """The type that is asked for instead; None if there is none left."""

    def __str__(self) -> str:
        hope = f"{self.following} is asked for instead"
        if self.following is None:
            hope = "no type follows it, and it is asked for again"
        return f"there is no {self.node_type} ({self.reason}): {hope}"


def note_refusal(refusal: Refusal) -> None:
    """Writes one down for those who wait, if this is a head."""
    # A full disk must not keep the next type from being launched.
    with suppress(OSError), REFUSALS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(refusal) + "\n")


def refusals(since: float) -> list[Refusal]:
    """Those that were written down since then, without repetitions, the first ones first."""
    lines = REFUSALS.read_text(encoding="utf-8").splitlines() if REFUSALS.exists() else []
    found = [Refusal(*json.loads(line)) for line in lines]
    # The same type is refused again and again until there is one.
    latest = {refusal[1:]: refusal for refusal in found if refusal.when >= since}
    return list(latest.values())


@contextmanager
def told_of_waiting(say: Callable[[str], None]) -> Iterator[None]:
    """While in use, says what is waited for on a cluster, and again whenever that changes.

    Raises:
        ConfigError: in place of the block, which waits for machines while every type of them is
            left out.
    """
    if "RAY_ADDRESS" not in os.environ:  # a Ray of our own holds what it was made for
        yield
        return
    ended = threading.Event()
    address = ray.get_runtime_context().gcs_address
    given_up: list[str] = []
    thread = threading.Thread(target=_watch, args=(address, say, ended, given_up), daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if given_up:
            raise ConfigError(given_up[0]) from None
        raise
    finally:
        ended.set()
        thread.join(POLL_SECONDS)


def _watch(
    address: str, say: Callable[[str], None], ended: threading.Event, given_up: list[str]
) -> None:
    begun = time.time()
    arrivals = Arrivals()
    waits_since: float | None = None
    said: set[str] = set()
    while not ended.wait(POLL_SECONDS):
        try:
            status = get_cluster_status(address)
            told = reasons(status, refusals(begun), arrivals.missed(status))
        except (ray.exceptions.RayError, RuntimeError, OSError, ValueError):
            continue  # the head is busy, or gone: then others say so
        if not told:
            waits_since = None
            continue
        now = time.monotonic()
        waits_since = now if waits_since is None else waits_since
        if now < waits_since + GRACE_SECONDS:
            continue
        for sentence in told:
            if sentence not in said:
                say(sentence)
        said |= set(told)
        why = hopeless(status, refusals(max(begun, time.time() - RECENT_SECONDS)))
        if why is not None and not ended.is_set():
            given_up.append(why)
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C would: the run can be resumed
            return


class Arrivals:
    """Counts the machines that were started and went away before they joined the cluster."""

    def __init__(self) -> None:
        self._known: set[str] | None = None
        self._coming: set[str] = set()
        self._started: dict[str, str] = {}
        self._joined: dict[str, str] = {}

    def missed(self, status: ClusterStatus) -> Counter[str]:
        """How many there were of each node type, from the first status to this one.

        Args:
            status: as Ray's autoscaler tells; it calls a machine that is being started by another
                name than the node that comes of it.
        """
        there = [*status.active_nodes, *status.idle_nodes, *status.failed_nodes]
        nodes = {str(node.node_id): node.ray_node_type_name for node in there}
        coming = {str(node.instance_id): node.ray_node_type_name for node in status.pending_nodes}
        if self._known is None:
            # One of these may be among those: joined, and still told to be coming.
            self._known, self._coming = set(nodes), set(coming)
        coming = {key: kind for key, kind in coming.items() if key not in self._coming}
        self._joined |= {key: kind for key, kind in nodes.items() if key not in self._known}
        self._started |= coming
        missed = Counter(self._started.values())
        missed.subtract(coming.values())
        missed.subtract(self._joined.values())
        return +missed


def reasons(
    status: ClusterStatus, refused: Iterable[Refusal], missed: Mapping[str, int]
) -> list[str]:
    """What is waited for, and why it does not come; nothing if nobody waits.

    Args:
        status: as Ray's autoscaler tells.
        refused: what the cloud did not launch.
        missed: how many machines of each type went away before they joined.
    """
    demands = status.resource_demands
    wanted: Counter[str] = Counter()
    for demand in [*demands.placement_group_demand, *demands.ray_task_actor_demand]:
        for bundle in demand.bundles_by_count:
            if told := _resources(bundle.bundle):  # else it waits for the head alone
                wanted[told] += bundle.count
    if not wanted:
        return []
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    launching: Counter[str] = Counter()
    for launch in status.pending_launches:
        launching[launch.ray_node_type_name] += launch.count
    asked = " and ".join(f"{count} x {what}" for what, count in wanted.items())
    # A cloud that was asked for a machine may refuse it.
    hopes = [
        f"{_machines(counted)} {verb}"
        for counted, verb in ((starting, "are being started"), (launching, "are asked for"))
        if counted
    ]
    hope = ", ".join(hopes) or "the cluster's machines have no room, and none is being started"
    lost = [
        f"{count} {kind} went away before joining: make logs says why"
        for kind, count in missed.items()
    ]
    return [*map(str, refused), *lost, f"the cluster waits for {asked}: {hope}"]


def hopeless(status: ClusterStatus, refused: Iterable[Refusal]) -> str | None:
    """Why no machine will come for those who wait; None if one may, or one is there.

    Args:
        status: as Ray's autoscaler tells.
        refused: what was not launched of late.
    """
    others = [*status.active_nodes, *status.idle_nodes][1:]  # the head is always there
    refused = list(refused)
    left_out = all(refusal.reason.startswith(LEFT_OUT) for refusal in refused)
    at_the_end = any(refusal.following is None for refusal in refused)
    # The autoscaler asks again at once for what was refused; a launch that was not is coming.
    again = {r.node_type for r in refused if r.when > time.time() - ASKED_AGAIN_SECONDS}
    asked = [x for x in status.pending_launches if x.ray_node_type_name not in again]
    if others or status.pending_nodes or asked or not (left_out and at_the_end):
        return None
    types = "; ".join(f"{refusal.node_type} ({refusal.reason})" for refusal in refused)
    return f"the run waits for machines, and every type of them is left out: {types}"


def _machines(counted: Counter[str]) -> str:
    return " and ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))


def _resources(bundle: dict[str, float]) -> str:
    """A bundle as people say it, without the marks of single nodes."""
    told = {key: value for key, value in bundle.items() if ":" not in key and "_group_" not in key}
    return ", ".join(f"{value:g} {key}" for key, value in sorted(told.items(), reverse=True))
