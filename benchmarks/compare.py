"""Ratios of two ways of doing the same work, taken in turns on one machine."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

Work = Callable[[], object]

Bound = Literal["least", "most"]


@dataclass(frozen=True)
class Row:
    """What one comparison found.

    Attributes:
        name: what was compared.
        peer: with what; of several, the fastest.
        ratio: median of the rounds' ratios.
        low, high: their quartiles.
        target: what the ratio is to be; None if it is only told.
        bound: whether the target is the least or the most.
        ours, theirs: medians of what was measured, in `unit`.
        machine: what it ran on.
    """

    name: str
    peer: str
    ratio: float
    low: float
    high: float
    target: float | None
    bound: Bound
    ours: float
    theirs: float
    unit: str
    machine: str

    @property
    def met(self) -> bool | None:
        """Whether the target is reached."""
        if self.target is None:
            return None
        enough = self.ratio >= self.target if self.bound == "least" else self.ratio <= self.target
        return bool(enough)


def compare(
    name: str,
    ours: Work,
    peers: Mapping[str, Work],
    target: float | None,
    bound: Bound,
    rounds: int = 9,
    warm_up: int = 2,
    device: str = "cpu",
) -> Row:
    """Seconds beside those of the fastest peer, in rounds of one turn each."""
    times = in_turns({"": ours, **peers}, rounds, warm_up, device)
    peer = min(peers, key=lambda one: statistics.median(times[one]))
    return of_rounds(name, peer, times[""], times[peer], target, bound)


def of_rounds(
    name: str,
    peer: str,
    ours: list[float],
    theirs: list[float],
    target: float | None,
    bound: Bound,
    unit: str = "s",
) -> Row:
    """A row from what each round measured.

    Args:
        bound: "least" says how many times faster ours is, "most" how many times as much it takes.
        unit: "s" for seconds; of anything else more is better.
    """
    pairs = list(zip(ours, theirs, strict=True))
    faster = unit == "s" and bound == "least"
    ratios = [b / a if faster else a / b for a, b in pairs]
    low, high = min(ratios), max(ratios)
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    found = statistics.median(ours), statistics.median(theirs)
    middle = statistics.median(ratios)
    return Row(name, peer, middle, low, high, target, bound, *found, unit, machine())


def in_turns(
    works: Mapping[str, Work], rounds: int, warm_up: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each work in each round; the works take turns, so that a machine that grows slow
    is slow for all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            gc.collect()
            _wait(device)
            begun = time.perf_counter()
            work()
            _wait(device)
            if number >= warm_up:
                times[name].append(time.perf_counter() - begun)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine() -> str:
    """The processor or GPU, its size, and the versions that matter."""
    if torch.cuda.is_available():
        what = torch.cuda.get_device_name()
    else:
        what = f"{len(os.sched_getaffinity(0))} cores, {_processor()}"
    return f"{what}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def arguments(
    description: str | None, model: str | None = None, batch_size: int = 0, image_size: int = 0
) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes, and of a model's step its defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if model is not None:
        parser.add_argument("--model", default=model)
    if batch_size:
        parser.add_argument("--batch-size", type=int, default=batch_size)
    if image_size:
        parser.add_argument("--image-size", type=int, default=image_size)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each way")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def as_json(rows: list[Row]) -> str:
    """Rows as they are kept."""
    return json.dumps([asdict(row) | {"met": row.met} for row in rows])


def show(rows: list[Row], in_json: bool) -> None:
    """Prints rows, as a table or as one line of JSON."""
    print(as_json(rows) if in_json else table([asdict(row) | {"met": row.met} for row in rows]))


def table(rows: list[dict[str, object]]) -> str:
    """Rows as they are kept, as a table in Markdown."""
    lines = ["| what | ours | peer | ratio | quartiles | target | met |", "|" + " --- |" * 7]
    for row in rows:
        sign = "at least" if row["bound"] == "least" else "at most"
        target = "" if row["target"] is None else f"{sign} {row['target']:g}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]  # type: ignore[index]
        ours, theirs = (_amount(float(row[key]), str(row["unit"])) for key in ("ours", "theirs"))  # type: ignore[arg-type]
        lines.append(
            f"| {row['name']} | {ours} | {theirs} ({row['peer']}) | {row['ratio']:.2f} | "
            f"{row['low']:.2f} to {row['high']:.2f} | {target} | {met} |"
        )
    return "\n".join(lines)


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s"
    return f"{value:.0f} {unit}"
