"""What the README says of the runs whose cells are kept, worked out again from their table."""

import math
import re

import pandas as pd
import pytest

from nflab.analysis import clipping
from nflab.analysis.findings import groups
from nflab.reporting.report import read_cells
from tests.conftest import ROOT

TEXT = " ".join((ROOT / "README.md").read_text().split())


@pytest.fixture(scope="module")
def cells() -> pd.DataFrame:
    return read_cells(ROOT / "results")


@pytest.fixture(scope="module")
def figure_2(cells: pd.DataFrame) -> pd.DataFrame:
    """Means of the large ablation, by network, batch size and clipping."""
    rows = cells[cells.experiment == "clipping_vs_batch_size"]
    ((common, group),) = groups(rows, clipping.VARIED)
    assert (common["model"], common["dataset"]) == ("dm_nf_resnet_small", "fashion-mnist")
    return clipping.analyse(group, "").table


def test_the_cells_say_where_they_come_from(cells: pd.DataFrame) -> None:
    for column in ("seed", "outcome", "seconds", "driver", "git_commit", "torch"):
        assert cells[column].notna().all(), column
    assert (ROOT / "results" / "cells.parquet").stat().st_size < 300_000


def test_the_first_figure(cells: pd.DataFrame, figure_2: pd.DataFrame) -> None:
    rows = cells[cells.experiment == "clipping_vs_batch_size"]
    hours = rows.seconds.astype(float).sum() / 3600
    assert len(rows) == 35 and set(rows.seed) == {"0"}
    assert f"{len(rows)} trainings on Fashion-MNIST, one seed each, {hours:.1f} hours" in TEXT


def test_what_is_said_of_the_first_figure(figure_2: pd.DataFrame) -> None:
    means = figure_2.set_index(["network", "batch_size", "clipping"])
    sizes = sorted(figure_2.batch_size.unique())
    assert sizes == [256, 512, 1024, 2048, 4096]
    none = {size: means.loc[("NF", size, math.inf)] for size in sizes}
    best = clipping.best_clippings(figure_2)
    reached = {size: means.test_mean[("NF", size, best[size])] for size in sizes}
    norm = {size: means.test_mean[("batch norm", size, math.inf)] for size in sizes}

    diverged = [size for size in sizes if none[size].diverged]
    assert f"it reaches {none[256].test_mean:.1f} % at a batch of 256" in TEXT
    assert f"and diverges at {diverged[0]}" in TEXT
    assert f"keeps it at {reached[diverged[0]]:.1f} % there" in TEXT
    survived = [size for size in sizes if size not in diverged]
    assert f"it diverges at {' and '.join(map(str, diverged))}; up to {survived[-1]}" in TEXT
    for size in survived:  # "no clipping does as well as any"
        assert none[size].test_mean > reached[size] - 0.5

    widest = {size: clipping.largest_good_clipping(figure_2, size) for size in sizes}
    (first,) = {widest[size] for size in sizes[:-1]}
    said = f"is {first:g} up to {sizes[-2]}, and {widest[4096]:g} at 4096"
    assert f"the largest within a point of the best {said}" in TEXT

    below = {size: norm[size] - reached[size] for size in sizes}
    low, high = (choose(below[size] for size in sizes[:-1]) for choose in (min, max))
    said = f"{low:.1f} to {high:.1f} points below batch norm up to {sizes[-2]}"
    assert f"{said}, and {below[4096]:.1f} at 4096" in TEXT


def test_the_figure_is_of_the_table(figure_2: pd.DataFrame) -> None:
    report = (ROOT / "results" / "report.md").read_text()
    numbers = re.findall(
        r"\| NF \| (\d+) \| ([\d.]+|none) \| 1 \| \d \| 0 \| [\d.]+ \| ([\d.]+)", report
    )
    told = {(int(size), c): float(top1) for size, c, top1 in numbers}
    for cell in figure_2[figure_2.network == "NF"].itertuples():
        key = cell.batch_size, "none" if math.isinf(cell.clipping) else f"{cell.clipping:g}"
        assert told[key] == pytest.approx(cell.test_mean, abs=0.006)


