"""What one sweep says: what it searched, its best trial, and with what another would begin."""

from pathlib import Path
from typing import Any

import pandas as pd

from nflab.analysis.figures import draw_front, draw_slices, draw_top1
from nflab.analysis.findings import software
from nflab.analysis.ranking import on_front, ranked
from nflab.recording.archive import Archive
from nflab.reporting.document import Section, save_table
from nflab.settings.config import Config
from nflab.settings.leaves import flat
from nflab.settings.objectives import DEFAULT, OBJECTIVES
from nflab.settings.recipes import scales_of
from nflab.settings.serialization import from_json
from nflab.settings.studies import SweepConfig

USUAL = ("clipping", "batch_size", "augmentation_level")
"""What recipes search, and what the first sweeps did, which do not say so."""

RESULTS = ("seed", "val_top1", "test_top1", "outcome")
"""Columns of a sweep's trials beside what was searched."""


def sweep_section(
    archive: Archive, file: str, parent: Any, rows: pd.DataFrame, folder: Path
) -> Section:
    """A section of the report.

    Args:
        file: how its figure and its table are called.
        parent: the sweep's row (see `Archive.rows`).
        rows: its trials', a row each, one at least.
    """
    config = _config(archive, parent.run_id)
    scales = {} if config is None else scales_of(config)
    objectives = DEFAULT if config is None else config.search.objectives
    for metric in (*objectives, "test_top1"):
        if metric not in rows:
            rows = rows.assign(**{metric: float("nan")})
    rows = rows.assign(number=rows.trial.astype(int))
    rows = rows.assign(front=on_front(rows, "number", objectives))
    trials = ranked(rows, "number", objectives)
    searched = list(scales) or _named(parent) or [name for name in USUAL if name in trials]
    figure, title = folder / "figures" / f"{file}.png", f"Validation top-1: {parent.name}"
    if len(objectives) > 1:
        draw_front(trials, objectives, figure, f"Front: {parent.name}")
    elif set(searched) <= set(USUAL):
        draw_top1(trials, figure, title)
    elif scales:
        draw_slices(trials, scales, figure, title)
    text = [f"searched: {'; '.join(f'{_word(name)} {scale}' for name, scale in scales.items())}"]
    text = [*text * bool(scales), *_best(trials.iloc[0], searched, parent.name), *software(trials)]
    first = f"{len(trials)} trials, the best first"
    columns = [*searched, *RESULTS]
    if len(objectives) > 1:
        told = ", ".join(
            f"{OBJECTIVES[name].words} ({OBJECTIVES[name].direction}d)" for name in objectives
        )
        text.append(f"aims: {told}; the front has {trials.front.sum()} of the trials that finished")
        first += f": the first {trials.front.sum()} are the front"
        columns += objectives[1:]
    shown = trials[[c for c in columns if c in trials]].reset_index(drop=True)
    tables = {first: save_table(shown, file, folder)}
    drawn = [figure] if figure.exists() else []
    return Section(f"Sweep {parent.name}", text=text, figures=drawn, tables=tables)


def _named(parent: Any) -> list[str]:
    """What a sweep says that it searched, where its ranges cannot be read any more."""
    told = {name: getattr(parent, name, None) for name in flat(Config())}
    return [name for name, text in told.items() if str(text).startswith("searched: ")]


def _best(best: Any, searched: list[str], name: str) -> list[str]:
    """In words; nothing if no trial has a result."""
    if best.outcome != "finished":
        return []
    settings = {key: str(best[key]) for key in searched}
    told = ", ".join(f"{_word(key)} {_short(value)}" for key, value in settings.items())
    begin = ",".join(f"{key}={value}" for key, value in settings.items())
    return [
        f"best on validation: {told}: {best.val_top1:.2f} %, test {best.test_top1:.2f} % (one "
        "seed; finals tell whether that was luck)",
        f"another sweep begins with it by `--try {begin}`, or with all results by `--from {name}`",
    ]


def _config(archive: Archive, run_id: str) -> SweepConfig | None:
    """A sweep's configuration; None if it does not say what it searched."""
    with archive.artifact(run_id, "config.json") as file:
        if file is None:
            return None
        try:
            config = from_json(SweepConfig, file.read_text(encoding="utf-8"))
            scales_of(config)
            return config
        except ValueError:  # of an nflab that knew other settings, or a recipe that has changed
            return None


def _word(name: str) -> str:
    return "batch" if name == "batch_size" else name.replace("_", " ")


def _short(value: str) -> str:
    """A setting's text in a few digits."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value
