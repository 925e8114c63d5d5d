"""What every ablation has in common: rows of cells in, an answer out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nflab.analysis.statistics import Estimate, estimate
from nflab.settings.canonical import UNREAD
from nflab.settings.config import Config, ScaleConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat
from nflab.settings.outcomes import DONE

_UNRELATED = ("name", "tracking_uri", "storage", "recipe", "diagnostics", "profile", "seed")


@dataclass(frozen=True)
class Findings:
    """The answer to one question."""

    text: list[str]
    """In sentences."""
    table: pd.DataFrame
    """A row for each setting: how many seeds, how many diverged, means and their intervals."""
    drawings: Mapping[str, Callable[[Path], None]]
    """Name -> draws the figure, as a PNG file of this path."""
    repeated: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Of finals: label -> a row for each seed that has a result."""


def twin(model: str) -> str:
    """The batch-normalised twin of a normalizer-free network.

    Raises:
        ConfigError: it has none.
    """
    if not model.startswith("dm_nf_resnet"):
        raise ConfigError(f"{model} has no batch-normalised twin: choose a dm_nf_resnet... model")
    return model.replace("dm_nf_", "preact_")


def twins(config: Config) -> dict[str, dict[str, Any]]:
    """What distinguishes the network of `config` from its batch-normalised twin.

    Raises:
        ConfigError: it has none.
    """
    model = config.model.model
    return {
        "normalizer-free": {"model": model, "clipping": config.optimizer.clipping},
        "batch norm": {"model": twin(model), "clipping": None},
    }


def is_baseline(model: str) -> bool:
    """Whether a network is a batch-normalised one."""
    return model.startswith("preact_")


def groups(rows: pd.DataFrame, varied: Sequence[str]) -> list[tuple[dict[str, str], pd.DataFrame]]:
    """Cells that differ in nothing but the `varied` settings and the seed: they alone compare.

    Returns:
        what each group has in common, and its rows; the largest first. A network's group has its
        batch-normalised twin in it.
    """
    if not len(rows):
        return []
    rows = as_computed(rows)
    scale = [field.name for field in fields(ScaleConfig)]
    apart = {*_UNRELATED, *scale, *varied, "model"}
    names = [*flat(Config()), "dataset_fingerprint"]
    common = [name for name in names if name in rows and name not in apart]
    keyed = rows.assign(family=rows.model.replace({"^preact_": "dm_nf_"}, regex=True))
    keys = ["family", *common]
    keyed = _with_unread(keyed, keys)
    networks = keyed[~keyed.model.map(is_baseline)]
    # No clipping is all the clipping that a twin can have: it belongs to every group.
    twins = keyed[keyed.model.map(is_baseline)]
    shared = [name for name in keys if name != "clipping"]
    found = []
    for key, group in networks.groupby(keys, sort=False, dropna=False):
        values = dict(zip(keys, key, strict=True))
        same = (twins[shared] == [values[name] for name in shared]).all(axis=1)
        found.append((values, pd.concat([group, twins[same]])))
    grouped = {row for _, group in found for row in group.index}
    for key, group in twins[~twins.index.isin(grouped)].groupby(keys, sort=False, dropna=False):
        found.append((dict(zip(keys, key, strict=True)), group))
    return sorted(
        (
            ({"model": values.pop("family"), **values}, group.drop(columns="family"))
            for values, group in found
        ),
        key=lambda one: -len(one[1]),
    )