def test_what_is_said_of_the_layers(cells: pd.DataFrame) -> None:
    """Top-1 by what is left unclipped."""
    told = " ".join((ROOT / "docs" / "ablations.md").read_text().split())
    rows = cells[cells.experiment == "agc_layers"]
    assert set(rows.batch_size) == {"2048"} and set(rows.clipping) <= {"0.04", "none"}
    assert (
        "At a batch of 2048 on Fashion-MNIST, with clipping 0.04, one seed and 12 of the 32" in told
    )
    parts = {"stem", "stage1", "stage2", "stage3", "head"}
    top1 = {}
    for row in rows.itertuples():
        clipped = parts - set(row.unclipped.split())
        top1[frozenset(clipped)] = row.test_top1 if row.outcome == "finished" else None
    assert len(top1) == 12
    diverged = {clipped for clipped, value in top1.items() if value is None}
    alone = [set(), {"stem"}, {"stage2"}, {"stage3"}, {"head"}]
    assert diverged == {frozenset(clipped) for clipped in alone}
    body = parts - {"head"}
    assert f"Clipping stage 1 alone reaches {top1[frozenset({'stage1'})]:.1f} %" in told
    assert f"all but the classifier {top1[frozenset(body)]:.1f} %, and the classifier too" in told
    assert f"the classifier too {top1[frozenset(parts)]:.1f} %" in told
    for left_out in ("stem", "stage1"):
        assert f"gives {top1[frozenset(body - {left_out})]:.1f} %" in told


def test_what_is_said_of_the_learning_rate(cells: pd.DataFrame) -> None:
    told = " ".join((ROOT / "docs" / "ablations.md").read_text().split())
    rows = cells[(cells.experiment == "learning_rate") & (cells.batch_size == "4096")]
    rows = rows.assign(rate=rows.base_learning_rate.astype(float))
    top1 = {
        line: rows[chosen].set_index("rate").test_top1.sort_index()
        for line, chosen in {
            "none": (rows.model == "dm_nf_resnet_small") & (rows.clipping == "none"),
            "clipping": rows.clipping == "0.02",
            "norm": rows.model == "preact_resnet_small",
        }.items()
    }
    rates = sorted(set(rows.rate))
    assert all(list(of.index) == rates for of in top1.values())
    survived = top1["none"].dropna()
    best = {line: (of.idxmax(), of.max()) for line, of in top1.items()}
    assert list(survived.index) == rates[: len(survived)]  # the smallest
    said = f"learns up to {survived.index[-1]:g}, and diverges from {rates[len(survived)]:g} on"
    assert said in told
    rate, value = best["none"]
    assert f"At its best rate, {rate:g}, it reaches {value:.1f} %" in told
    (rate, clipped), (_, norm) = best["clipping"], best["norm"]
    assert f"clipping 0.02 reaches {clipped:.1f} % at {rate:g}, batch norm {norm:.1f} %" in told


def test_what_is_said_of_the_learning_rate_at_a_small_batch(cells: pd.DataFrame) -> None:
    told = " ".join((ROOT / "docs" / "ablations.md").read_text().split())
    rows = cells[(cells.experiment == "learning_rate") & (cells.batch_size == "256")]
    rates = sorted(float(rate) for rate in set(rows.base_learning_rate))
    assert "0.1, is the best of " + f"{rates[0]:g}, {rates[1]:g} and {rates[2]:g} for each" in told
    best = {}
    for line, chosen in {
        "without clipping": (rows.model == "dm_nf_resnet_small") & (rows.clipping == "none"),
        "with clipping 0.16": rows.clipping == "0.16",
        "with batch norm": rows.model == "preact_resnet_small",
    }.items():
        top1 = rows[chosen].set_index("base_learning_rate").test_top1
        assert len(top1) == len(rates) and top1.notna().all()
        assert top1.idxmax() == "0.1"
        best[line] = top1.max()
        assert f"{best[line]:.1f} % {line}" in told
    assert max(best.values()) - min(best.values()) < 0.5  # "decides between none of the three"


def test_what_is_said_of_augmentation(cells: pd.DataFrame) -> None:
    told = " ".join((ROOT / "docs" / "ablations.md").read_text().split())
    rows = cells[cells.experiment == "augmentation"]
    assert len(rows) == 12 and set(rows.batch_size) == {"2048"} and set(rows.seed) == {"0"}
    top1 = rows.set_index(["model", "augmentation_level", "mixup", "cutmix"]).test_top1
    ladder = [("0", "False"), ("0", "True"), ("5", "True")]
    climbed = {}
    for network, model in (("NF", "dm_nf_resnet_small"), ("norm", "preact_resnet_small")):
        climbed[network] = [top1[(model, level, mixup, "False")] for level, mixup in ladder]
        climbed[network].append(top1[(model, "5", "True", "True")])
        assert climbed[network] == sorted(climbed[network], reverse=True)  # each lowers it
        first, second, third, last = (f"{value:.1f}" for value in climbed[network])
        assert f"from {first} % to {second}, {third} and {last} %" in told
    strengths = [
        top1[("dm_nf_resnet_small", level, "False", "False")] for level in "0 5 10".split()
    ]
    assert strengths == sorted(strengths, reverse=True)
    first, second, third = (f"{value:.1f}" for value in strengths)
    assert f"(levels 0, 5 and 10: {first}, {second} and {third} %)" in told
    pairs = list(zip(climbed["NF"], climbed["norm"], strict=True))[1:]
    assert max(abs(one - other) for one, other in pairs) < 0.105  # "within 0.1 points"
