"""Real processes killed at random moments: nothing is lost, nothing is repeated."""

import random
import signal
import subprocess
import time
from pathlib import Path

from tests.faults.runs import (
    ENDS_SECONDS,
    KILLS,
    Run,
    check_as_undisturbed,
    check_exact,
    reported,
    train_on,
    wait_until,
)
from tests.faults.stores import Stores


def test_a_sweep_whose_driver_is_killed_goes_on_where_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    flags = "--name s --trials 4 --epochs 40".split()
    for kill in range(KILLS):
        config = tmp_path / "runs" / "s" / "config.json"
        arguments = ["--resume", "s"] if config.exists() else flags
        run = Run(stores, "agc_sweep.py", *arguments)
        if kill % 2 == 0:  # in the middle of training, else at any moment of the start
            train_on(run, stores)
            time.sleep(chance.uniform(0, 2))
        else:
            time.sleep(chance.uniform(1, 20))
        run.process.kill()
        run.wait()
    arguments = ["--resume", "s"]
    run = Run(stores, "agc_sweep.py", *arguments)
    assert run.wait() == 0, run.output()
    stores.agree(4)
    assert stores.outcome() == ("FINISHED", "finished")
    assert set(stores.outcomes().values()) <= {"finished", "pruned", "diverged"}
    assert any("continues after epoch" in log for log in stores.logs().values())
    finished = [n for n, outcome in stores.outcomes().items() if outcome == "finished"]
    check_exact(stores, stores.children()[finished[0]])


def test_a_sweep_outlives_its_trials_processes(tmp_path: Path, chance: random.Random) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    run = Run(stores, "agc_sweep.py", *"--name s --trials 4 --epochs 40".split())
    killed = 0
    while killed < KILLS and run.process.poll() is None:
        before = reported(stores)
        wait_until(lambda before=before: reported(stores) > before, run)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 1.5))
        if trials := run.family("ray::ImplicitFunc"):
            chance.choice(trials).kill()
            killed += 1
    assert run.wait() == 0, run.output()
    assert killed == KILLS
    stores.agree(4)
    # A trial may be among the failed if chance chose it four times.
    assert list(stores.outcomes().values()).count("failed") <= 1


def test_a_sweep_whose_ray_is_killed_goes_on_where_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    arguments = "--name s --trials 4 --epochs 40".split()
    for kill in range(KILLS):
        run = Run(stores, "agc_sweep.py", *arguments)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 1))
        victims = run.family("raylet" if kill % 2 else "gcs_server")
        assert victims, run.output()
        for process in victims:
            process.kill()
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.wait()
        arguments = ["--resume", "s"]
    run = Run(stores, "agc_sweep.py", *arguments)
    assert run.wait() == 0, run.output()
    stores.agree(4)
    assert stores.outcome() == ("FINISHED", "finished")
    assert set(stores.outcomes().values()) <= {"finished", "pruned", "diverged"}


def test_an_interrupted_sweep_ends_with_nothing_left_running(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    arguments = "--name s --trials 2 --epochs 40".split()
    for number in (signal.SIGINT, signal.SIGTERM):
        run = Run(stores, "agc_sweep.py", *arguments)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 2))
        run.process.send_signal(number)
        assert run.wait(ENDS_SECONDS) == 130, run.output()
        assert "--resume s" in run.output()
        assert all(r.info.status != "RUNNING" for r in stores.runs())
        assert all(t.state.name != "RUNNING" for t in stores.study().trials)
        assert stores.outcome() == ("KILLED", "interrupted")
        arguments = ["--resume", "s"]
    run = Run(stores, "agc_sweep.py", *arguments)
    assert run.wait() == 0, run.output()
    stores.agree(2)
    assert stores.outcome() == ("FINISHED", "finished")


def test_an_interrupted_training_goes_on_to_the_same_result(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "train", "t")
    what = "--epochs 24 --batch-size 32 --num-workers 2".split()
    arguments = ["--name", "t", *what]
    for kill in range(KILLS):
        run = Run(stores, "train.py", *arguments)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 1))
        if kill % 2:
            run.process.kill()
            run.wait()
        else:
            run.process.send_signal(signal.SIGINT)
            assert run.wait(ENDS_SECONDS) == 130, run.output()
            assert stores.outcome() == ("KILLED", "interrupted")
        arguments = ["--resume", "t"]
    run = Run(stores, "train.py", *arguments)
    assert run.wait() == 0, run.output()
    check_as_undisturbed(stores, what, epochs=24)
