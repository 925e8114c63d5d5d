"""What each worker of a run takes of a cluster, and how many runs fit at once."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nflab.cluster.inventory import Cluster
from nflab.cluster.prices import share_of
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError

WORKERS_PER_CORE = 8
"""CPU workers that may share a core of a Ray that the platform starts itself."""

_HEAD = "node:__internal_head__"
"""Ray's mark of the head among its resources."""

ON_HEAD = {_HEAD: 0.001}
"""What a process asks for that only waits for workers: a place on the head, for which no machine is
launched and which no cloud takes away."""

WAITING_BYTES = 1.2e9
"""Of the head's memory for each run of several workers: the process that waits, and Ray Train's."""

TYPE_LABEL = "nflab-type"
"""Label of a type of machine in a launcher file, by which a run asks for types that hold it."""

_UNITS = 10_000
"""Ray counts a resource in such parts."""

Machine = Mapping[str, float]
"""What a machine has, as Ray's resources."""


@dataclass(frozen=True)
class Kind:
    """A type of machine that an autoscaler may launch."""

    machine: Machine
    count: int
    """How many of them there may be."""
    label: str | None = None
    """Its TYPE_LABEL."""


@dataclass(frozen=True)
class Fleet:
    """The machines that a cluster has, or may come to have."""

    present: Sequence[Machine]
    kinds: Sequence[Kind] = ()
    most: int = 0
    """How many there may be of all kinds together."""
    own: bool = False
    """Whether this process started the cluster (a laptop), so that workers may share its cores."""

    @property
    def machines(self) -> list[Machine]:
        """One of each sort."""
        return [*self.present, *(kind.machine for kind in self.kinds if min(kind.count, self.most))]

    def room(self, groups: Callable[[Machine], int]) -> int:
        """The most groups of workers there can be, if a machine holds `groups` of them."""
        found = [groups(k.machine) for k in self.kinds for _ in range(min(k.count, self.most))]
        # Of all kinds together there are no more than the cluster may have.
        return sum(map(groups, self.present)) + sum(sorted(found, reverse=True)[: self.most])

    def of_kinds_that_hold(self, workers: int, held: Callable[[Machine], int]) -> "Fleet | None":
        """Only the kinds of which one machine holds so many workers; None if there is none, or
        none that is too small, or they have no labels to be asked for by.

        Args:
            held: how many workers a machine holds.
        """
        fit = [kind for kind in self.kinds if min(kind.count, self.most) and held(kind.machine)]
        whole = [kind for kind in fit if held(kind.machine) >= workers]
        if len(whole) in (0, len(fit)) or any(kind.label is None for kind in whole):
            return None
        return Fleet((), whole, self.most)


@dataclass(frozen=True)
class Placement:
    """What each worker of a run takes, and how many such runs the cluster holds at once."""

    num_workers: int
    """The most, where they may be fewer."""
    cpus_per_worker: float
    gpus_per_worker: float
    max_concurrent: int
    prices: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """What a worker costs an hour, in USD, by the type of machine that may hold it; None if that is
    not known. A machine of no known type is called ""."""
    machines: str = ""
    """The instance types that may hold a worker; empty where no launcher file tells."""
    min_workers: int | None = None
    """The least, if a run goes on with fewer while machines are missing."""
    strategy: str = "PACK"
    """How Ray places a run's workers on machines."""
    labels: tuple[str, ...] = ()
    """The TYPE_LABELs of the machines that a run's workers ask for; empty: of any."""
    cluster: Cluster | None = None
    """The cluster, if it is on AWS."""

    @property
    def price_range(self) -> tuple[float, float] | None:
        """The least and the most that a worker may cost an hour; None if that is not known."""
        known = [price for price in self.prices.values() if price is not None]
        return (min(known), max(known)) if known and len(known) == len(self.prices) else None

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's resource request of one worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    @property
    def label_selector(self) -> dict[str, str] | None:
        """Ray's request for machines of some types; None if any will do."""
        return {TYPE_LABEL: f"in({','.join(self.labels)})"} if self.labels else None

    def takes(self, node_type: Mapping[str, Any]) -> bool:
        """Whether a worker may run on machines of a type of a launcher file."""
        label = node_type.get("labels", {}).get(TYPE_LABEL)
        fits = slots(node_type.get("resources", {}), self.per_worker) > 0
        return fits and (not self.labels or label in self.labels)

    def cores_on(self, machine: Machine) -> int:
        """CPU cores for a worker and its loaders: of those of a machine, as Ray counts them, the
        share that the worker takes of what workers are placed by."""
        share = min(1.0, share_of(machine, self.per_worker))
        # A hair above: Ray's parts of a core may be a little less than a worker's share.
        return max(1, int(machine.get("CPU", 0) * share + 0.05))

    def __str__(self) -> str:
        device = f"{self.gpus_per_worker:g} GPU each" if self.gpus_per_worker else "on CPU"
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        if self.min_workers is not None:
            workers = f"{self.min_workers} to {workers}"
        told = {"STRICT_PACK": " on one machine", "SPREAD": " on machines apart"}
        how = told.get(self.strategy, "")
        return f"{workers} a run{how}, {device}; {self.max_concurrent} at once"


