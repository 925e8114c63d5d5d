"""What all recorded runs say, from MLflow alone: tables, sentences and figures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nflab.analysis import augmentation, clipping, layers, learning_rate
from nflab.analysis.finalists import RECORD, judge
from nflab.analysis.findings import Findings, groups, software
from nflab.recording.archive import Archive
from nflab.recording.tables import one_each
from nflab.reporting.document import Section, save_table, to_html, to_markdown
from nflab.reporting.sweeps import sweep_section
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat
from nflab.settings.outcomes import DONE

TITLE = "nflab: what the recorded runs say"

CELLS = "cells.parquet"
"""Table of all cells of the ablations."""

_PLACES = {"name", "tracking_uri", "storage"}

_TOLD = ("placement", "machines", "driver", "gpu")
"""By tags: of `placement` not what was asked for, but what came of it."""

KEPT = (
    *("experiment", "cell", "outcome", "val_top1", "test_top1", "val_top5", "test_top5"),
    *("train_loss", "epoch", "seconds"),
    *(name for name in flat(Config()) if name not in {*_PLACES, *_TOLD}),
    *("dataset_fingerprint", "git_commit", "code_fingerprint", "torch"),
    *_TOLD,
)
"""Columns of that table, none of which is a path: how a cell ended, its settings, and what it was
computed with; `driver` is the machine that asked for it, and trained it where no cluster did."""


@dataclass(frozen=True)
class _Kind:
    """An experiment whose cells answer a question."""

    question: str
    varied: Sequence[str]
    paper: str
    analyse: Callable[[pd.DataFrame, str], Findings]


KINDS = {
    "clipping_vs_batch_size": _Kind(
        "How does clipping carry networks to large batches?",
        clipping.VARIED,
        clipping.PAPER,
        clipping.analyse,
    ),
    "learning_rate": _Kind(
        "Does a network without clipping survive with a smaller learning rate?",
        learning_rate.VARIED,
        learning_rate.PAPER,
        learning_rate.analyse,
    ),
    "agc_layers": _Kind("Which layers to clip?", layers.VARIED, layers.PAPER, layers.analyse),
    "augmentation": _Kind(
        "What does augmentation give?",
        augmentation.VARIED,
        augmentation.PAPER,
        augmentation.analyse,
    ),
}


def write_report(uri: str, folder: Path) -> list[Path]:
    """Writes `report.md`, `report.html`, `figures/`, `tables/` and `cells.parquet` into `folder`.

    Args:
        uri: MLflow store or server.

    Returns:
        the two documents.

    Raises:
        ConfigError: the store cannot be opened, or has nothing of nflab in it.
    """
    _make(folder)
    archive = Archive(uri)
    runs = {name: archive.rows(name) for name in archive.experiments()}
    runs = {name: rows for name, rows in runs.items() if len(rows)}
    if not runs:
        raise ConfigError(f"there are no runs of nflab in {uri}: train something first")
    overview = pd.DataFrame(_counts(name, rows) for name, rows in runs.items()).fillna(0)
    counts = overview.columns.drop("experiment")
    overview[counts] = overview[counts].astype(int)
    sections = [
        Section(TITLE, level=1, text=[f"MLflow: {uri}"]),
        Section("What was run", tables={"Runs by outcome": save_table(overview, "runs", folder)}),
    ]
    kept = []
    for experiment, rows in runs.items():
        cells = one_each(rows[rows.cell.notna()])
        parents = rows[rows.parent.isna() & rows.run_id.isin(rows.parent)]
        named = dict(cells[["earlier_cell", "cell"]].dropna().itertuples(index=False))
        records = {run_id: _finals(archive, run_id, named) for run_id in parents.run_id}
        finals = {id for entrants in records.values() for ids in entrants.values() for id in ids}
        # What repeats a winner is no cell of the ablation, nor is what has only begun.
        asked = cells[~cells.cell.isin(finals)]
        asked = asked[asked.model.notna()] if "model" in asked else asked[:0]
        if experiment in KINDS and len(asked):
            sections += _ablation(experiment, KINDS[experiment], asked, folder)
            kept.append(asked.assign(experiment=experiment))
        for parent in parents.itertuples():
            trials = rows[(rows.parent == parent.run_id) & rows.trial.notna()]
            if len(trials):
                file = f"{experiment}-{parent.name}"
                sections.append(sweep_section(archive, file, parent, trials, folder))
            entrants = records[parent.run_id]
            if entrants and len(cells):
                name = f"{experiment}-{parent.name}-finals"
                text = ["Over fresh seeds, none of which had a part in choosing the finalists."]
                of_finals = [id for ids in entrants.values() for id in ids]
                text += software(cells[cells.cell.isin(of_finals)])
                found = judge(entrants, cells)
                title = f"Finals of {parent.name}"
                sections.append(_section(title, found, name, folder, text, level=3))
    if kept:
        rows = pd.concat(kept, ignore_index=True)
        rows[[column for column in KEPT if column in rows]].to_parquet(folder / CELLS, index=False)
    return _write(sections, folder)


def write_report_from(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Draws the ablations again from the `cells.parquet` of earlier reports.

    Args:
        sources: folders of those reports; of a cell that several have the last one's counts.

    Returns:
        likewise.

    Raises:
        ConfigError: there is no such table, or it is damaged.
    """
    found = pd.concat([read_cells(source) for source in sources], ignore_index=True)
    # A result stands until there is another.
    found = found.sort_values("outcome", key=lambda told: told.isin(DONE), kind="stable")
    cells = found.drop_duplicates(["experiment", "cell"], keep="last").sort_index()
    _make(folder)
    cells.to_parquet(folder / CELLS, index=False)
    sections = [Section(TITLE, level=1, text=[f"{len(cells)} cells, from {CELLS}"])]
    for experiment, rows in cells.groupby("experiment", sort=False):
        sections += _ablation(str(experiment), KINDS[str(experiment)], rows, folder)
    return _write(sections, folder)


