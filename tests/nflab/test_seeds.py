"""What a parent of seeds tells of them, against a real MLflow store."""

import base64
import json
import math
import statistics
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from nflab.recording.notes import VIEW_TAG, experiment_tags
from nflab.recording.tracker import Tracker
from nflab.studies.seeds import over_seeds

SETTINGS: list[dict[str, Any]] = [
    {"clipping": clipping, "unclipped": ("head", "stem"), "seed": seed}
    for clipping in (None, 0.08)
    for seed in (0, 1, 2)
]
VAL = {None: (60.0, 9.0, 0.0), 0.08: (90.0, 91.5, 94.0)}


def rows_of(settings: list[dict[str, Any]]) -> pd.DataFrame:
    found = []
    for number, one in enumerate(settings):
        diverged = VAL[one["clipping"]][one["seed"]] == 0.0
        value = VAL[one["clipping"]][one["seed"]]
        found.append(
            {
                "cell": str(number),
                "outcome": "diverged" if diverged else "finished",
                "val_top1": float("nan") if diverged else value,
                "test_top1": float("nan") if diverged else value - 1,
            }
        )
    return pd.DataFrame(found)


def test_mean_deviation_and_count_are_metrics_of_the_parent(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(uri, str(tmp_path), "grid")
    parent = tracker.start("grid", {})
    tracker.log_anew(parent, over_seeds(SETTINGS, rows_of(SETTINGS)))
    found = MlflowClient(uri).get_run(parent).data.metrics
    best = VAL[0.08]
    assert found["val_top1_mean"] == pytest.approx(statistics.mean(best))
    assert found["val_top1_sd"] == pytest.approx(statistics.stdev(best))
    assert found["test_top1_mean"] == pytest.approx(statistics.mean(best) - 1)
    assert found["val_top1_count"] == found["test_top1_count"] == 3
    # A run that diverged classifies nothing, and is counted.
    of_none = "clipping none unclipped head stem"
    assert found[f"val_top1_mean/{of_none}"] == pytest.approx(23.0)
    assert found[f"test_top1_sd/{of_none}"] == pytest.approx(statistics.stdev((59.0, 8.0, 0.0)))
    assert found["val_top1_mean/clipping 0.08 unclipped head stem"] == found["val_top1_mean"]
    # One seed has no deviation, and that of before does not stay.
    one = SETTINGS[3:4]
    tracker.log_anew(parent, over_seeds(one, rows_of(one)))
    found = MlflowClient(uri).get_run(parent).data.metrics
    assert (found["val_top1_mean"], found["val_top1_count"]) == (90.0, 1)
    assert math.isnan(found["val_top1_sd"])
    history = MlflowClient(uri).get_metric_history
    tracker.log_anew(parent, over_seeds(one, rows_of(one)))
    assert len(history(parent, "val_top1_sd")) == len(history(parent, "val_top1_mean")) == 2


def test_the_saved_view_has_them_as_columns() -> None:
    named = {name for name in over_seeds(SETTINGS, rows_of(SETTINGS)) if "/" not in name}
    tags = experiment_tags("agc_layers", "1")
    packed = json.loads(tags[VIEW_TAG])["state"].removeprefix("deflate;")
    shown = json.loads(zlib.decompress(base64.b64decode(packed)))["selectedColumns"]
    # As many as of the test are of the validation.
    assert named - {key.split("`")[1] for key in shown} == {"val_top1_count"}


def test_seeds_without_a_result_are_not_counted() -> None:
    rows = rows_of(SETTINGS)
    rows.loc[[3, 4], "outcome"] = ["failed", "missing"]
    found = over_seeds(SETTINGS, rows)
    # Of fewer seeds it is no winner.
    assert found["val_top1_mean"] == pytest.approx(23.0)
    assert found["val_top1_count/clipping 0.08 unclipped head stem"] == 1
    rows["outcome"] = "failed"
    assert over_seeds(SETTINGS, rows) == {}


def test_settings_that_read_alike_have_two_names() -> None:
    settings = [{"clipping": c, "seed": 0} for c in (0.08001, 0.08002)]
    rows = pd.DataFrame(
        {"cell": ["a", "b"], "outcome": "finished", "val_top1": [1.0, 2.0], "test_top1": [3.0, 4.0]}
    )
    found = over_seeds(settings, rows)
    assert found["val_top1_mean/clipping 0.08"] == 1.0
    assert found["val_top1_mean/clipping 0.08 number 2"] == 2.0
