"""Real processes killed at random moments: nothing is lost, nothing is repeated."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import (
    DISTURBED,
    ENDS_SECONDS,
    KILLS,
    Run,
    check_as_undisturbed,
    check_exact,
    train_on,
)
from tests.faults.stores import Stores


@pytest.mark.long
def test_a_sweep_whose_driver_is_killed_goes_on_where_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    flags = "--name s --trials 4 --epochs 24".split()
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


@pytest.mark.long
def test_an_interrupted_sweep_ends_with_nothing_left_running(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    arguments = "--name s --trials 2 --epochs 24".split()
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
    tmp_path: Path, chance: random.Random, undisturbed: Stores
) -> None:
    stores = Stores(tmp_path, "train", "t")
    arguments = ["--name", "t", *DISTURBED]
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
    check_as_undisturbed(stores, undisturbed)