def read_cells(source: Path) -> pd.DataFrame:
    """The table of cells in the folder of a report.

    Returns:
        a row for each cell, with the columns KEPT as far as they were recorded: its `experiment`,
        settings as text, how it ended, top-1 and top-5 in percent, `seconds`, and what it was
        computed with.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    file = source / CELLS
    if not file.is_file():
        raise ConfigError(f"there is no {CELLS} in {source}: give the folder of a report")
    try:
        cells = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    if missing := {"experiment", "model", "outcome"} - set(cells):
        raise ConfigError(f"{file} is no table of cells: it has no column {min(missing)!r}")
    return cells[cells.experiment.isin(list(KINDS))]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the report to {folder}: {error.strerror}") from None


def _write(sections: Sequence[Section], folder: Path) -> list[Path]:
    written = {"report.md": to_markdown(sections, folder), "report.html": to_html(sections, TITLE)}
    for name, document in written.items():
        (folder / name).write_text(document, encoding="utf-8")
    return [folder / name for name in written]


def _finals(archive: Archive, run_id: str, named: Mapping[str, str]) -> dict[str, list[str]]:
    """The cells of each entrant of a parent run's finals; empty if it has none.

    Args:
        named: what a cell was called earlier -> what it is called.
    """
    with archive.artifact(run_id, RECORD) as record:
        found = {} if record is None else json.loads(record.read_text(encoding="utf-8"))
    return {label: [named.get(id, id) for id in ids] for label, ids in found.items()}


def _counts(experiment: str, rows: pd.DataFrame) -> dict[str, Any]:
    counted = rows[~rows.run_id.isin(rows.parent)]
    return {"experiment": experiment, **counted.outcome.value_counts().to_dict()}


def _ablation(experiment: str, kind: _Kind, cells: pd.DataFrame, folder: Path) -> list[Section]:
    sections = [Section(kind.question, paper=kind.paper)]
    for number, (common, rows) in enumerate(groups(cells, kind.varied), 1):
        model, dataset, epochs = (common[key] for key in ("model", "dataset", "epochs"))
        told = [f"{model} on {Path(dataset).name}, {epochs} epochs"]
        told += [
            f"{name.replace('_', ' ')} {common[name]}"
            for name in ("batch_size", "clipping")
            if name in common
        ]
        title = ", ".join(told)
        name = experiment if number == 1 else f"{experiment}-{number}"
        found = kind.analyse(rows, title)
        text = [f"{len(rows)} runs; not nflab's defaults: {_settings(common)}"]
        text += software(rows)
        sections.append(_section(title, found, name, folder, text, level=3))
    return sections


def _section(
    title: str, found: Findings, name: str, folder: Path, text: Sequence[str], level: int
) -> Section:
    """What was found, under a heading, with its figures and its table as files called `name`."""
    figures = []
    for drawn, draw in found.drawings.items():
        figures.append(folder / "figures" / f"{name}-{drawn}.png")
        draw(figures[-1])
    caption = "Mean over seeds (95 % interval); a diverged run counts as 0 %"
    tables = {caption: save_table(found.table, name, folder)} if len(found.table) else {}
    return Section(title, level, [*found.text, *text], figures=figures, tables=tables)


def _settings(common: dict[str, str]) -> str:
    """What a group of cells has in common, where that is not the default."""
    defaults = {key: as_text(value) for key, value in flat(Config()).items()}
    said = [f"{key} {value}" for key, value in common.items() if value != defaults.get(key, value)]
    return ", ".join(said) or "none"
