"""What a grid or a search would run, how long that would take, and what it would cost."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from nflab.cluster import connection
from nflab.cluster.placement import Placement
from nflab.data import load_dataset
from nflab.learning.pace import seconds_per_epoch
from nflab.recording.archive import Archive
from nflab.running.budget import Budget
from nflab.searching.trial_ledger import first_rung
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.outcomes import DONE
from nflab.settings.recipes import batch_sizes_of, lookahead, scales_of
from nflab.settings.studies import SweepConfig, needs_prices
from nflab.terminal.wording import console, describe, duration, money, money_range

MANY = 8
"""Batch sizes whose pace is told one by one; of more the smallest's and the largest's."""

LEFT_OUT = "(training alone, without the start of processes)"


def show_plan(
    settings: Sequence[dict[str, Any]],
    configs: Sequence[Config],
    outcomes: Sequence[str],
    known: pd.DataFrame,
    placement: Placement,
    budget: Budget,
    finals: int = 0,
) -> None:
    """Prints every cell with what is known of it, and what the rest would take in time and money.

    Args:
        settings: for each cell what distinguishes it.
        configs: for each cell all of it.
        outcomes: for each cell how it ended, or "missing".
        known: rows of past cells (see `Archive.rows`), for their times.
        budget: what the grid may cost, with what it has cost before.
        finals: how many trainings follow, at most, each with the settings of one of these cells.
    """
    times = _Times(known, placement)
    table = Table(box=None, pad_edge=False)
    for column in ("cell", "settings", "state", "time"):
        table.add_column(column, justify="right" if column == "time" else "left")
    total, unknown, count = 0.0, 0, 0
    lengths = [
        times.of(config) if finals or outcome not in DONE else None
        for config, outcome in zip(configs, outcomes, strict=True)
    ]
    for number, (one, seconds, outcome) in enumerate(
        zip(settings, lengths, outcomes, strict=True), 1
    ):
        told = "" if outcome in DONE else "unknown"
        if outcome not in DONE:
            count += 1
            if seconds is None:
                unknown += 1
            else:
                total += seconds
                told = f"{seconds:.0f} s"
        state = "to run" if outcome == "missing" else outcome
        table.add_row(str(number), describe(one), state, told)
    out = console()
    out.print(table)
    rest = f", and {unknown} of unknown length" if unknown else ""
    out.print(
        f"{count} of {len(settings)} cells would run, {placement}: about "
        f"{_wall(total, placement)}{_priced(total, total, placement)}{rest} {LEFT_OUT}",
        markup=False,
    )
    _, most = _show_finals(finals, lengths, placement)
    # Some finals may have a result.
    _warn(total, total + most, placement, budget)


def how_long(configs: Sequence[Config], known: pd.DataFrame, placement: Placement) -> str:
    """In words, how long trainings take side by side; empty where that is not known.

    Args:
        configs: what is to be trained.
        known: as for `show_plan`.
    """
    times = _Times(known, placement)
    lengths = [times.of(config) for config in configs]
    total = sum(length for length in lengths if length is not None)
    return f"about {_wall(total, placement)} {LEFT_OUT}" if total and None not in lengths else ""


def show_sweep(config: SweepConfig, experiment: str) -> None:
    """Prints what a search would take in time and money, without running anything.

    Nobody knows how many trials would be cut, so there are two figures: for none, each with the
    batch size that takes longest, and for all that may be, at the first rung, with the quickest.

    Raises:
        ConfigError: the tracking store or the cluster cannot be used.
    """
    archive = Archive(locations.tracking_uri(config.run))
    known = pd.DataFrame()
    if experiment in archive.experiments():
        known = archive.rows(experiment)
    budget = Budget(config.search.max_cost)
    placement = connection.foresee(config.scale, needs_prices(config))
    sizes = batch_sizes_of(config)
    if len(sizes) > MANY:
        sizes = [sizes[0], sizes[-1]]
    model = scales_of(config).get("model")
    models = [config.model.model] if model is None else model.choices
    times = _Times(known, placement)
    base = locations.located(config.base())
    lengths = {
        (size, name): times.of(replace(base, batch_size=size, model=name))
        for name in models
        for size in sizes
    }
    trials, epochs, rung = config.search.trials, config.schedule.epochs, first_rung(config)
    out = console()
    out.print(f"{trials} trials of {epochs} epochs would run, {placement}", markup=False)
    for (size, name), length in lengths.items():
        told = "unknown" if length is None else duration(length)
        of = "" if model is None else f" and model {name}"
        out.print(f"  a trial of batch size {size}{of}, if it is not cut: {told}", markup=False)
    found = [length for length in lengths.values() if length is not None]
    if len(found) < len(lengths):
        _show_finals(config.finals.trainings, list(lengths.values()), placement)
        out.print("How long all of it takes is unknown until some of it has run on such machines.")
        return
    # The first know of no other, so nothing cuts them.
    whole = trials if config.search.pruner == "none" else min(lookahead(config), trials)
    early = trials - whole
    low = (whole + early * rung / epochs) * min(found)
    high = trials * max(found)
    for word, seconds, when in (
        ("at most", high, "if no trial is cut"),
        (
            "at least",
            low,
            f"if all but the first {whole} are cut as early as may be, after {rung} epochs",
        ),
    ):
        wall = _wall(seconds, placement)
        priced = _priced(seconds, seconds, placement)
        out.print(f"{word} about {wall}{priced}, {when} {LEFT_OUT}", markup=False)
    least, most = _show_finals(config.finals.trainings, found, placement)
    _warn(low + least, high + most, placement, budget)


def _show_finals(
    count: int, lengths: Sequence[float | None], placement: Placement
) -> tuple[float, float]:
    """Prints what finals would take, if there are any.

    Args:
        lengths: seconds of the trainings whose settings may be theirs; None where unknown.

    Returns:
        Seconds of all finals, at least and at most, as far as they are known.
    """
    if not count:
        return 0.0, 0.0
    known = [length for length in lengths if length is not None] or [0.0]
    low, high = count * min(known), count * max(known)
    told = ""
    if None not in lengths:
        least, most = _wall(low, placement), _wall(high, placement)
        wall = least if least == most else f"{least} to {most}"
        told = f": about {wall}{_priced(low, high, placement)} {LEFT_OUT}"
    told = f"and then {count} trainings of finals, for settings not known yet{told}"
    console().print(told, markup=False)
    return low, high


def _wall(seconds: float, placement: Placement) -> str:
    """How long runs of so many seconds take side by side."""
    return duration(seconds / max(1, placement.max_concurrent))


def _usd(low: float, high: float, placement: Placement) -> tuple[float, float] | None:
    """What runs of `low` to `high` seconds cost, at least and at most; None without prices."""
    if placement.price_range is None:
        return None
    cheap, dear = (price * placement.num_workers / 3600 for price in placement.price_range)
    return low * cheap, high * dear


def _priced(low: float, high: float, placement: Placement) -> str:
    usd = _usd(low, high, placement)
    return "" if usd is None else f" and {money_range(*usd)}"


def _warn(low: float, high: float, placement: Placement, budget: Budget) -> None:
    """Says so if a plan is over its budget, or may be."""
    usd = _usd(low, high, placement)
    if usd is None or budget.limit is None:
        return
    least, most = (budget.spent + amount for amount in usd)
    if most >= budget.limit:
        word = "is" if least >= budget.limit else "may be"
        before = f", with the {money(budget.spent)} spent before" if budget.spent else ""
        console().print(
            f"This {word} over the budget of {money(budget.limit)}{before}: it would stop there.",
            markup=False,
        )


class _Times:
    """Seconds that a training takes: as others of its size took on such machines, else, on a CPU,
    as an epoch of it takes here."""

    def __init__(self, known: pd.DataFrame, placement: Placement) -> None:
        self._on_gpus = placement.gpus_per_worker > 0
        self._per_epoch: dict[tuple[str, str, float, int], float | None] = {}
        if {"seconds", "epoch", "placement", "machines"} <= set(known.columns):
            told = known[(known.epoch > 0) & (known.seconds > 0)]
            told = told[told.placement.str.contains("GPU each") == self._on_gpus]
            least, most = placement.min_workers, placement.num_workers
            asked = str(most) if least is None else f"{least}:{most}"
            told = told[told.num_workers == asked]
            told = told[told.machines.fillna("") == placement.machines]
            told = told.assign(pace=told.seconds / told.epoch)
            told["subset"] = told["subset"].fillna("1.0") if "subset" in told else "1.0"
            for key, group in told.groupby(["model", "dataset", "subset", "batch_size"]):
                model, dataset, subset, batch_size = key
                pace = float(group.pace.median())
                self._per_epoch[model, dataset, float(subset), int(batch_size)] = pace

    def of(self, config: Config) -> float | None:
        """Of the whole training; None if it cannot be told without reading files, or a GPU."""
        data = config.data
        key = (config.model.model, data.dataset, data.subset, config.optimizer.batch_size)
        if key not in self._per_epoch:
            here = load_dataset(config).in_memory and not self._on_gpus
            self._per_epoch[key] = seconds_per_epoch(config) if here else None
        per_epoch = self._per_epoch[key]
        return None if per_epoch is None else per_epoch * config.schedule.epochs
