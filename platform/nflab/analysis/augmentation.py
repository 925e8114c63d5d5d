"""Augmentation, step by step and by strength, for a network without and one with batch norm."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from nflab.analysis.figures.augmentation import draw_augmentation
from nflab.analysis.findings import Findings, is_baseline, summarise, top1
from nflab.analysis.statistics import estimate, verdict

VARIED = ("augmentation_level", "mixup", "cutmix")

PAPER = (
    "The paper (table 6; ImageNet, top-1 of NFNet-F0/F1/F2/F3): before augmentation "
    "81.3/82.2/82.4/82.7, + MixUp 82.2/82.9/83.1/83.5, + RandAugment 83.2/84.6/84.8/85.0, "
    "+ CutMix 83.6/84.7/85.1/85.7: the larger the network, the more it gains."
)

STEPS = ("baseline", "+ MixUp", "+ RandAugment", "+ CutMix")


def settings(
    networks: Sequence[dict[str, Any]],
    levels: Sequence[int],
    ladder_level: int,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """The cells: the ladder's steps, then the other levels of the curve.

    Args:
        networks: what distinguishes the networks.
    """
    plain = {"mixup": False, "cutmix": False}
    augmentations = [
        {"augmentation_level": 0, **plain},
        {"augmentation_level": 0, "mixup": True, "cutmix": False},
        {"augmentation_level": ladder_level, "mixup": True, "cutmix": False},
        {"augmentation_level": ladder_level, "mixup": True, "cutmix": True},
    ]
    augmentations += [
        {"augmentation_level": level, **plain} for level in sorted(set(levels)) if level != 0
    ]
    return [
        {**network, **augmentation, "seed": seed}
        for seed in seeds
        for augmentation in augmentations
        for network in networks
    ]


def prepare(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with settings as numbers and truths; `network` is "NF" or "batch norm"; `step` is
    the ladder's, or empty; `test` is top-1 in percent."""
    told = rows.assign(
        network=np.where(rows.model.map(is_baseline), "batch norm", "NF"),
        augmentation_level=rows.augmentation_level.astype(int),
        mixup=rows.mixup == "True",
        cutmix=rows.cutmix == "True",
        test=top1(rows, "test"),
        val=top1(rows, "val"),
    )
    return told.assign(step=_steps(told))


def _steps(told: pd.DataFrame) -> list[str]:
    """The ladder's step of each row; where ladders of several levels were run, of the one with the
    most runs."""
    levels = told.augmentation_level[told.mixup & (told.augmentation_level > 0)]
    level = levels.mode().min()
    steps = [(False, 0, False), (True, 0, False), (True, level, False), (True, level, True)]
    keys = zip(told.mixup, told.augmentation_level, told.cutmix, strict=True)
    return [STEPS[steps.index(key)] if key in steps else "" for key in keys]


def analyse(rows: pd.DataFrame, title: str) -> Findings:
    """What each step of the ladder gives, and where strength begins to hurt."""
    told = prepare(rows)
    table = summarise(told, ("network", "mixup", "cutmix", "augmentation_level"))
    lines = []
    # What is read together: each step of each network.
    steps = (len(STEPS) - 1) * told.network.nunique()
    for network, runs in told.groupby("network", sort=False):
        by_step = runs[runs.step != ""].pivot_table(index="seed", columns="step", values="test")
        gains = []
        for before, after in pairwise(STEPS):
            if {before, after} <= set(by_step.columns):
                pairs = (by_step[after] - by_step[before]).dropna().tolist()
                if pairs:
                    gains.append(f"{after} {verdict(estimate(pairs, steps))}")
        if gains:
            lines.append(f"{network}: {'; '.join(gains)}")
        curve = runs[~runs.mixup & ~runs.cutmix].groupby("augmentation_level")[["val", "test"]]
        means = curve.mean().dropna()
        if len(means):
            best = int(means.val.idxmax())
            lines.append(
                f"{network}: RandAugment of level {best} does best on validation "
                f"(test {means.test[best]:.1f} %), the strongest, {means.index.max()}, "
                f"reaches {means.test[means.index.max()]:.1f} %"
            )
    of_network = told.pivot_table(
        index=["seed", "mixup", "cutmix", "augmentation_level"], columns="network", values="test"
    )
    if {"NF", "batch norm"} <= set(of_network.columns):
        above = (of_network["NF"] - of_network["batch norm"]).dropna()
        by = ["mixup", "cutmix", "augmentation_level"]
        places = above.groupby(by, sort=False)
        for (mixup, cutmix, level), values in places:
            mixed = " + ".join(w for w, on in (("MixUp", mixup), ("CutMix", cutmix)) if on)
            what = f"RandAugment of level {level}{f' with {mixed}' if mixed else ''}"
            lines.append(
                f"NF above batch norm, {what}: {verdict(estimate(values.tolist(), len(places)))}"
            )
    return Findings(lines, table, {"augmentation": partial(draw_augmentation, told, STEPS, title)})


def ranked(rows: pd.DataFrame, model: str) -> list[dict[str, Any]]:
    """Settings of the normalizer-free network, the best mean validation top-1 first."""
    told = prepare(rows[rows.model == model])
    means = told.groupby(["augmentation_level", "mixup", "cutmix"]).val.mean()
    return [
        {"augmentation_level": int(level), "mixup": bool(mixup), "cutmix": bool(cutmix)}
        for level, mixup, cutmix in means.sort_values(ascending=False, kind="stable").index
    ]
