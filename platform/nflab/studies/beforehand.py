"""The results of earlier sweeps and grids that a search begins with, read from MLflow once."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import cast

import pandas as pd

from nflab.analysis.findings import as_computed
from nflab.data import load_dataset
from nflab.learning.computation import ELSEWHERE
from nflab.recording.archive import Archive
from nflab.searching.beforehand import Result
from nflab.settings import locations
from nflab.settings.canonical import is_read
from nflab.settings.config import Config, ScaleConfig
from nflab.settings.errors import ConfigError, require
from nflab.settings.leaves import as_text, flat, replace
from nflab.settings.outcomes import DONE, Outcome
from nflab.settings.recipes import scales_of
from nflab.settings.search_space import Scale, setting
from nflab.settings.studies import SweepConfig
from nflab.storage.files import read_text, write_text
from nflab.studies.life_cycle import LiveRun
from nflab.terminal.wording import say

FILE = "beforehand.json"
"""File in a sweep's folder with what it began with, whatever is recorded later."""

_APART = {*ELSEWHERE, "seed", "dataset", *(field.name for field in fields(ScaleConfig))}
"""Settings in which results that are comparable may differ; a dataset is known by its contents."""


def find_results(config: SweepConfig) -> list[Result]:
    """What MLflow holds now of the sweeps and grids that a new sweep is to begin with.

    Raises:
        ConfigError: a name is that of no sweep or grid, or nothing of it fits the search; or the
            store cannot be opened.
    """
    if not config.search.earlier:
        return []
    require(
        config.model.pretrained is None,
        "--from takes no results of pre-trained weights: MLflow knows these by a path, and what "
        "stands there may have changed",
    )
    return _found(config, Archive(locations.tracking_uri(config.run)))


def results_before(run: LiveRun[SweepConfig], found: list[Result] | None) -> list[Result]:
    """What a sweep begins with, as it was when the sweep began.

    Args:
        found: what `find_results` said of a new sweep.

    Raises:
        ConfigError: as `find_results` does; or the sweep has trials, and what it began with is
            gone.
    """
    config = run.config
    if not config.search.earlier:
        return []
    file = f"{run.session.folder}/{FILE}"
    known = read_text(file)
    if known is None:
        require(
            len(run.outbox.read(lambda: run.tracker.trials(run.run_id))) == 0,
            f"{file} is not there, which says what the search began with: put it back, or start "
            "anew under another --name",
        )
        found = find_results(config) if found is None else found
        write_text(file, json.dumps([asdict(result) for result in found], indent=0))
        return found
    return [Result(**one) for one in json.loads(known)]


def _found(config: SweepConfig, archive: Archive) -> list[Result]:
    rows = {name: archive.rows(name) for name in archive.experiments()}
    results = []
    for name in dict.fromkeys(config.search.earlier):
        below = [
            of[of.parent.isin(of.run_id[(of.name == name) & of.parent.isna()])]
            for of in map(_with_names, rows.values())
        ]
        runs = pd.concat(below, ignore_index=True) if below else pd.DataFrame()
        require(
            len(runs) > 0,
            f"there is no sweep or grid {name!r} in {archive.uri} with runs of its own to begin "
            "from: what a grid took over from another is that one's",
        )
        done = runs[runs.outcome.isin(DONE)].reset_index(drop=True)
        taken, why = _of_one(config, name, done)
        require(
            len(taken) > 0,
            f"no result of {name!r} fits this search: {why or 'none has ended'}",
        )
        say(f"begins with {len(taken)} of {len(runs)} results of {name}")
        # Not in the order of their start, which was the machine's affair.
        results += sorted(taken, key=lambda result: json.dumps(asdict(result), sort_keys=True))
    return results


def _with_names(rows: pd.DataFrame) -> pd.DataFrame:
    """An experiment may have no run of nflab."""
    return rows if "parent" in rows else rows.assign(parent=None)


def _of_one(config: SweepConfig, name: str, runs: pd.DataFrame) -> tuple[list[Result], str]:
    """The results of one sweep or grid that fit, and why the first of the others does not."""
    scales, results, why = scales_of(config), [], ""
    base = config.base()
    fingerprint, default = load_dataset(base).fingerprint, _texts(Config())
    for row in runs.to_dict("records"):
        # A setting that an older run does not name had its default.
        text = _written({k: row[k] if isinstance(row.get(k), str) else None for k in default})
        try:
            settings = {one: setting(one, text[one]) for one in scales}
        except ConfigError as error:
            why = why or str(error)
            continue
        # What nothing reads beside the others is what this search would write, too.
        settings |= {
            one: scales[one].ends[0]
            for one in settings
            if not is_read(replace(base, **settings), one)
        }
        own = _written(_texts(replace(base, **settings)))
        differ = _differences(text, own, scales)
        if row["dataset_fingerprint"] != fingerprint:
            differ.insert(0, "another dataset")
        outside = [one for one, value in settings.items() if value not in scales[one]]
        if outside:
            differ.append(f"{outside[0]} is searched in {scales[outside[0]]}")
        if differ:
            why = why or ", ".join(differ[:3])
            continue
        outcome = cast(Outcome, row["outcome"])
        reached = float(row["val_top1"]) if outcome == "finished" else 0.0
        results.append(Result(settings, outcome, reached, name))
    return results, why


def _differences(
    theirs: Mapping[str, str], own: Mapping[str, str], scales: Mapping[str, Scale]
) -> list[str]:
    return [
        f"{key} {theirs[key]} -> {own[key]}"
        for key in own
        if key not in _APART and key not in scales and theirs[key] != own[key]
    ]


def _texts(config: Config) -> dict[str, str]:
    return {key: as_text(value) for key, value in flat(config).items()}


def _written(settings: Mapping[str, str | None]) -> dict[str, str]:
    """Settings as text, alike where they compute the same."""
    (row,) = as_computed(pd.DataFrame([settings])).to_dict("records")
    return {str(key): str(value) for key, value in row.items()}
