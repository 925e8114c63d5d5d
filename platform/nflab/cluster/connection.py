"""The Ray cluster: connecting to it, and what of it a run takes."""

import dataclasses
import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import ray
import torch

import nflab
import nfnet
from nflab.cluster.autoscaler import launcher_file
from nflab.cluster.inventory import cluster_of
from nflab.cluster.placement import Fleet, Placement, launchable, place, slots
from nflab.cluster.prices import machines, type_price, worker_prices
from nflab.cluster.slurm import ray_of_job
from nflab.cluster.worker_setup import set_up_worker
from nflab.settings import locations
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError

CONNECT_SECONDS = 5.0
"""How long a cluster has to take a connection."""

_NODE_TYPE = "ray.io/node-group"
"""Ray's label of what a machine is called in the launcher file that made it."""


def connect(scale: ScaleConfig, priced: bool = False) -> Placement:
    """Connects to the cluster named by $RAY_ADDRESS (a job's is set), else to the Slurm job's, else
    starts a local Ray.

    The code that runs here, of both packages, is what runs on every worker.

    Args:
        priced: whether the price of every machine must be known.

    Raises:
        ConfigError: the cluster cannot be reached, can never hold the workers of `scale`, or has
            no price; of a local Ray that is known before it starts.
    """
    address = _address()
    own = address == "local"
    if own:
        _place_here(scale, priced)
    _start(address)
    launcher = None if own else ray.get(launcher_file.remote())
    present = Fleet([node["Resources"] for node in ray.nodes() if node["Alive"]], own=own)
    placement = place(scale, present, *([] if launcher is None else [launchable(launcher)]))
    prices, kinds, cluster = {}, "", None
    others: dict[str, float | None] = {}
    if launcher is not None:
        cluster = cluster_of(launcher)
        if cluster is not None:
            others = {(head := launcher["head_node_type"]): type_price(launcher, head)}
        node_types = launcher["available_node_types"].items()
        able = {name: node_type for name, node_type in node_types if placement.takes(node_type)}
        launcher = {**launcher, "available_node_types": able}
        prices = worker_prices(launcher, placement.per_worker)
        kinds = machines(launcher, placement.per_worker)
    for name in _present_types(placement):
        prices.setdefault(name, None)
    placement = dataclasses.replace(placement, prices=prices, machines=kinds, cluster=cluster)
    if priced:
        _require_prices(placement, others)
    return placement


def _address() -> str:
    """Of the cluster; "local" of one that this process is to start.

    Raises:
        ConfigError: it is the Slurm job's, and there is none.
    """
    given = os.environ.get("RAY_ADDRESS")
    if given:
        return given
    found = ray_of_job()
    if found is None:
        return "local"
    os.environ["RAY_ADDRESS"] = found
    _default_to_token()
    return found


def disconnect() -> None:
    """Leaves the cluster; ends a local Ray."""
    ray.shutdown()


def foresee(scale: ScaleConfig, priced: bool = False) -> Placement:
    """What `connect` would give; of a local Ray, without starting it.

    Raises:
        ConfigError: likewise.
    """
    if _address() != "local":
        placement = connect(scale, priced)
        disconnect()
        return placement
    return _place_here(scale, priced)


def _place_here(scale: ScaleConfig, priced: bool) -> Placement:
    """Where workers run on a Ray that this process starts."""
    here = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    placement = place(scale, Fleet([here], own=True))
    if priced:
        _require_prices(placement, {})
    return placement


def price_here(placement: Placement) -> float | None:
    """What this process costs an hour if it is a worker, in USD; None if that is not known."""
    labels = ray.get_runtime_context().get_node_labels()
    return placement.prices.get(str(labels.get(_NODE_TYPE, "")))


def cores_here(placement: Placement) -> int:
    """CPU cores for this process if it is a worker (see `Placement.cores_on`)."""
    own = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return placement.cores_on(resources)


def _present_types(placement: Placement) -> Iterable[str]:
    """The types of those machines of the cluster that hold a worker."""
    for node in ray.nodes():
        if node["Alive"] and slots(node["Resources"], placement.per_worker):
            yield node["Labels"].get(_NODE_TYPE, "")


def _require_prices(placement: Placement, others: Mapping[str, float | None]) -> None:
    """`others`: what machines cost, by their type, that are paid for and hold no worker."""
    if placement.price_range is None or None in others.values():
        prices = {**others, **placement.prices}
        names = [repr(name) for name, price in prices.items() if name and price is None]
        told = f"machines of the type {' and '.join(names)}" if names else "these machines"
        raise ConfigError(
            f"max_cost cannot be kept, nor cost_usd be an objective, for nflab/cluster/prices.csv "
            f"has no price of {told}: add it there, or leave these out"
        )


def _require_reachable(address: str) -> None:
    """Ray itself would try for minutes, and then say so in a page.

    Raises:
        ConfigError: it is no address, or nobody answers there.
    """
    if address in ("local", "auto"):
        return
    instead = "name the file of the cluster's token in RAY_AUTH_TOKEN_PATH"
    locations.refuse_password(address, "RAY_ADDRESS", instead)
    parts = re.fullmatch(r"(?:ray://)?(\[[^\]]+\]|[^:/\s]+):(\d{1,5})(?:/.*)?", address)
    if parts is None or int(parts[2]) > 65535:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, which is no address: expected HOST:PORT, auto, or local"
        )
    try:
        socket.create_connection((parts[1].strip("[]"), int(parts[2])), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot reach the Ray cluster at {address}: {reason}") from None


def _default_to_token() -> None:
    """Whatever Ray's default is, unless someone has said otherwise."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        # It has read its variables as it was imported.
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]


def _start(address: str) -> None:
    _require_reachable(address)
    if address == "local":
        _default_to_token()
    # Ray reads these when it is first used: its polls and loggers are made for runs of hours.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "py_modules": [str(Path(m.__path__[0])) for m in (nflab, nfnet)],
                "worker_process_setup_hook": set_up_worker,
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
