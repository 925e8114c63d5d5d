"""A disk that is full for a while: everything waits, and nothing is lost."""

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nflab.storage.cache import Cache
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


def test_a_cache_on_a_full_disk_is_filled_when_there_is_room(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program fills the disk after there was room for the file, and then goes."""
    source = tmp_path / "shard"
    source.write_bytes(os.urandom(30 << 20))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    filler = disk / "filler"
    original = Cache._make_room

    def fill(self: Cache, size: int, wanted: Path) -> None:
        original(self, size, wanted)
        filler.write_bytes(bytes(30 << 20))
        threading.Timer(3, filler.unlink).start()

    monkeypatch.setattr(Cache, "_make_room", fill)
    monkeypatch.setenv("NFLAB_CACHE", str(disk / "cache"))
    fetched = Cache().fetch(f"file://{source}", digest, source.stat().st_size)
    assert fetched.read_bytes() == source.read_bytes()
    assert "which cannot be used now" in capsys.readouterr().out
    assert sorted(path.suffix for path in fetched.parent.iterdir()) == ["", ".lock", ".seen"]
