"""Errors and losses inside runs: recorded, told, and never in the way of the others."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table

from tests.conftest import edited_copy, run_script
from tests.faults.runs import (
    DISTURBED,
    ENDS_SECONDS,
    Run,
    check_as_undisturbed,
    slow_copy,
    train_on,
)
from tests.faults.stores import Stores


def run_broken(
    stores: Stores, address: str, script: str, flags: str, before: str, inserted: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a script of a copy whose training loop has lines inserted before a line of it."""
    edits = {"platform/nflab/learning/loop.py": (before, inserted)}
    copy = edited_copy(stores.folder / "copy", edits)
    env = {**stores.env, "RAY_ADDRESS": address}
    arguments = ["--name", stores.name, *flags.split()]
    return run_script(stores.folder, env, script, *arguments, root=copy)


def test_a_trial_that_crashes_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, ray_address: str
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "x")
    done = run_broken(
        stores,
        ray_address,
        "agc_sweep.py",
        "--trials 4 --epochs 1",
        "    batch_size = config",
        "    if config.optimizer.clipping is None or config.optimizer.clipping > 0.05:\n"
        "        raise ValueError('boom')\n",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = stores.outcomes()
    assert set(outcomes.values()) == {"failed", "finished"}
    stores.agree(4)
    for number, outcome in outcomes.items():
        if outcome == "failed":
            assert "ValueError: boom" in stores.tags(number)["error"]
            log = tmp_path / "runs" / "x" / "trials" / f"{number:04d}" / "logs" / "rank-0.log"
            assert "ValueError: boom" in log.read_text()
            assert str(log.parent) in done.stdout
    assert "ValueError: boom" in done.stdout


def test_a_crash_of_one_worker_ends_its_run_and_shows_that_workers_traceback(
    tmp_path: Path, ray_address: str
) -> None:
    stores = Stores(tmp_path, "train", "x")
    done = run_broken(
        stores,
        ray_address,
        "train.py",
        "--epochs 3 --num-workers 2",
        "        history.append(metrics)",
        "        if worker.rank == 1:\n            raise ValueError('rank 1 went boom')\n",
    )
    assert done.returncode == 1
    assert "rank 1 went boom" in done.stdout
    assert stores.outcome() == ("FAILED", "failed")
    log = tmp_path / "runs" / "x" / "logs" / "rank-1.log"
    assert "rank 1 went boom" in log.read_text()
    assert str(log.parent) in done.stdout
    # From the worker's last line to the end of the run.
    assert stores.parent().info.end_time / 1000 - log.stat().st_mtime < ENDS_SECONDS


def test_a_training_that_loses_a_worker_goes_on_to_the_same_result(
    tmp_path: Path, undisturbed: Stores
) -> None:
    stores = Stores(tmp_path, "train", "t")
    run = Run(stores, "train.py", "--name", "t", *DISTURBED, root=slow_copy(tmp_path / "copy"))
    train_on(run, stores)
    workers = run.family("RayTrainWorker")
    assert len(workers) == 2, run.output()
    workers[0].suspend()  # a straggler is waited for
    time.sleep(3)
    workers[0].resume()
    train_on(run, stores)
    assert {worker.pid for worker in workers} == {w.pid for w in run.family("RayTrainWorker")}
    workers[1].kill()
    assert run.wait() == 0, run.output()
    assert run.output().count("a process of the run was lost: it goes on from epoch") == 1
    check_as_undisturbed(stores, undisturbed)


@pytest.mark.long
def test_losses_of_a_trial_are_counted_anew_after_each_checkpoint(
    tmp_path: Path, ray_address: str
) -> None:
    """Each process of one trial dies in its second epoch, and of the other before its first."""
    stores = Stores(tmp_path, "agc_sweep", "x")
    copy = edited_copy(
        tmp_path / "copy",
        {
            "platform/nflab/learning/loop.py": (
                "        sums.begin()",
                "        first_is_lost = config.run.seed == 7\n"
                "        if epoch == first_epoch + 1 - first_is_lost and epoch < 4:\n"
                "            import os\n\n"
                "            os.kill(os.getpid(), 9)\n",
            ),
            "platform/nflab/running/losses.py": ("\nclass Losses", "LOST_PROCESSES = 1\n"),
        },
    )
    env = {**stores.env, "RAY_ADDRESS": ray_address}
    for name, seed in (("x", 3), ("y", 7)):
        flags = f"--name {name} --seed {seed} --trials 1 --epochs 5 --augmentation-level 0".split()
        done = run_script(tmp_path, env, "agc_sweep.py", *flags, root=copy)
        assert (done.returncode == 0) == (name == "x"), done.stdout + done.stderr
    sweeps = {run.data.tags.get("mlflow.runName"): run for run in stores.runs()}
    assert sweeps["x"].data.tags["outcome"] == "finished"
    assert sweeps["y"].data.tags["outcome"] == "failed"
    (finished,) = [
        r for r in stores.runs() if r.data.tags.get("mlflow.parentRunId") == sweeps["x"].info.run_id
    ]
    assert finished.data.tags["outcome"] == "finished"
    assert stores.steps(finished) == [1, 2, 3, 4, 5]


def test_a_sweep_whose_trials_all_fail_says_so(tmp_path: Path, ray_address: str) -> None:
    stores = Stores(tmp_path, "agc_sweep", "x")
    done = run_broken(
        stores,
        ray_address,
        "agc_sweep.py",
        "--trials 2 --epochs 1",
        "    batch_size = config",
        "    raise ValueError('boom')\n",
    )
    assert done.returncode == 1
    assert "every trial failed" in done.stderr
    assert stores.outcome() == ("FAILED", "failed")
    stores.agree(2)


def test_a_sweep_whose_trials_all_diverge_is_a_result(tmp_path: Path, ray_address: str) -> None:
    stores = Stores(tmp_path, "agc_sweep", "x")
    env = {**stores.env, "RAY_ADDRESS": ray_address}
    flags = "--name x --trials 2 --epochs 2 --base-learning-rate 1e6 --clipping none".split()
    done = run_script(tmp_path, env, "agc_sweep.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert stores.outcomes() == {1: "diverged", 2: "diverged"}
    assert stores.outcome() == ("FINISHED", "finished")
    stores.agree(2)


def test_the_workers_of_a_cut_trial_are_gone_while_the_sweep_goes_on(
    tmp_path: Path, ray_address: str
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "x")
    env = {**stores.env, "RAY_ADDRESS": ray_address}
    # The first rung is after 2 of 8 epochs, and only one trial in three passes it.
    flags = "--trials 3 --lookahead 1 --epochs 8 --num-workers 2 --augmentation-level 0".split()
    seen: set[int] = set()
    with ThreadPoolExecutor(max_workers=1) as pool:
        sweep = pool.submit(run_script, tmp_path, env, "agc_sweep.py", "--name", "x", *flags)
        while not sweep.done():
            held = workers_groups()
            outcomes = stores.outcomes()
            cut = {n for n, outcome in outcomes.items() if outcome == "pruned"} - seen
            if cut:
                deadline = time.monotonic() + ENDS_SECONDS
                while held & workers_groups():
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                seen |= cut if not sweep.done() else set()
            time.sleep(0.2)
        done = sweep.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen
    stores.agree(3)
    deadline = time.monotonic() + ENDS_SECONDS
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def workers_groups() -> set[str]:
    """The placement groups of two workers that hold their resources."""
    return {
        name
        for name, group in placement_group_table().items()
        if group["state"] == "CREATED" and len(group["bundles"]) == 2
    }