def _with_unread(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows that do not read a setting, once for each value that it has where it is read: a cell
    without augmentation compares with those of any number of augmentation's layers.

    Args:
        rows: as `as_computed` returns them.
        keys: columns in which rows that compare are alike.
    """
    # A twin has no clipping.
    alike = [key for key in keys if key not in UNREAD and key != "clipping"]
    for name in UNREAD:
        unread = _unread(rows, name)
        if name in keys and unread.any() and not unread.all():
            values = rows.loc[~unread, [*alike, name]].drop_duplicates()
            free = rows[unread].rename_axis("row").reset_index()
            spread = free.drop(columns=name).merge(values, how="left", on=alike).set_index("row")
            spread[name] = spread[name].fillna(as_text(flat(Config())[name]))
            rows = pd.concat([rows[~unread], spread[rows.columns]])
            rows = rows.rename_axis(None).sort_index(kind="stable")
    return rows


def _unread(rows: pd.DataFrame, name: str) -> pd.Series:
    """Which rows do not read a setting."""
    others = UNREAD[name]
    if name not in rows or not set(others) <= set(rows):
        return pd.Series(False, rows.index)
    return pd.concat([rows[o] == as_text(v) for o, v in others.items()], axis=1).all(axis=1)


def as_computed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose settings read alike where they compute the same; one that an older row does not
    name had its default."""
    rows, default = rows.copy(), {key: as_text(value) for key, value in flat(Config()).items()}
    if {"partners", "mixup", "cutmix"} <= set(rows):  # they were drawn otherwise before
        mixed = (rows.mixup == "True") | (rows.cutmix == "True")
        rows.loc[mixed, "partners"] = rows.partners[mixed].fillna("earlier")
    for name in rows.columns.intersection(list(default)):
        rows[name] = rows[name].fillna(default[name])
    for name in rows.columns.intersection(["unclipped", "frozen"]):
        rows[name] = [" ".join(sorted(set(text.split()))) for text in rows[name]]
    for name in UNREAD:
        if name in rows:
            rows.loc[_unread(rows, name), name] = default[name]
    return rows


def software(rows: pd.DataFrame, own: Mapping[str, str] | None = None) -> list[str]:
    """Sentences on which software rows were computed with, where that is not one.

    Args:
        own: `code_fingerprint` and `torch` of this process; None compares rows with each other.
    """
    said = []
    done = rows[rows.outcome.isin(DONE)]
    for key, what in (("code_fingerprint", "of the code"), ("torch", "of torch")):
        found = done[key].dropna() if key in done else pd.Series(dtype=str)
        if own is not None:
            others = found[found != own[key]]
            if len(others):
                said.append(f"{len(others)} of {len(done)} results are of other versions {what}")
        elif found.nunique() > 1:
            named = f" ({', '.join(sorted(found.unique()))})" if key == "torch" else ""
            said.append(f"{len(done)} results of {found.nunique()} versions {what}{named}")
    return said


def top1(rows: pd.DataFrame, split: str) -> pd.Series:
    """Top-1 in percent of each row; 0 where the run diverged, for it classifies nothing."""
    column = f"{split}_top1"
    values = rows[column] if column in rows else pd.Series(np.nan, rows.index)
    return values.astype(float).mask(rows.outcome == "diverged", 0.0)


def summarise(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """One row for each combination of the columns `by`: `seeds` (with a result), `diverged`,
    `unfinished`, and of top-1 in percent `val_mean`, `test_mean`, `test_std`, `test_low` and
    `test_high` (the mean's 95 % interval)."""
    rows = rows.assign(val=top1(rows, "val"), test=top1(rows, "test"))
    found = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        done = group[group.outcome.isin(DONE)]
        spread = estimate(done.test.tolist()) if len(done) else None
        found.append(
            {
                **dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)),
                "seeds": len(done),
                "diverged": int((done.outcome == "diverged").sum()),
                "unfinished": len(group) - len(done),
                "val_mean": done.val.mean() if len(done) else np.nan,
                **_spread(spread),
            }
        )
    return pd.DataFrame(found)


def _spread(found: Estimate | None) -> dict[str, float]:
    names = ("test_mean", "test_std", "test_low", "test_high")
    if found is None:
        return dict.fromkeys(names, np.nan)
    # One seed has no spread.
    known: tuple[float, ...] = (found.mean,)
    if found.count > 1:  # accuracies end at 0 and 100, whatever Student's interval says
        known = (found.mean, found.std, max(0.0, found.low), min(100.0, found.high))
    return dict(zip(names, (*known, *[np.nan] * (4 - len(known))), strict=True))
