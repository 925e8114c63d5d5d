"""What each worker of a run takes of a cluster, and how many runs fit at once."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nflab.cluster.prices import share_of
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError

WORKERS_PER_CORE = 8
"""CPU workers that may share a core of a Ray that the platform starts itself."""

LEFT_FOR_TRIAL = 0.01
"""Share of a CPU that each of several workers leaves to the process that waits for them."""


@dataclass(frozen=True)
class Resources:
    """What the cluster has, or what its autoscaler may bring it to."""

    cpus: float
    gpus: float
    own: bool
    """Whether this process started the cluster (a laptop), so that workers may share its cores."""


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

    def cores_on(self, machine: Mapping[str, float]) -> int:
        """CPU cores for a worker and its loaders: of those of a machine, as Ray counts them, the
        share that the worker takes of what workers are placed by."""
        share = min(1.0, share_of(machine, self.per_worker))
        # A hair above: a worker may leave a hundredth of a core to its trial.
        return max(1, int(machine.get("CPU", 0) * share + 0.05))

    def __str__(self) -> str:
        device = f"{self.gpus_per_worker:g} GPU each" if self.gpus_per_worker else "on CPU"
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        if self.min_workers is not None:
            workers = f"{self.min_workers} to {workers}"
        return f"{workers} a run, {device}; {self.max_concurrent} at once"


def most_resources(launcher: dict[str, Any]) -> dict[str, float]:
    """The most CPUs, and the most GPUs, that a launcher file allows a cluster to have."""
    max_workers = launcher.get("max_workers", 2)  # Ray's default
    node_types = dict(launcher["available_node_types"])
    head = node_types.pop(launcher["head_node_type"]).get("resources", {})
    total = {}
    for key in ("CPU", "GPU"):
        workers = [
            t.get("resources", {}).get(key, 0)
            for t in node_types.values()
            for _ in range(min(t.get("max_workers", max_workers), max_workers))
        ]
        # Of all types together there are no more than the cluster may have.
        total[key] = float(head.get(key, 0) + sum(sorted(workers)[-max_workers:]))
    return total


def place(scale: ScaleConfig, resources: Resources) -> Placement:
    """Decides on GPUs or CPUs and how many runs fit at once.

    Raises:
        ConfigError: more workers than the cluster can ever hold.
    """
    least, most = scale.worker_range
    gpus = scale.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if resources.gpus >= 1 else 0.0
    if gpus > resources.gpus:
        raise ConfigError(
            f"gpus_per_worker {gpus:g} is more than the {resources.gpus:g} GPUs that there are"
        )
    if resources.own and not gpus:
        limit = int(WORKERS_PER_CORE * resources.cpus)
        cpus = min(1.0, resources.cpus / most)
        where = f"{WORKERS_PER_CORE} a core on {resources.cpus:g} cores"
    else:
        cpus = 1.0
        limit = int(resources.cpus)
        where = f"the cluster's {resources.cpus:g} CPUs"
        if gpus:
            limit = min(limit, int(resources.gpus / gpus))
            where += f" and {resources.gpus:g} GPUs"
    if most > 1:
        cpus *= 1 - LEFT_FOR_TRIAL
    if least > limit:
        raise ConfigError(
            f"num_workers {scale.num_workers} is more than can ever run: {where} hold {limit}"
        )
    slots = resources.cpus / cpus
    if gpus:
        slots = min(slots, resources.gpus / gpus)
    # A hair above: a third of a core, three times, is one core.
    elastic = least if least < most else None
    at_once = max(1, int(slots / most + 1e-6))  # with fewer workers there is always one
    return Placement(most, cpus, gpus, at_once, min_workers=elastic)
