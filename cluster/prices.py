"""Renews the table of prices from SkyPilot's catalog of AWS's price lists.

The table has the regions that it had, and that of the launcher file; of each every type whose
NVIDIA GPUs the pinned torch can use, and the types without GPUs that it had or the launcher file
names. What the catalog lacks stays as it was, and is named.

Example:
  python cluster/prices.py cluster/gpu.yaml
"""

import argparse
import csv
import http.client
import io
import math
import statistics
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import launcher
from launcher import Launcher

from nflab.cluster.prices import TABLE
from nflab.settings.errors import ConfigError

CATALOG = (
    "https://raw.githubusercontent.com/skypilot-org/skypilot-catalog/master/catalogs/v8/aws/vms.csv"
)
"""A line for each type of machine in each zone, renewed every few hours."""

COLUMNS = "InstanceType AcceleratorName AcceleratorCount vCPUs GpuInfo Price SpotPrice Region Arch"

TOO_OLD = {"K520", "K80", "M60", "V100"}
"""NVIDIA's GPUs on AWS below compute capability 7.5, for which the pinned torch has no kernels."""

MOVED = 0.1
"""A price that changed by more than this share is named."""

AS_OF = "# As of "
"""Begins the one comment of the table that is written here."""

SECONDS = 60.0
"""How long the catalog's server may be silent."""

Row = dict[str, str]
Rows = dict[tuple[str, str], Row]


def main() -> None:
    """Renews the table, or ends with one sentence and leaves it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a launcher file")
    parser.add_argument("catalog", nargs="?", default=CATALOG, help="an https address, or a file")
    asked = parser.parse_args()
    try:
        cluster = launcher.read(asked.file)
        comments, before = table(TABLE.read_text(encoding="utf-8"))
        regions, without_gpus = wanted(before, cluster)
        found = machines(fetch(asked.catalog), asked.catalog, regions, without_gpus)
        if not found.keys() & before.keys():
            raise ConfigError(f"{asked.catalog} has no machine of {TABLE}: it is not AWS's list")
        after, older = merged(before, found)
        write(TABLE, [*comments, as_of(asked.catalog, older)], after)
    except (ConfigError, OSError) as error:
        print(f"error: {error}; the prices are as they were", file=sys.stderr)
        sys.exit(2)
    for line in changes(before, after, older):
        print(line)
    for region in sorted(regions - {region for region, _ in found}):
        print(f"not in the catalog: the region {region}")
    print(f"{TABLE}: {len(after)} machines; older prices: {len(older)}")


def fetch(source: str) -> str:
    """The catalog.

    Raises:
        ConfigError: it cannot be had whole.
    """
    try:
        if source.startswith("https://"):
            with urllib.request.urlopen(source, timeout=SECONDS) as answer:
                return str(answer.read().decode())
        if "://" in source:
            raise ConfigError(f"{source} is neither an https address nor a file")
        return Path(source).read_text(encoding="utf-8")
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {source}: {error or type(error).__name__}") from None


def table(text: str) -> tuple[list[str], Rows]:
    """The table's comments, but that of its date, and its rows."""
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("#") and not line.startswith(AS_OF)]
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return comments, {(row["region"], row["instance_type"]): row for row in rows}


def wanted(before: Rows, cluster: Launcher) -> tuple[set[str], set[str]]:
    """Of which regions the table is, and which types without GPUs it has."""
    regions = {region for region, _ in before}
    types = {name for (_, name), row in before.items() if not float(row["gpus"] or 0)}
    if cluster.on_aws:
        regions.add(cluster.region)
        types |= {
            str(kind["node_config"].get("InstanceType")) for kind in cluster.node_types.values()
        }
    return regions, types


