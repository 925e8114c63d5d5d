"""A grid under fire: however it is killed, every cell stands in the report once."""

import random
import subprocess
import time
from pathlib import Path

import pytest
from mlflow.entities import Run as Recorded

from tests.conftest import ROOT
from tests.faults.runs import Run, check_exact, slow_copy, train_on, wait_until
from tests.faults.stores import STATES, Stores
from tests.servers import MlflowServer

NAME = "clipping_vs_batch_size"
EPOCHS = 32
FLAGS = f"--batch-sizes 64 128 --clippings 0.08 --seeds 1 --epochs {EPOCHS}".split()
CELLS = 6  # two batch sizes by no clipping, one, and the batch-normalised twin


def start(stores: Stores, root: Path = ROOT) -> Run:
    return Run(stores, f"{NAME}.py", *FLAGS, root=root)


def check(stores: Stores) -> list[Recorded]:
    """Every cell has one result and every epoch of it, once; returns their runs."""
    parent = stores.parent()
    assert stores.outcome() == ("FINISHED", "finished")
    cells = [run for run in stores.runs() if run.info.run_id != parent.info.run_id]
    assert len({run.data.tags["cell"] for run in cells}) == len(cells) == CELLS
    asked = {
        tuple(run.data.params[key] for key in ("model", "batch_size", "clipping")): run
        for run in cells
    }
    assert len(asked) == CELLS
    for run in cells:
        outcome = run.data.tags["outcome"]
        assert outcome in ("finished", "diverged")
        assert run.info.status == STATES[outcome][1]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert "error" not in run.data.tags
        for metric in ("epoch", "train_loss", "val_top1"):
            steps = stores.steps(run, metric)
            assert steps == list(range(1, len(steps) + 1))
            assert len(steps) == EPOCHS or outcome == "diverged"
    table = (stores.folder / "runs" / NAME / "cells.csv").read_text()
    assert all(table.count(run.info.run_id) == 1 for run in cells)
    assert not (stores.folder / "runs" / NAME / "unsent" / "requests.jsonl").read_bytes()
    return cells


def finished(cells: list[Recorded]) -> list[Recorded]:
    return [run for run in cells if run.data.tags["outcome"] == "finished"]


@pytest.mark.long
def test_a_grid_whose_trials_and_machine_are_killed_goes_on_where_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, NAME, NAME)
    run = start(stores)
    for victim in ("ray::ImplicitFunc", "raylet", "gcs_server", ""):
        if run.process.poll() is not None:
            run = start(stores)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 1))
        wait_until(lambda run=run, victim=victim: bool(run.family(victim)), run)  # type: ignore[misc]
        found = run.family(victim)
        assert found, run.output()
        if victim == "ray::ImplicitFunc":
            chance.choice(found).kill()
            continue
        if not victim:  # the whole machine
            run.process.kill()
        for process in found:
            process.kill()
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.wait()
    run = start(stores)
    assert run.wait() == 0, run.output()
    cells = check(stores)
    check_exact(stores, chance.choice(finished(cells)))


def waiting(stores: Stores) -> int:
    """Bytes of what MLflow has not taken."""
    return (stores.folder / "runs" / NAME / "unsent" / "requests.jsonl").stat().st_size


def test_a_grid_outlives_its_mlflow_server_and_goes_on_after_a_kill_without_it(
    tmp_path: Path, chance: random.Random
) -> None:
    root = slow_copy(tmp_path / "copy")
    with MlflowServer(tmp_path) as server:
        stores = Stores(tmp_path, NAME, NAME, server.uri)
        run = start(stores, root)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 1))
        server.stop()
        time.sleep(chance.uniform(8, 12))
        assert run.process.poll() is None, run.output()
        assert waiting(stores) > 0
        server.start()
        wait_until(lambda: waiting(stores) == 0, run)
        train_on(run, stores)
        server.stop()
        wait_until(lambda: waiting(stores) > 0, run)
        time.sleep(chance.uniform(0, 5))
        assert run.process.poll() is None, run.output()
        run.process.kill()
        run.wait()
        assert " failed after " not in run.output()
        assert waiting(stores) > 0
        run = start(stores, root)
        assert run.wait() == 2, run.output()
        assert f"cannot open the tracking store {server.uri}" in run.output()
        server.start()
        run = start(stores, root)
        assert run.wait() == 0, run.output()
        cells = check(stores)
        check_exact(stores, chance.choice(finished(cells)))
