"""The ablations, finals and their report, run as a user runs them and read back from MLflow."""

import re
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import Script, run_script
from tests.records import family
from tests.stores import new_store

LAYERS = (
    "--subsets none stage1+stage2+stage3 stem+stage1+stage2+stage3 stem+stage1+stage2+stage3+head "
    "--seeds 1 --epochs 1 --batch-size 128"
)
AUGMENTATION = "--levels 0 6 --ladder-level 3 --seeds 1 --epochs 1 --batch-size 128"
RATES = (
    "--batch-sizes 128 --clippings 0.08 --base-learning-rates 0.8 --seeds 1 --epochs 1 "
    "--channels-last"
)
SWEEP = (
    "--trials 2 --epochs 1 --batch-size 128 --finalists 1 --final-seeds 2 --diagnostics --profile 2"
)


@pytest.fixture(scope="module")
def ran(
    ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], dict[str, str]]:
    """A store with both ablations and a sweep with finals, and what they printed."""
    folder = tmp_path_factory.mktemp("ablations")
    env = {**new_store(folder), "RAY_ADDRESS": ray_address}
    printed = {}
    for name, flags in (
        ("agc_layers", LAYERS),
        ("augmentation", AUGMENTATION),
        ("learning_rate", RATES),
        ("agc_sweep", f"{SWEEP} --name s"),
    ):
        done = run_script(folder, env, f"{name}.py", *flags.split())
        assert done.returncode == 0, done.stdout + done.stderr
        printed[name] = done.stdout
    return env, printed


def artifacts(env: dict[str, str], run: Run) -> set[str]:
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def test_layers_are_left_unclipped_as_asked(
    ran: tuple[dict[str, str], dict[str, str]],
) -> None:
    env, printed = ran
    parent, cells = family(env["MLFLOW_TRACKING_URI"], "agc_layers")
    unclipped = {cell.data.params["unclipped"]: cell.data.metrics for cell in cells}
    assert set(unclipped) == {"stem stage1 stage2 stage3 head", "stem head", "head", "none"}
    # What clipped shows in the record: nothing is told of a part that is not clipped.
    told = {
        what: {name.split("/")[1] for name in metrics if name.startswith("clipped_fraction/")}
        for what, metrics in unclipped.items()
    }
    stages = {"stage1", "stage2", "stage3"}
    assert told["none"] == {"stem", *stages, "head"}
    # The classifier's bias is clipped all the same, as in the authors' code.
    assert stages <= told["stem head"]
    assert "stem" not in told["stem head"]
    assert not told["stem stage1 stage2 stage3 head"] & {"stem", *stages}
    assert "agc_layers.png" in artifacts(env, parent)
    assert "the first convolution may go unclipped: cannot be told" in printed["agc_layers"]
    # The best cell's network is kept and registered.
    assert parent.data.tags["model_uri"].startswith("models:/")


def test_augmentation_compares_steps_and_strengths(
    ran: tuple[dict[str, str], dict[str, str]],
) -> None:
    env, printed = ran
    parent, cells = family(env["MLFLOW_TRACKING_URI"], "augmentation")
    # Four steps of the ladder and one more level, for each of two networks.
    assert len(cells) == 10
    steps = {
        (c.data.params["mixup"], c.data.params["augmentation_level"], c.data.params["cutmix"])
        for c in cells
    }
    assert steps == {
        ("False", "0", "False"),
        ("True", "0", "False"),
        ("True", "3", "False"),
        ("True", "3", "True"),
        ("False", "6", "False"),
    }
    assert "augmentation.png" in artifacts(env, parent)
    assert "NF: + MixUp" in printed["augmentation"]


def test_learning_rates_are_compared_with_and_without_clipping(
    ran: tuple[dict[str, str], dict[str, str]],
) -> None:
    env, printed = ran
    parent, cells = family(env["MLFLOW_TRACKING_URI"], "learning_rate")
    found = {(c.data.params["model"], c.data.params["clipping"]) for c in cells}
    network, twin = "dm_nf_resnet_digits", "preact_resnet_digits"
    assert found == {(network, "none"), (network, "0.08"), (twin, "none")}
    assert {c.data.params["base_learning_rate"] for c in cells} == {"0.8"}
    assert "learning_rate.png" in artifacts(env, parent)
    assert "batch 128, each at its best base rate:" in printed["learning_rate"]
    assert "what is missing takes about" in printed["learning_rate"]
    # Which machine made a result stands with it.
    assert all(re.search(r", \d+ cores?", cell.data.tags["driver"]) for cell in cells)


