"""What machines and disks cost an hour, from the tables `prices.csv` and `disk_prices.csv`, and
what a worker takes of that."""

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("prices.csv")
"""Region, instance type, what it has, and USD an hour on demand and as a spot instance."""

DISKS = Path(__file__).with_name("disk_prices.csv")
"""Region, volume type, and USD a GiB and month."""

HOURS_PER_MONTH = 720
"""As AWS counts the months of a disk."""


def machine_price(region: str, instance_type: str, spot: bool) -> float | None:
    """USD an hour of a machine; None if the table does not tell."""
    row = _table(TABLE, "instance_type").get((region, instance_type))
    price = None if row is None else row["spot_usd_per_hour" if spot else "usd_per_hour"]
    return float(price) if price else None


def disk_price(region: str, volume_type: str, gib: float) -> float | None:
    """USD an hour of a disk; None if the table does not tell."""
    row = _table(DISKS, "volume_type").get((region, volume_type))
    return None if row is None else gib * float(row["usd_per_gib_month"]) / HOURS_PER_MONTH


def type_price(launcher: Mapping[str, Any], name: str) -> float | None:
    """USD an hour of a machine of a type of a launcher file; None if the table does not tell."""
    machine = launcher["available_node_types"][name].get("node_config", {})
    spot = machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    region = str(launcher["provider"].get("region"))
    return machine_price(region, str(machine.get("InstanceType")), spot)


def worker_prices(
    launcher: Mapping[str, Any], per_worker: Mapping[str, float]
) -> dict[str, float | None]:
    """What one worker costs an hour on each type of machine that can hold it, in USD.

    A worker pays the share of the machine that it takes, of its GPUs or of its CPUs, whichever is
    larger: that is what no other can have.

    Args:
        launcher: content of a launcher file.
        per_worker: what a worker takes, as Ray's resources.

    Returns:
        name of the type in the launcher file -> USD; None if the table does not tell.
    """
    prices: dict[str, float | None] = {}
    for name, node_type in launcher["available_node_types"].items():
        share = share_of(node_type.get("resources", {}), per_worker)
        if share > 1:
            continue
        price = type_price(launcher, name)
        prices[name] = None if price is None else price * share
    return prices


def machines(launcher: Mapping[str, Any], per_worker: Mapping[str, float]) -> str:
    """The instance types that can hold a worker, in one line."""
    found = {
        str(node_type.get("node_config", {}).get("InstanceType", name))
        for name, node_type in launcher["available_node_types"].items()
        if share_of(node_type.get("resources", {}), per_worker) <= 1
    }
    return " ".join(sorted(found))


def share_of(machine: Mapping[str, float], per_worker: Mapping[str, float]) -> float:
    """The share of a machine's resources that a worker takes; above 1 it does not hold one."""
    return max(
        amount / machine[key] if machine.get(key) else float("inf")
        for key, amount in per_worker.items()
        if amount
    )


@functools.cache
def _table(file: Path, kind: str) -> dict[tuple[str, str], dict[str, str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(row["region"], row[kind]): row for row in rows}
