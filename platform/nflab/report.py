"""What all recorded runs say, from MLflow alone: tables, sentences and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nflab.ablations import augmentation, clipping, layers
from nflab.ablations.findings import Findings, groups
from nflab.archive import Archive
from nflab.config import Config, ConfigError, flat
from nflab.document import Section, to_html, to_markdown
from nflab.figures import draw_top1

TITLE = "nflab: what the recorded runs say"

SHOWN = ("clipping", "batch_size", "augmentation_level", "seed", "val_top1", "test_top1", "outcome")
"""Columns of a sweep's trials."""


@dataclass(frozen=True)
class _Kind:
    """An experiment whose cells answer a question."""

    question: str
    varied: Sequence[str]
    paper: str
    analyse: Callable[[pd.DataFrame, str], Findings]


def _layers(rows: pd.DataFrame, title: str) -> Findings:
    named = {part for text in rows.unclipped for part in text.split() if part != "none"}
    stages = sorted({"stage1"} | {part for part in named if part.startswith("stage")})
    return layers.analyse(rows, ("stem", *stages, "head"), title)


KINDS = {
    "clipping_vs_batch_size": _Kind(
        "How does clipping carry networks to large batches?",
        clipping.VARIED,
        clipping.PAPER,
        clipping.analyse,
    ),
    "agc_layers": _Kind("Which layers to clip?", layers.VARIED, layers.PAPER, _layers),
    "augmentation": _Kind(
        "What does augmentation give?",
        augmentation.VARIED,
        augmentation.PAPER,
        augmentation.analyse,
    ),
}


def write_report(uri: str, folder: Path) -> list[Path]:
    """Writes `report.md`, `report.html`, `figures/` and `tables/` (Parquet) into `folder`.

    Returns:
        the two documents.

    Raises:
        ConfigError: the store cannot be opened, or has nothing of nflab in it.
    """
    archive = Archive(uri)
    sections = [Section(TITLE, level=1)]
    overview = []
    for experiment in archive.experiments():
        rows = archive.rows(experiment)
        if not len(rows):
            continue
        overview.append(_counts(experiment, rows))
        cells = rows[rows.cell.notna()]
        if experiment in KINDS and len(cells):
            sections += _ablation(experiment, KINDS[experiment], cells, folder)
        for parent, trials in rows[rows.trial.notna()].groupby("parent", sort=False):
            name = rows.set_index("run_id").name.get(parent, parent)
            sections.append(_sweep(experiment, str(name), trials, folder))
    if not overview:
        raise ConfigError(f"there are no runs of nflab in {uri}: train something first")
    table = pd.DataFrame(overview).fillna(0)
    sections.insert(1, Section("What was run", tables={"Runs by outcome": _saved(table, "runs", folder)}))
    written = {"report.md": to_markdown(sections, folder), "report.html": to_html(sections, TITLE)}
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in written]


def _counts(experiment: str, rows: pd.DataFrame) -> dict[str, Any]:
    of_outcomes = rows[rows.cell.notna() | rows.trial.notna() | rows.parent.isna()].outcome
    return {"experiment": experiment, **of_outcomes.value_counts().to_dict()}


def _ablation(experiment: str, kind: _Kind, cells: pd.DataFrame, folder: Path) -> list[Section]:
    sections = [Section(kind.question, paper=kind.paper)]
    for number, (common, rows) in enumerate(groups(cells, kind.varied), 1):
        if len(rows) < 2:
            continue
        model, dataset, epochs = (common[key] for key in ("model", "dataset", "epochs"))
        title = f"{model} on {Path(dataset).name}, {epochs} epochs"
        found = kind.analyse(rows, title)
        name = experiment if number == 1 else f"{experiment}-{number}"
        figures = []
        for drawn, draw in found.drawings.items():
            figures.append(folder / "figures" / f"{name}-{drawn}.png")
            draw(figures[-1])
        differs = _settings(common)
        sections.append(
            Section(
                f"{title} ({len(rows)} runs)",
                level=3,
                text=[*found.text, f"Settings in common: {differs}"],
                figures=figures,
                tables={
                    "Mean over seeds (95 % interval); diverged runs count as 0 %": _saved(
                        found.table, name, folder
                    )
                },
            )
        )
    return sections


def _settings(common: dict[str, str]) -> str:
    """What a group of cells has in common, where that is not the default."""
    defaults = {key: str(value) for key, value in flat(Config()).items()}
    said = [f"{k} {v}" for k, v in common.items() if v != defaults.get(k) and v != "none"]
    return ", ".join(said)


def _sweep(experiment: str, name: str, trials: pd.DataFrame, folder: Path) -> Section:
    for metric in ("val_top1", "test_top1"):
        if metric not in trials:
            trials[metric] = float("nan")
    done = (trials.outcome == "finished").rename("done")
    trials = trials.assign(done=done).sort_values(["done", "val_top1"], ascending=False)
    figure = folder / "figures" / f"{experiment}-{name}.png"
    draw_top1(trials, figure, f"Validation top-1: {name}")
    best = trials.iloc[0]
    text = []
    if best.outcome == "finished":
        text.append(
            f"best on validation: clipping {best.clipping}, batch {best.batch_size}, augmentation "
            f"level {best.augmentation_level}: {best.val_top1:.2f} %, test {best.test_top1:.2f} % "
            "(one seed; the finals say whether that was luck)"
        )
    shown = trials[[column for column in SHOWN if column in trials]]
    caption = f"{len(trials)} trials, the best first"
    tables = {caption: _saved(shown.reset_index(drop=True), f"{experiment}-{name}", folder)}
    return Section(f"Sweep {name}", text=text, figures=[figure], tables=tables)


def _saved(table: pd.DataFrame, name: str, folder: Path) -> pd.DataFrame:
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "tables" / f"{name}.parquet")
    return table
