"""What a person reads in MLflow: descriptions of experiments and runs, as Markdown."""

import json
import zlib
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from nflab.analysis.statistics import Importance
from nflab.data import load_dataset
from nflab.settings.config import Config, ScaleConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat
from nflab.settings.objectives import OBJECTIVES
from nflab.settings.recipes import recipe_of, sourced
from nflab.settings.search_space import Scale
from nflab.settings.studies import SweepConfig

QUESTIONS = {
    "train": "How well does one configuration train?",
    "finetune": "How well do pre-trained weights do on another dataset?",
    "evaluate": "How accurate are pre-trained weights on a dataset's test split?",
    "replay": "Does a recorded run come out the same again?",
    "agc_sweep": "Which clipping, batch size and strength of augmentation train best?",
    "sweep": "Which values of what is searched train best?",
    "learning_rate": "Does a network without clipping survive with a smaller learning rate?",
    "clipping_vs_batch_size": "How does clipping carry networks without normalisation to large "
    "batches?",
    "agc_layers": "Which layers does adaptive gradient clipping have to clip?",
    "augmentation": "What does augmentation give networks without normalisation, and how much of "
    "it do they stand?",
    "transfer": "What does pre-training give a network without normalisation, and its "
    "batch-normalised twin?",
}
"""What each MLflow experiment asks."""

COLUMNS = {
    "tags": {"outcome": 80},
    "metrics": {"epoch": 60, "val_top1": 90, "test_top1": 90},
    "params": {
        "kind": 70,
        "parent": 110,
        "trial": 60,
        "cell": 150,
        "seed": 60,
        "clipping": 90,
        "batch_size": 90,
        "augmentation_level": 140,
        "unclipped": 150,
        "model": 170,
    },
    "attributes": {"Dataset": 200, "Models": 100},
}
"""Kind -> column -> its pixels, of the view in which MLflow lists the runs of an experiment."""

OVER_SEEDS = ("val_top1_mean", "val_top1_sd", "test_top1_mean", "test_top1_sd", "test_top1_count")
"""Metrics of parents of seeds, whose columns are the last."""

_NAME = {"attributes.`Run Name`": 470}

VIEW = "nflab"
"""Key of that view."""

VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Tag of an experiment that holds it."""

LISTED = 8
"""Values of a setting that are listed; of more their number is told."""

_ELSEWHERE = ("seed", "name", "tracking_uri", "storage", "recipe", "diagnostics", "profile")


_WIDTH = 120
"""Pixels of a column beyond COLUMNS."""


def experiment_tags(
    experiment: str, experiment_id: str, searched: Sequence[str] = (), aims: Sequence[str] = ()
) -> dict[str, str]:
    """What describes an experiment in MLflow: its question, and a view of its runs in columns.

    Args:
        searched: settings that have columns too.
        aims: metrics that do.
    """
    view = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    said = QUESTIONS.get(experiment, "")
    note = f"{said} [All runs with their settings and results]({view}&viewStateShareKey={VIEW})"
    more = {f"params.`{name}`": _WIDTH for name in searched if name not in COLUMNS["params"]}
    told = (name for name in (*aims, *OVER_SEEDS) if name not in COLUMNS["metrics"])
    more |= {f"metrics.`{name}`": _WIDTH for name in told}
    columns = {
        f"{kind}.`{name}`": width
        for kind, names in COLUMNS.items()
        for name, width in names.items()
    } | more
    widths = _NAME | columns
    state = {
        "selectedColumns": list(columns),
        "columnOrder": list(widths),
        "columnWidths": widths,
    }
    # As MLflow's page itself saves a view.
    packed = b64encode(zlib.compress(json.dumps(state).encode())).decode()
    saved = {"name": "All runs", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return {
        "mlflow.note.content": note.strip(),
        "mlflow.experimentKind": "custom_model_development",
        VIEW_TAG: json.dumps(saved),
    }


def sweep_note(
    experiment: str,
    run_id: str,
    config: SweepConfig,
    scales: Mapping[str, Scale],
    trials: pd.DataFrame,
    shares: Mapping[str, Importance],
    judged: pd.DataFrame,
    more: Sequence[str],
    figures: Iterable[str],
) -> str:
    """What a sweep asked and found.

    Args:
        experiment: MLflow's, as which the sweep was recorded.
        run_id: of the sweep.
        scales: what was searched.
        trials: a row each, the best first (see `Tracker.trials`).
        shares: how much each searched setting mattered.
        judged: the trials that these rest on.
        more: what repeating the best over fresh seeds says, and what all cost, in sentences.
        figures: names of its figures among its artifacts.
    """
    searched = [f"{_words(key)} ({scale})" for key, scale in scales.items()]
    of = _of(config, "several models" if "model" in scales else None)
    cut = ", which end early where others do better" if config.search.pruner != "none" else ""
    asked = (
        f"{config.search.trials} trials {of}{cut}; "
        f"searched: {'; '.join(searched) or 'nothing but the seed'}."
    )
    best = trials.iloc[0]
    found = [
        f"Best on validation, of those that finished: **{best['name']}** with validation top-1 "
        f"**{best.val_top1:.2f} %** and test top-1 **{best.test_top1:.2f} %**."
        if best.outcome == "finished"
        else "No trial finished.",
        _counts("Trials", trials),
        *_front(config, scales, trials),
    ]
    if shares:
        told = ", ".join(
            f"{_words(name)} {i.share:.0%} ({i.low:.0%} to {i.high:.0%})"
            for name, i in shares.items()
        )
        kinds = _counts(f"It rests on {len(judged)} trials", judged)
        found.append(
            f"What mattered, as share of the variance in validation top-1 with its 80 % interval: "
            f"{told}. {kinds}"
        )
    else:
        found.append("Too few different results to say which setting mattered.")
    return _note(config, experiment, asked, [*found, *more], run_id, figures)


def _front(config: SweepConfig, scales: Mapping[str, Scale], trials: pd.DataFrame) -> list[str]:
    """The trials that no other beats, as a table; nothing of one aim."""
    objectives = config.search.objectives
    if len(objectives) == 1:
        return []
    front = trials[trials.front]
    head = ["trial", *map(_words, scales), *(OBJECTIVES[name].words for name in objectives)]
    lines = [head, ["---"] * len(head)] + [
        [
            str(row.number),
            *(str(row[name]) for name in scales),
            *(f"{row[name]:.5g}" for name in objectives),
        ]
        for _, row in front.iterrows()
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = f"The front: {len(front)} trials, of which none is better in one aim and as good in the "
    return [f"{said}others.\n\n{table}\n"]


def grid_note(
    experiment: str,
    run_id: str,
    config: Config,
    cells: pd.DataFrame,
    found: Sequence[str],
    figures: Iterable[str],
) -> str:
    """What a grid asked and found.

    Args:
        cells: a row each (see `Grid.run`).
        found: the answer, in sentences.
    """
    unvaried = {*_ELSEWHERE, *(field.name for field in fields(ScaleConfig))}
    varied = {
        name: cells[name].dropna().unique()
        for name in flat(Config())
        if name in cells and name not in unvaried and cells[name].nunique() > 1
    }
    compared = [f"{_words(name)} ({_listed(values)})" for name, values in varied.items()]
    seeds = cells.seed.nunique() if "seed" in cells else 0
    asked = (
        f"{len(cells)} cells {_of(config)}, {seeds} seed{'s' * (seeds != 1)}; "
        f"compared: {'; '.join(compared) or 'nothing but seeds'}."
    )
    return _note(config, experiment, asked, [*found, _counts("Cells", cells)], run_id, figures)


def recipe_note(config: Config) -> list[str]:
    """Where the numbers of a recipe of one's own come from, in a paragraph; none of ours."""
    path, _, digest = config.run.recipe.partition("#")
    if not digest:
        return []
    try:
        told = sourced(config)
    except ConfigError:  # a training that goes on where the file is not
        return [f"**Recipe:** {Path(path).name} ({digest}), kept among the artifacts."]
    named = recipe_of(config.run.recipe).settings
    numbers = [
        f"- {_words(name)} {as_text(value)}: {source}"
        for name, (value, source) in told.items()
        if name in named and name != "recipe"
    ]
    return ["\n".join([f"**Recipe:** {Path(path).name} ({digest})", "", *numbers])]


def _note(
    config: Config,
    experiment: str,
    asked: str,
    found: Iterable[str],
    run_id: str,
    figures: Iterable[str],
) -> str:
    lines = [f"**Asked:** {QUESTIONS.get(experiment, '')} {asked}", "**Found:**"]
    lines.append("\n".join(f"- {sentence}" for sentence in found))
    lines += recipe_note(config)
    lines += [
        # Of the server that shows the page.
        f"![{name}](get-artifact?path={quote(name)}&run_uuid={run_id})"
        for name in figures
    ]
    return "\n\n".join(lines)


def _of(config: Config, model: str | None = None) -> str:
    size, part = load_dataset(config).sizes["train"], config.data.subset
    of = "" if part == 1 else f", subset {part:g}"
    return (
        f"of {model or config.model.model} on {config.data.dataset} ({size} training images{of}), "
        f"{config.schedule.epochs} epoch{'s' * (config.schedule.epochs != 1)}"
    )


def _counts(word: str, rows: pd.DataFrame) -> str:
    counts = rows.outcome.value_counts()
    return f"{word}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items()) or 'none'}."


def _listed(values: Sequence[Any]) -> str:
    if len(values) > LISTED:
        return f"{len(values)} values"
    return ", ".join(str(value).rsplit("/", 1)[-1] or "none" for value in values)


def _words(name: str) -> str:
    return name.replace("_", " ")
