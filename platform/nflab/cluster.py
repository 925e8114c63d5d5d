"""The Ray cluster: connecting to it, and what of it a run takes."""

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

import nflab
import nfnet
from nflab.config import ConfigError, ScaleConfig
from nflab.prices import machines, share_of, worker_prices
from nflab.worker_setup import point_at_own_cluster

WORKERS_PER_CORE = 8
"""CPU workers that may share a core of a Ray that the platform starts itself."""

LEFT_FOR_TRIAL = 0.01
"""Share of a CPU that each of several workers leaves to the process that waits for them."""

_NODE_TYPE = "ray.io/node-group"
"""Ray's label of what a machine is called in the launcher file that made it."""


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
    prices: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """What a worker costs an hour, in USD, by the type of machine that may hold it; None if that is
    not known. A machine of no known type is called ""."""
    machines: str = ""
    """The instance types that may hold a worker; empty where no launcher file tells."""

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

    def __str__(self) -> str:
        device = f"{self.gpus_per_worker:g} GPU each" if self.gpus_per_worker else "on CPU"
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        return f"{workers} a run, {device}; {self.max_concurrent} at once"


def connect(scale: ScaleConfig, priced: bool = False) -> Placement:
    """Connects to the cluster named by $RAY_ADDRESS (a job's is set), else starts a local Ray.

    The code that runs here, of both packages, is what runs on every worker.

    Args:
        priced: whether the price of every machine must be known.

    Raises:
        ConfigError: the cluster cannot be reached, can never hold the workers of `scale`, or has
            no price; of a local Ray that is known before it starts.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    own = address == "local"
    if own:
        _place_here(scale, priced)
    _start(address)
    present = ray.cluster_resources()
    launcher = None if own else ray.get(_launcher.remote())
    launchable = {} if launcher is None else most_resources(launcher)
    cpus, gpus = (max(present.get(key, 0), launchable.get(key, 0)) for key in ("CPU", "GPU"))
    placement = place(scale, Resources(cpus=cpus, gpus=gpus, own=own))
    prices = {} if launcher is None else worker_prices(launcher, placement.per_worker)
    kinds = "" if launcher is None else machines(launcher, placement.per_worker)
    for name in _present_types(placement):
        prices.setdefault(name, None)
    placement = dataclasses.replace(placement, prices=prices, machines=kinds)
    if priced:
        _require_prices(placement)
    return placement


def foresee(scale: ScaleConfig, priced: bool = False) -> Placement:
    """What `connect` would give; of a local Ray, without starting it.

    Raises:
        ConfigError: likewise.
    """
    if "RAY_ADDRESS" in os.environ:
        placement = connect(scale, priced)
        ray.shutdown()
        return placement
    return _place_here(scale, priced)


def _place_here(scale: ScaleConfig, priced: bool) -> Placement:
    """Where workers run on a Ray that this process starts."""
    here = Resources(os.cpu_count() or 1, torch.cuda.device_count(), own=True)
    placement = place(scale, here)
    if priced:
        _require_prices(placement)
    return placement


def price_here(placement: Placement) -> float | None:
    """What this process costs an hour if it is a worker, in USD; None if that is not known."""
    labels = ray.get_runtime_context().get_node_labels()
    return placement.prices.get(str(labels.get(_NODE_TYPE, "")))


def _present_types(placement: Placement) -> Iterable[str]:
    """The types of those machines of the cluster that hold a worker."""
    for node in ray.nodes():
        if node["Alive"] and share_of(node["Resources"], placement.per_worker) <= 1:
            yield node["Labels"].get(_NODE_TYPE, "")


def _require_prices(placement: Placement) -> None:
    if placement.price_range is None:
        names = [repr(name) for name, price in placement.prices.items() if name and price is None]
        told = f"machines of the type {' and '.join(names)}" if names else "these machines"
        raise ConfigError(
            f"max_cost cannot be kept, for nflab/prices.csv has no price of {told}: add it "
            "there, or leave --max-cost out"
        )


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
    except RuntimeError as error:
        versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
        if not str(error).startswith("Version mismatch") or len(versions) != 4:
            raise
        raise ConfigError(
            "the Ray cluster at {} has Ray {} and Python {} and this machine Ray {} and Python {}: "
            "install the cluster's here, or run the script there, with ray job submit".format(
                address, *versions
            )
        ) from None


@ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})
def _launcher() -> dict[str, Any] | None:
    """The launcher file of the cluster, as far as it tells of machines; None if it has none.

    Ray tells no driver what its autoscaler may launch, so this reads, on the head, the file that
    the running autoscaler was given, or on Kubernetes what KubeRay's is given in place of one.
    """
    told = ("max_workers", "provider", "head_node_type", "available_node_types")
    if "RAY_CLUSTER_NAMESPACE" in os.environ:  # KubeRay sets it in the containers of Ray
        try:
            launcher = _kuberay_launcher()
        except OSError:  # only a cluster with an autoscaler may ask Kubernetes
            return None
        return {key: launcher[key] for key in told}
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
            launcher = yaml.safe_load(files[0].read_text(encoding="utf-8"))
            return {key: launcher[key] for key in told if key in launcher}
    return None


def _kuberay_launcher() -> dict[str, Any]:
    """The cluster on Kubernetes whose head this is, as a launcher file would describe it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    name, namespace = os.environ["RAY_CLUSTER_NAME"], os.environ["RAY_CLUSTER_NAMESPACE"]
    return dict(AutoscalingConfigProducer(name, namespace)())


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