def slots(machine: Machine, per_worker: Machine) -> int:
    """How many workers a machine holds, as Ray counts."""
    counts = []
    for key, amount in per_worker.items():
        need, there = round(amount * _UNITS), round(machine.get(key, 0) * _UNITS)
        if key == "GPU" and 0 < need < _UNITS:  # no worker has parts of two
            counts.append(there // _UNITS * (_UNITS // need))
        elif need:
            counts.append(there // need)
    return min(counts)


def launchable(launcher: Mapping[str, Any]) -> Fleet:
    """The machines that a launcher file allows a cluster to have."""
    most = launcher.get("max_workers", 2)  # Ray's default
    node_types = dict(launcher["available_node_types"])
    head = node_types.pop(launcher["head_node_type"]).get("resources", {})
    kinds = [
        Kind(
            node_type.get("resources", {}),
            node_type.get("max_workers", most),
            node_type.get("labels", {}).get(TYPE_LABEL),
        )
        for node_type in node_types.values()
    ]
    return Fleet([head], kinds, most)


def place(scale: ScaleConfig, *fleets: Fleet) -> Placement:
    """Decides on GPUs or CPUs, which machines, and how many runs fit at once.

    Args:
        fleets: what the cluster has, and what it may come to have.

    Raises:
        ConfigError: more workers than the cluster can ever hold, or on one machine.
    """
    least, most = scale.worker_range
    has = max((machine.get("GPU", 0) for fleet in fleets for machine in fleet.machines), default=0)
    gpus = scale.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if has >= 1 else 0.0
    if gpus > has:
        raise ConfigError(
            f"gpus_per_worker {gpus:g} is more than any machine has, which is {has:g} GPUs"
        )
    cpus = 1.0
    shared = fleets[0].own and not gpus
    cores = fleets[0].present[0]["CPU"] if shared else 0
    if shared:
        # Down to one of Ray's parts: three times a third of two cores, rounded up, is too much.
        cpus = min(1.0, max(1, int(cores / most * _UNITS)) / _UNITS)
    elastic = least < most
    placement = Placement(most, cpus, gpus, 1, min_workers=least if elastic else None)

    def held(machine: Machine) -> int:
        return slots(machine, placement.per_worker)

    heads = [machine for fleet in fleets for machine in fleet.present if "memory" in machine]
    memory = min((machine["memory"] for machine in heads if _HEAD in machine), default=math.inf)
    whole = []
    if scale.placement != "spread" and not elastic:
        whole = list(filter(None, (f.of_kinds_that_hold(most, held) for f in fleets)))
    fleets = tuple(whole) or fleets
    if shared:
        limit = WORKERS_PER_CORE * int(cores)
        told = f"{WORKERS_PER_CORE} a core on {cores:g} cores hold {limit}"
    elif scale.placement == "strict_pack":
        limit = max(held(machine) for fleet in fleets for machine in fleet.machines)
        told = f"placement strict_pack wants one machine for all, and the largest can hold {limit}"
    else:
        limit = max(fleet.room(held) for fleet in fleets)
        each = "a CPU and a GPU" if gpus == 1 else f"a CPU{f' and {gpus:g} GPU' * (gpus > 0)}"
        told = f"the cluster's machines, with {each} for each, hold {limit}"
    if least > limit:
        raise ConfigError(f"num_workers {scale.num_workers} is more than can ever run: {told}")
    if scale.placement == "strict_pack":
        at_once = max(fleet.room(lambda machine: held(machine) // most) for fleet in fleets)
    else:
        at_once = max(fleet.room(held) for fleet in fleets) // most
    if most > 1:
        at_once = int(min(at_once, memory // WAITING_BYTES))
    return dataclasses.replace(
        placement,
        max_concurrent=max(1, at_once),  # with fewer workers, too
        strategy=scale.placement.upper(),
        labels=tuple(str(kind.label) for fleet in whole for kind in fleet.kinds),
    )
