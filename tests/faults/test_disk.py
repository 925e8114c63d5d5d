"""A disk that is full for a while: everything waits, and nothing is lost."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Run, check_exact, train_on
from tests.faults.stores import Stores

FULL_SECONDS = 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one, for all that a sweep keeps."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_sweep_outlives_a_full_disk(disk: Path) -> None:
    stores = Stores(disk, "agc_sweep", "s")
    run = Run(stores, "agc_sweep.py", *"--name s --trials 2 --epochs 12".split())
    train_on(run, stores)
    filler = disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
    for _ in range(FULL_SECONDS):
        assert run.process.poll() is None, run.output()
        time.sleep(1)
    filler.unlink()
    assert run.wait() == 0, run.output()
    stores.agree(2)
    assert stores.outcome() == ("FINISHED", "finished")
    assert set(stores.outcomes().values()) <= {"finished", "pruned"}
    logs = "".join(stores.logs().values()) + run.output()
    assert "which cannot be used now" in logs
    finished = [n for n, outcome in stores.outcomes().items() if outcome == "finished"]
    check_exact(stores, stores.children()[finished[0]])
