"""What a grid would run, and how long that would take."""

import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from rich.table import Table

from nflab.cluster import Placement
from nflab.config import Config, replace
from nflab.data import load_dataset
from nflab.loop import train
from nflab.progress import console, describe
from nflab.tracking import DONE
from nflab.worker import Worker


def show_plan(
    settings: Sequence[dict[str, Any]],
    configs: Sequence[Config],
    outcomes: Sequence[str],
    known: pd.DataFrame,
    placement: Placement,
) -> None:
    """Prints every cell with what is known of it, and the time that the rest would take.

    Args:
        settings: for each cell what distinguishes it.
        configs: for each cell all of it.
        outcomes: for each cell how it ended, or "missing".
        known: rows of past cells (see `Tracker.cells`), for their times.
    """
    costs = _Costs(known)
    table = Table(box=None, pad_edge=False)
    for column in ("cell", "settings", "state", "time"):
        table.add_column(column, justify="right" if column == "time" else "left")
    total, unknown, count = 0.0, 0, 0
    for number, (one, config, outcome) in enumerate(
        zip(settings, configs, outcomes, strict=True), 1
    ):
        cost = "" if outcome in DONE else "unknown"
        if outcome not in DONE:
            count += 1
            seconds = costs.of(config)
            if seconds is None:
                unknown += 1
            else:
                total += seconds
                cost = f"{seconds:.0f} s"
        state = "to run" if outcome == "missing" else outcome
        table.add_row(str(number), describe(one), state, cost)
    out = console()
    out.print(table)
    minutes = total / 60 / max(1, placement.max_concurrent)
    rest = f", and {unknown} of unknown length" if unknown else ""
    out.print(
        f"{count} of {len(settings)} cells would run, {placement}: about {minutes:.1f} min{rest} "
        "(training alone, without the start of processes)"
    )


class _Costs:
    """Seconds that a training takes: as others of its size took, else as one epoch of it takes."""

    def __init__(self, known: pd.DataFrame) -> None:
        self._per_epoch: dict[tuple[str, str, int], float | None] = {}
        if {"seconds", "epoch"} <= set(known.columns):
            told = known[(known.epoch > 0) & (known.seconds > 0)]
            told = told.assign(cost=told.seconds / told.epoch)
            for key, group in told.groupby(["model", "dataset", "batch_size"]):
                model, dataset, batch_size = key
                self._per_epoch[model, dataset, int(batch_size)] = float(group.cost.median())

    def of(self, config: Config) -> float | None:
        """Of the whole training; None if it cannot be told without reading files."""
        key = (config.model.model, config.data.dataset, config.optimizer.batch_size)
        if key not in self._per_epoch:
            self._per_epoch[key] = _measure(config) if load_dataset(config).in_memory else None
        per_epoch = self._per_epoch[key]
        return None if per_epoch is None else per_epoch * config.schedule.epochs


def _measure(config: Config) -> float:
    """Seconds of one epoch, on one thread, as a worker has."""
    torch.set_num_threads(1)
    epochs: list[float] = []
    begun = time.monotonic()

    def report(metrics: dict[str, Any]) -> None:
        epochs.append(time.monotonic() - begun)

    train(replace(config, epochs=2, warmup_epochs=0.0), Worker(report=report))
    # The first epoch has the making of the network in it.
    return epochs[-1] - (epochs[0] if len(epochs) > 1 else 0.0)
