"""Real processes killed at random moments: nothing is lost, nothing is repeated."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nflab.config import Config, from_json
from nflab.loop import train
from nflab.worker import Worker
from tests.conftest import ROOT
from tests.faults.stores import Stores

KILLS = 5


class Run:
    """A script started in a session of its own, with a Ray of its own."""

    def __init__(self, stores: Stores, script: str, *arguments: str) -> None:
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.log = (stores.folder / "output.log").open("a+")
        self.begun = self.output().count(" a run, on CPU")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "experiments" / script), *arguments],
            env={**env, **stores.env},
            cwd=stores.folder,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def family(self, word: str) -> list[psutil.Process]:
        """Processes below this one with a word in their command lines."""
        found: list[psutil.Process] = []
        if self.process.poll() is not None:
            return found
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has ended
                continue
        return found


def wait_until(condition: Callable[[], bool], run: Run, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if run.process.poll() is not None:
            return
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.2)


def train_on(run: Run, stores: Stores) -> None:
    """Waits until this run, not one before it, has recorded an epoch."""
    begun = run.begun

    def connected() -> bool:
        return run.output().count(" a run, on CPU") > begun

    wait_until(connected, run)
    before = reported(stores)
    wait_until(lambda: reported(stores) > before, run)


def reported(stores: Stores) -> int:
    """How many epochs have been recorded over all runs."""
    return sum(int(run.data.metrics.get("epoch", 0)) for run in stores.runs())


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("NFLAB_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"NFLAB_TEST_SEED={seed} repeats these moments")
    return random.Random(seed)


def check_exact(stores: Stores, number: int) -> None:
    """A finished trial has the very result of the same run without interruption."""
    run = stores.children()[number]
    path = Path(run.info.artifact_uri) / "config.json"
    reports: list[dict[str, float]] = []
    train(from_json(Config, path.read_text()), Worker(report=reports.append))
    for metric in ("val_loss", "val_top1", "test_top1"):
        assert reports[-1][metric] == run.data.metrics[metric]


def test_a_sweep_whose_driver_is_killed_goes_on_where_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    flags = "--name s --trials 5 --epochs 60".split()
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
        run.wait(10)
    arguments = ["--resume", "s"]
    run = Run(stores, "agc_sweep.py", *arguments)
    assert run.wait(300) == 0, run.output()
    stores.agree(5)
    assert stores.outcome() == ("FINISHED", "finished")
    assert set(stores.outcomes().values()) <= {"finished", "pruned", "diverged"}
    assert any("continues after epoch" in log for log in stores.logs().values())
    finished = [n for n, outcome in stores.outcomes().items() if outcome == "finished"]
    check_exact(stores, finished[0])


def test_a_sweep_outlives_its_trials_processes(tmp_path: Path, chance: random.Random) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    run = Run(stores, "agc_sweep.py", *"--name s --trials 6 --epochs 80".split())
    killed = 0
    while killed < KILLS and run.process.poll() is None:
        before = reported(stores)
        wait_until(lambda before=before: reported(stores) > before, run)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 1.5))
        if trials := run.family("ray::ImplicitFunc"):
            chance.choice(trials).kill()
            killed += 1
    assert run.wait(300) == 0, run.output()
    assert killed == KILLS
    stores.agree(6)
    # A trial may be among the failed if chance chose it four times.
    assert list(stores.outcomes().values()).count("failed") <= 1


def test_a_sweep_whose_ray_is_killed_goes_on_where_it_was(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    arguments = "--name s --trials 6 --epochs 80".split()
    for kill in range(KILLS):
        run = Run(stores, "agc_sweep.py", *arguments)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 1))
        victims = run.family("raylet" if kill % 2 else "gcs_server")
        assert victims, run.output()
        for process in victims:
            process.kill()
        try:
            run.wait(20)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.wait(10)
        arguments = ["--resume", "s"]
    run = Run(stores, "agc_sweep.py", *arguments)
    assert run.wait(300) == 0, run.output()
    stores.agree(6)
    assert stores.outcome() == ("FINISHED", "finished")
    assert set(stores.outcomes().values()) <= {"finished", "pruned", "diverged"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_soon_with_nothing_left_running(
    tmp_path: Path, chance: random.Random, number: signal.Signals
) -> None:
    stores = Stores(tmp_path, "agc_sweep", "s")
    run = Run(stores, "agc_sweep.py", *"--name s --trials 4 --epochs 30".split())
    wait_until(lambda: reported(stores) > 0, run)
    time.sleep(chance.uniform(0, 2))
    run.process.send_signal(number)
    assert run.wait(20) == 130, run.output()
    assert "--resume s" in run.output()
    assert all(r.info.status != "RUNNING" for r in stores.runs())
    assert all(t.state.name != "RUNNING" for t in stores.study().trials)
    assert stores.outcome() == ("KILLED", "interrupted")
    run = Run(stores, "agc_sweep.py", "--resume", "s")
    assert run.wait(300) == 0, run.output()
    stores.agree(4)
    assert stores.outcome() == ("FINISHED", "finished")


def test_an_interrupted_training_goes_on_to_the_same_result(
    tmp_path: Path, chance: random.Random
) -> None:
    stores = Stores(tmp_path, "train", "t")
    what = "--epochs 40 --batch-size 32 --num-workers 2".split()
    arguments = ["--name", "t", *what]
    for kill in range(KILLS):
        run = Run(stores, "train.py", *arguments)
        train_on(run, stores)
        time.sleep(chance.uniform(0, 1))
        if kill % 2:
            run.process.kill()
            run.wait(10)
        else:
            run.process.send_signal(signal.SIGINT)
            assert run.wait(20) == 130, run.output()
            assert stores.outcome() == ("KILLED", "interrupted")
        arguments = ["--resume", "t"]
    run = Run(stores, "train.py", *arguments)
    assert run.wait(200) == 0, run.output()
    run = Run(stores, "train.py", "--name", "u", *what)
    assert run.wait(200) == 0, run.output()
    interrupted, whole = sorted(stores.runs(), key=lambda r: str(r.info.run_name))
    assert stores.steps(interrupted) == stores.steps(whole) == list(range(1, 41))
    for metric in ("train_loss", "val_loss", "test_top1"):
        assert interrupted.data.metrics[metric] == whole.data.metrics[metric]
