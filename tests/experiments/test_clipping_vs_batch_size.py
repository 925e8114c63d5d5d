"""Clipping against batch size, run as a user runs it and read back from MLflow."""

import csv
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import Script

NAME = "clipping_vs_batch_size"
SMALL = ("--clippings", "0.08", "--epochs", "1", "--seeds", "1")
BOTH = ("--batch-sizes", "64", "128")
ONE = ("--batch-sizes", "128")


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


def table_of(tmp_path: Path) -> set[str]:
    """Run ids of the table of cells that the script wrote, each once."""
    with (tmp_path / "runs" / NAME / "cells.csv").open() as file:
        rows = [row["run_id"] for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows))
    return set(rows)


def check_as_before(before: dict[str, Run], after: dict[str, Run]) -> None:
    """Cells that had been run are as they were."""
    for run_id, cell in before.items():
        assert after[run_id].info.end_time == cell.info.end_time
        assert after[run_id].data.metrics == cell.data.metrics


def test_only_what_is_missing_is_run_unless_forced_and_other_settings_never_mix_in(
    script: Script, store: dict[str, str], tmp_path: Path, ray_address: str
) -> None:
    def run(*flags: str, code: int = 0) -> str:
        done = script(f"{NAME}.py", *SMALL, *flags, RAY_ADDRESS=ray_address)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    # Nothing yet, and a plan changes nothing.
    done = script(f"{NAME}.py", *SMALL, *ONE, "--dry-run", cold=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = done.stdout
    assert plan.count("to run") == 3
    assert "3 of 3 cells would run" in plan
    assert "about " in plan and "unknown" not in plan
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    assert [found.name for found in client.search_experiments()] == ["Default"]
    assert not (tmp_path / "runs").exists()

    # One batch size.
    assert "3 cells (0 done) of 1 epochs" in run(*ONE)
    first = cells_of(store)
    assert len(first) == 3
    assert "0 of 3 cells would run" in run(*ONE, "--dry-run")
    assert "3 of 3 cells would run" in run(*ONE, "--dry-run", "--force")
    assert cells_of(store).keys() == first.keys()

    # Another one. One epoch tells nothing of what the paper found.
    checked = run(*BOTH, "--check", code=1)
    assert "6 cells (3 done)" in checked
    assert "FAILS: at the largest batch (128) no clipping has collapsed" in checked
    second = cells_of(store)
    assert len(second) == 6
    check_as_before(first, second)

    # Other settings are other cells.
    longer = run(*BOTH, "--epochs", "2")
    assert "6 cells (0 done) of 2 epochs" in longer
    third = cells_of(store)
    check_as_before(second, third)
    added = [cell for run_id, cell in third.items() if run_id not in second]
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
    assert table_of(tmp_path) == {cell.info.run_id for cell in added}

    # The first ones once more.
    assert "3 cells (0 done)" in run(*ONE, "--force")
    cells = cells_of(store)
    assert len(cells) == 6 + 6 + 3
    old = {run_id for run_id, cell in cells.items() if "superseded" in cell.data.tags}
    assert old == first.keys()
    assert table_of(tmp_path) == cells.keys() - third.keys()
    assert "3 cells (3 done) of 1 epochs" in run(*ONE)
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