def machines(text: str, source: str, regions: set[str], without_gpus: set[str]) -> Rows:
    """What the catalog tells of the regions' machines that are of use here.

    Args:
        text: the catalog.
        source: where it is from.
        without_gpus: the types without GPUs that are.

    Raises:
        ConfigError: it is damaged, or another table.
    """
    lines = csv.DictReader(io.StringIO(text), strict=True)
    zones: dict[tuple[str, str], list[Row]] = defaultdict(list)
    try:
        missing = set(COLUMNS.split()) - set(lines.fieldnames or ())
        if missing:
            raise ConfigError(f"{source} has no column {min(missing)}: it is another table")
        for line in lines:
            if None in line or None in line.values():  # more or fewer fields than columns
                raise csv.Error("another number of fields")
            if line["Region"] in regions and _usable(line, without_gpus):
                zones[line["Region"], line["InstanceType"]].append(line)
    except csv.Error as error:
        raise ConfigError(f"{source} is damaged after line {lines.line_num}: {error}") from None
    found = {}
    for machine, offers in zones.items():
        price = _median(offers, "Price", source)
        if price is None:
            continue
        spot, gpu = _median(offers, "SpotPrice", source), offers[0]["AcceleratorName"]
        found[machine] = {
            "region": machine[0],
            "instance_type": machine[1],
            "vcpus": f"{_number(offers[0], 'vCPUs', source):g}",
            "gpus": f"{_number(offers[0], 'AcceleratorCount', source) if gpu else 0:g}",
            "gpu": gpu,
            "usd_per_hour": repr(round(price, 6)),
            "spot_usd_per_hour": "" if spot is None else f"{spot:.3f}",
        }
    return found


def _usable(line: Row, without_gpus: set[str]) -> bool:
    """Whether the launcher files' image and the pinned torch run on it."""
    gpu = line["AcceleratorName"]
    if line["Arch"] != "x86_64":
        return False
    if not gpu:
        return line["InstanceType"] in without_gpus
    return "'Manufacturer': 'NVIDIA'" in line["GpuInfo"] and gpu.split("-")[0] not in TOO_OLD


def _median(offers: Iterable[Row], column: str, source: str) -> float | None:
    """Over the zones that have a price."""
    prices = [_number(offer, column, source) for offer in offers if offer[column]]
    return statistics.median(prices) if prices else None


def _number(line: Row, column: str, source: str) -> float:
    try:
        number = float(line[column])
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(
            f"{source} tells {line[column]!r} as {column} of {line['InstanceType']}, "
            "where a number above 0 stands"
        )
    return number


def merged(before: Rows, found: Rows) -> tuple[Rows, list[str]]:
    """The new table, and what of it is older, for the catalog lacks it."""
    after, older = {}, []
    for machine in {**before, **found}:
        row = {**before.get(machine, {}), **found.get(machine, {})}
        if machine not in found:
            older.append(" ".join(machine))
        elif not row["spot_usd_per_hour"] and before.get(machine, row)["spot_usd_per_hour"]:
            row["spot_usd_per_hour"] = before[machine]["spot_usd_per_hour"]
            older.append(" ".join((*machine, "spot")))
        after[machine] = row
    return dict(sorted(after.items(), key=_place)), older


def _place(item: tuple[tuple[str, str], Row]) -> tuple[object, ...]:
    """Regions by name; in each GPUs first, then families, from small to large."""
    (region, name), row = item
    gpus = float(row["gpus"] or 0)
    return region, not gpus, name.split(".")[0], float(row["vcpus"] or 0), gpus, name


def changes(before: Rows, after: Rows, older: Iterable[str]) -> Iterable[str]:
    """What a person should know of, a line each."""
    for machine, row in after.items():
        for column, kind in (("usd_per_hour", ""), ("spot_usd_per_hour", " spot")):
            old, new = before.get(machine, {}).get(column), row[column]
            name = " ".join(machine) + kind
            if new and not old:
                yield f"added: {name}, {new} USD an hour"
            elif old and abs(float(new) / float(old) - 1) > MOVED:
                yield f"moved: {name}, {old} -> {new} USD an hour"
    for name in older:
        yield f"gone from the catalog, kept as it was: {name}"


def as_of(source: str, older: Iterable[str]) -> str:
    """The comment that tells the table's date."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    kept = ", ".join(older)
    return f"{AS_OF}{day}: {source}" + (f"; older, for it lacks them: {kept}" if kept else "")


def write(path: Path, comments: Iterable[str], rows: Mapping[tuple[str, str], Row]) -> None:
    """All of it, or nothing."""
    text = io.StringIO()
    text.writelines(f"{line}\n" for line in comments)
    columns = list(next(iter(rows.values())))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows.values())
    new = path.with_suffix(".new")
    new.write_text(text.getvalue(), encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    main()
