"""The Ray cluster: connecting to it, and what of it a run takes."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

import nflab
import nfnet
from nflab.config import ConfigError, ScaleConfig
from nflab.worker_setup import point_at_own_cluster

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
    cpus_per_worker: float
    gpus_per_worker: float
    max_concurrent: int

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's resource request of one worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    def __str__(self) -> str:
        device = f"{self.gpus_per_worker:g} GPU each" if self.gpus_per_worker else "on CPU"
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        return f"{workers} a run, {device}; {self.max_concurrent} at once"


def connect(scale: ScaleConfig) -> Placement:
    """Connects to the cluster named by $RAY_ADDRESS (a job's is set), else starts a local Ray.

    The code that runs here, of both packages, is what runs on every worker.

    Raises:
        ConfigError: the cluster cannot be reached, or can never hold the workers of `scale`; of a
            local Ray that is known before it starts.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    own = address == "local"
    if own:
        place(scale, Resources(os.cpu_count() or 1, torch.cuda.device_count(), own=True))
    _start(address)
    present = ray.cluster_resources()
    launchable = {} if own else ray.get(_launchable.remote())
    cpus, gpus = (max(present.get(key, 0), launchable.get(key, 0)) for key in ("CPU", "GPU"))
    return place(scale, Resources(cpus=cpus, gpus=gpus, own=own))


def foresee(scale: ScaleConfig) -> Placement:
    """What `connect` would give; of a local Ray, without starting it.

    Raises:
        ConfigError: likewise.
    """
    if "RAY_ADDRESS" in os.environ:
        placement = connect(scale)
        ray.shutdown()
        return placement
    return place(scale, Resources(os.cpu_count() or 1, torch.cuda.device_count(), own=True))


def _start(address: str) -> None:
    # Ray reads these when it is first used: its polls and loggers are made for runs of hours.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is handled here
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "py_modules": [str(Path(m.__path__[0])) for m in (nflab, nfnet)],
                "worker_process_setup_hook": point_at_own_cluster,
            },
        )
    except (ConnectionError, ray.exceptions.RayError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot reach the Ray cluster at {address}: {reason}") from None


@ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})
def _launchable() -> dict[str, float]:
    """CPUs and GPUs of the cluster once its autoscaler has launched all it may; none without one.

    Ray tells no driver what its autoscaler may launch, so this reads, on the head, the launcher
    file that the running autoscaler was given.
    """
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
            return most_resources(yaml.safe_load(files[0].read_text(encoding="utf-8")))
    return {}


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
    gpus = scale.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if resources.gpus >= 1 else 0.0
    if gpus > resources.gpus:
        raise ConfigError(
            f"gpus_per_worker {gpus:g} is more than the {resources.gpus:g} GPUs that there are"
        )
    if resources.own and not gpus:
        limit = int(WORKERS_PER_CORE * resources.cpus)
        cpus = min(1.0, resources.cpus / scale.num_workers)
        where = f"{WORKERS_PER_CORE} a core on {resources.cpus:g} cores"
    else:
        cpus = 1.0
        limit = int(resources.cpus)
        where = f"the cluster's {resources.cpus:g} CPUs"
        if gpus:
            limit = min(limit, int(resources.gpus / gpus))
            where += f" and {resources.gpus:g} GPUs"
    if scale.num_workers > 1:
        cpus *= 1 - LEFT_FOR_TRIAL
    if scale.num_workers > limit:
        raise ConfigError(
            f"num_workers {scale.num_workers} is more than can ever run: {where} hold {limit}"
        )
    slots = resources.cpus / cpus
    if gpus:
        slots = min(slots, resources.gpus / gpus)
    # A hair above: a third of a core, three times, is one core.
    return Placement(scale.num_workers, cpus, gpus, int(slots / scale.num_workers + 1e-6))
