"""Clipping against batch size, run as a user runs it and read back from MLflow."""

import csv
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import Script

NAME = "clipping_vs_batch_size"
SMALL = ("--clippings", "0.08", "--epochs", "1")
ONE = ("--batch-sizes", "128", *SMALL, "--seeds", "1")


def runs_of(store: dict[str, str]) -> list[Run]:
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(NAME)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def parent_of(store: dict[str, str]) -> Run:
    (parent,) = [run for run in runs_of(store) if "mlflow.parentRunId" not in run.data.tags]
    return parent


def cells_of(store: dict[str, str]) -> dict[str, Run]:
    """Run id -> run of each cell; all must have come to their end."""
    parent = parent_of(store)
    assert (parent.info.status, parent.data.tags["outcome"]) == ("FINISHED", "finished")
    cells = {
        run.info.run_id: run for run in runs_of(store) if run.info.run_id != parent.info.run_id
    }
    for run in cells.values():
        assert run.data.tags["outcome"] in ("finished", "diverged")
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    return cells


def test_only_what_is_missing_is_run_and_other_settings_never_mix_in(
    script: Script, store: dict[str, str], tmp_path: Path, ray_address: str
) -> None:
    def run(*flags: str) -> str:
        sizes = ("--batch-sizes", "64", "128")
        done = script(f"{NAME}.py", *sizes, *SMALL, *flags, RAY_ADDRESS=ray_address)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "6 cells (0 done) of 1 epochs" in run("--seeds", "1")
    first = cells_of(store)
    assert len(first) == 6
    # One epoch tells nothing of what the paper found.
    sizes = ("--batch-sizes", "64", "128")
    flags = (*SMALL, "--seeds", "2", "--check")
    checked = script(f"{NAME}.py", *sizes, *flags, RAY_ADDRESS=ray_address)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "12 cells (6 done)" in checked.stdout
    assert "FAILS: at the largest batch (128) no clipping has collapsed" in checked.stdout
    assert "Traceback" not in checked.stderr
    second = cells_of(store)
    assert len(second) == 12
    for run_id, cell in first.items():
        assert second[run_id].info.end_time == cell.info.end_time
        assert second[run_id].data.metrics == cell.data.metrics

    longer = run("--seeds", "1", "--epochs", "2")
    assert "6 cells (0 done) of 2 epochs" in longer
    added = [cell for run_id, cell in cells_of(store).items() if run_id not in second]
    assert len(added) == 6
    assert {cell.data.params["epochs"] for cell in added} == {"2"}
    for size in ("64", "128"):
        by_clipping = {
            cell.data.params["clipping"]: cell.data.metrics.get("test_top1", 0.0)
            for cell in added
            if cell.data.params["batch_size"] == size
            and cell.data.params["model"] == "dm_nf_resnet_digits"
        }
        of_none, of_best = by_clipping["none"], by_clipping["0.08"]
        said = f"no clipping reaches {of_none:.1f} %, the best clipping (0.08) {of_best:.1f} %"
        assert said in longer
        assert said in parent_of(store).data.tags["mlflow.note.content"]
    with (tmp_path / "runs" / NAME / "cells.csv").open() as file:
        table = list(csv.DictReader(file))
    assert sorted(row["run_id"] for row in table) == sorted(cell.info.run_id for cell in added)
    assert "6 cells (6 done) of 1 epochs" in run("--seeds", "1")
    assert len(cells_of(store)) == 18


def test_a_dry_run_lists_and_force_repeats(
    script: Script, store: dict[str, str], tmp_path: Path, ray_address: str
) -> None:
    plan = script(f"{NAME}.py", *ONE, "--dry-run")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    assert plan.stdout.count("to run") == 3
    assert "3 of 3 cells would run" in plan.stdout
    assert "about " in plan.stdout and "unknown" not in plan.stdout
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    assert [found.name for found in client.search_experiments()] == ["Default"]
    assert not (tmp_path / "runs").exists()

    done = script(f"{NAME}.py", *ONE, RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    first = cells_of(store)
    assert len(first) == 3
    plan = script(f"{NAME}.py", *ONE, "--dry-run")
    assert "0 of 3 cells would run" in plan.stdout, plan.stdout + plan.stderr
    plan = script(f"{NAME}.py", *ONE, "--dry-run", "--force")
    assert "3 of 3 cells would run" in plan.stdout, plan.stdout + plan.stderr
    assert cells_of(store).keys() == first.keys()

    forced = script(f"{NAME}.py", *ONE, "--force", RAY_ADDRESS=ray_address)
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert "3 cells (0 done)" in forced.stdout
    cells = cells_of(store)
    assert len(cells) == 6
    old = {run_id for run_id, cell in cells.items() if "superseded" in cell.data.tags}
    assert old == first.keys()
    with (tmp_path / "runs" / NAME / "cells.csv").open() as file:
        assert {row["run_id"] for row in csv.DictReader(file)} == cells.keys() - old
    again = script(f"{NAME}.py", *ONE, RAY_ADDRESS=ray_address)
    assert "3 cells (3 done)" in again.stdout
    assert cells_of(store).keys() == cells.keys()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batchsizes 64", "--batchsizes"),
        ("--seeds 0", "seeds 0 must be at least 1"),
        ("--batch-sizes 0", "batch_size 0 must be at least 1"),
        ("--batch-sizes 100000", "batch_size 100000 exceeds the 1071 training images of digits"),
        ("--clippings -1", "clipping -1.0 must be a finite number above 0"),
    ],
)
def test_bad_input_is_one_sentence(
    script: Script, store: dict[str, str], flags: str, said: str
) -> None:
    done = script(f"{NAME}.py", *flags.split(), RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not runs_of(store)
