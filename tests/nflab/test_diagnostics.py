"""What AGC did to each layer, against norms taken by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import nfnet
from nflab.analysis.figures import draw_agc
from nflab.learning.diagnostics import Diagnostics, verdict
from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.studies.replay import TIMES
from nfnet.model import ResNet

CLIPPING = 0.1
EPS = 1e-3


def made(clipping: float | None) -> tuple[ResNet, nfnet.SGD_AGC]:
    torch.manual_seed(0)
    model = nfnet.create_model("dm_nf_resnet_digits")
    loss = F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8))
    loss.backward()
    return model, nfnet.SGD_AGC(nfnet.param_groups(model, 2e-5, clipping), lr=0.1)


def by_hand(model: ResNet) -> dict[str, np.ndarray[Any, Any]]:
    """For each layer that is clipped, the ratios of its units and whether they are at the floor."""
    found: dict[str, list[tuple[float, bool]]] = {}
    for name, p in model.named_parameters():
        if name == "head.fc.weight":
            continue
        vector = sum(size > 1 for size in p.shape) <= 1
        units = zip([p], [p.grad], strict=True) if vector else zip(p, p.grad, strict=True)
        for w, g in units:
            ratio = float(g.norm()) / max(float(w.detach().norm()), EPS)
            unit = (ratio, float(w.detach().norm()) <= EPS)
            alone = name == "head.fc.bias" or name.endswith("skipinit_gain")
            layer = name if alone else name.rpartition(".")[0]
            found.setdefault(layer, []).append(unit)
    return {name: np.array(units) for name, units in found.items()}


def test_the_trace_is_what_clipping_compares() -> None:
    model, optimizer = made(CLIPPING)
    expected = by_hand(model)
    diagnostics = Diagnostics(model, optimizer, steps=1)
    diagnostics.before(0)
    optimizer.step()
    rows = {row["layer"]: row for row in diagnostics.pop()}
    assert rows.keys() == expected.keys()
    for layer, units in expected.items():
        row, ratios = rows[layer], units[:, 0]
        assert row["units"] == len(ratios)
        assert row["clipped"] == pytest.approx((ratios > CLIPPING).mean())
        assert row["at_floor"] == pytest.approx(units[:, 1].mean())
        quantiles = [row["q10"], row["q50"], row["q90"]]
        assert quantiles == pytest.approx(np.quantile(ratios, (0.1, 0.5, 0.9)), rel=1e-4)
    # Skip gains start at zero: each stands at the floor.
    gains = [row for layer, row in rows.items() if layer.endswith("skipinit_gain")]
    assert [row["at_floor"] for row in gains] == [1.0] * 3
    assert diagnostics.pop() == []


@pytest.mark.parametrize(("steps", "looks"), [(10, 3), (100_000, 256)])
def test_few_steps_are_looked_at_however_long_the_training(steps: int, looks: int) -> None:
    model, optimizer = made(CLIPPING)
    diagnostics = Diagnostics(model, optimizer, steps)
    taken = 0
    for step in range(steps):
        diagnostics.before(step)
        taken += optimizer.ratios is not None
    assert taken == pytest.approx(looks, abs=1)


def test_watching_changes_nothing_and_needs_clipping() -> None:
    config = replace(RECIPES["digits"].config, epochs=2, batch_size=96, warmup_epochs=1.0)
    told: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    train(config, Worker(report=told.append))
    train(replace(config, diagnostics=True), Worker(report=seen.append))
    for one, other in zip(told, seen, strict=True):
        assert other.pop("agc")
        assert without_times(one) == without_times(other)
    unclipped: list[dict[str, Any]] = []
    train(replace(config, diagnostics=True, clipping=None), Worker(report=unclipped.append))
    assert all(report["agc"] == [] for report in unclipped)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name.split("/")[0] not in TIMES}


def trace(clipped: list[float]) -> pd.DataFrame:
    """Shares of clipped units at each step, in a layer of three units and one of one."""
    rows = [
        {"step": 4 * step, "layer": layer, "units": units, "clipped": share, "at_floor": 0.0}
        for step, share in enumerate(clipped)
        for layer, units in (("a", 3), ("b", 1))
    ]
    return pd.DataFrame(rows).assign(q10=0.01, q50=0.05, q90=0.2)


@pytest.mark.parametrize(
    ("clipped", "said"),
    [
        ([0.9] * 6 + [0.1] * 2, "active: 10.0% of all units clipped in the last quarter"),
        ([0.1] * 6 + [0.9] * 2, "too tight: 90.0% of all units clipped in the last quarter"),
        ([0.0] * 8, "idle: a clipping of 0.1 clipped no unit at 8 steps looked at"),
        ([0.2], "active: 20.0% of all units clipped in the last quarter"),
    ],
)
def test_the_verdict(clipped: list[float], said: str, tmp_path: Path) -> None:
    found = verdict(trace(clipped), 0.1)
    assert found.startswith(said)
    assert "nan" not in found
    draw_agc(trace(clipped), 0.1, found, tmp_path / "agc.png")
    assert (tmp_path / "agc.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("finite", "said"),
    [
        (6, "too tight: 90.0% of all units clipped in the last quarter"),
        (0, "gradients were finite at none of the 8 steps looked at"),
    ],
)
def test_steps_without_finite_gradients_are_left_out(
    finite: int, said: str, tmp_path: Path
) -> None:
    rows = trace([0.9] * finite + [0.0] * (8 - finite))
    quantiles = ["q10", "q50", "q90"]
    rows.loc[rows.step >= 4 * finite, quantiles] = np.nan
    found = verdict(rows, 0.1)
    assert found.startswith(said)
    assert ("not finite at 2 of 8 steps" in found) == (finite > 0)
    draw_agc(rows, 0.1, found, tmp_path / "agc.png")
    assert (tmp_path / "agc.png").read_bytes()[1:4] == b"PNG"


def test_layers_count_by_their_units() -> None:
    rows = trace([0.0] * 8)
    rows.loc[rows.layer == "a", "clipped"] = 1.0  # three of four units
    found = verdict(rows, 0.1)
    assert found.startswith("too tight: 75.0%")
    assert "mostly clipped: a;" in found