def test_finals_repeat_the_best_over_fresh_seeds(
    ran: tuple[dict[str, str], dict[str, str]],
) -> None:
    env, printed = ran
    parent, children = family(env["MLFLOW_TRACKING_URI"], "agc_sweep")
    trials = [run for run in children if "trial" in run.data.tags]
    cells = [run for run in children if "cell" in run.data.tags]
    assert len(trials) == 2
    best = max(
        (run for run in trials if run.data.tags["outcome"] == "finished"),
        key=lambda run: run.data.metrics["val_top1"],
    )
    names = ("clipping", "batch_size", "augmentation_level")
    settings = [tuple(run.data.params[name] for name in names) for run in (best, *cells)]
    # The baseline and one finalist, two seeds each.
    assert len(cells) == 4
    assert settings.count(settings[0]) == 3
    assert {run.data.params["seed"] for run in cells} == {"1000", "1001"}
    assert "seed noise of the baseline: test top-1" in printed["agc_sweep"]
    assert "seed noise of the baseline" in parent.data.tags["mlflow.note.content"]
    assert {"finals.json", "finalists.png"} <= artifacts(env, parent)
    told = parent.data.metrics
    of_each = {key: value for key, value in told.items() if key.startswith("test_top1_mean/")}
    assert len(of_each) == 2
    assert all(key.startswith("test_top1_mean/finals ") for key in of_each)
    found = [run.data.metrics.get("test_top1", 0.0) for run in cells]
    assert sum(of_each.values()) == pytest.approx(sum(found) / 2)
    assert told["test_top1_mean"] in of_each.values()
    assert told["test_top1_count"] == 2


def test_diagnostics_are_on_the_runs(ran: tuple[dict[str, str], dict[str, str]]) -> None:
    env, _ = ran
    _, children = family(env["MLFLOW_TRACKING_URI"], "agc_sweep")
    for run in children:
        clipped = run.data.params["clipping"] != "none"
        assert ("agc_verdict" in run.data.tags) == clipped
        assert ("agc.png" in artifacts(env, run)) == clipped


def test_traces_and_the_machines_figures_are_on_the_runs(
    ran: tuple[dict[str, str], dict[str, str]],
) -> None:
    env, _ = ran
    _, children = family(env["MLFLOW_TRACKING_URI"], "agc_sweep")
    for run in children:
        assert run.data.tags["profile"].startswith("Of the CPU's time in 2 steps: ")
        assert "profile.json.gz" in artifacts(env, run)
        assert run.data.metrics["system/worker_0/memory_megabytes"] > 100


def test_the_report_tells_all_of_it(
    ran: tuple[dict[str, str], dict[str, str]], script: Script, tmp_path: Path
) -> None:
    env, _ = ran
    done = script("report.py", "--output", str(tmp_path / "report"), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "report/report.html") in done.stdout.replace("\n", "")
    text = (tmp_path / "report/report.md").read_text()
    for said in ("Which layers to clip?", "What does augmentation give?", "Sweep s", "Finals of s"):
        assert said in text
    table = pd.read_parquet(tmp_path / "report/tables/agc_layers.parquet")
    _, cells = family(env["MLFLOW_TRACKING_URI"], "agc_layers")
    expected = sorted(run.data.metrics["test_top1"] for run in cells)
    assert sorted(table.test_mean) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("command", "said", "cold"),
    [
        ("agc_layers.py --subsets stem+stage7", "unknown part 'stage7'", True),
        ("agc_layers.py --clipping none", "clipping none leaves nothing to compare", False),
        ("augmentation.py --ladder-level 0", "ladder_level 0 must be at least 1", True),
        ("augmentation.py --levels -1", "augmentation_level -1 must be at least 0", False),
        ("agc_sweep.py --finalists 2 --final-seeds 1", "final_seeds 1 must be at least 2", False),
        ("report.py --tracking-uri http://127.0.0.1:1", "cannot open the tracking store", True),
        ("report.py --outputs x", "--outputs", False),
    ],
)
def test_bad_input_is_said_at_once(script: Script, command: str, said: str, cold: bool) -> None:
    done = script(*command.split(), cold=cold)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
