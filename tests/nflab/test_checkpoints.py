import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from nflab.storage import checkpoints as module
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import read_text, write_text


@pytest.fixture(params=["path", "uri"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's folder as a path, and as the kind of address that object storage has."""
    folder = str(tmp_path / "a run")
    return folder if request.param == "path" else f"file://{tmp_path}/run"


def saved(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / f"made-{text}"
    folder.mkdir()
    (folder / "state.pt").write_text(text)
    return folder


def last(checkpoints: Checkpoints) -> str | None:
    with checkpoints.last() as found:
        return None if found.folder is None else (found.folder / "state.pt").read_text()


def test_the_last_two_checkpoints_are_kept_and_the_best(tmp_path: Path, address: str) -> None:
    checkpoints = Checkpoints(address)
    assert last(checkpoints) is None
    for epoch in (7, 9, 10, 11):
        checkpoints.save(saved(tmp_path, str(epoch)), epoch, best=7)
        assert last(Checkpoints(address)) == str(epoch)
    folder = Path(address.removeprefix("file://"))
    kept = [f"epoch-{epoch:06d}" for epoch in (7, 10, 11)]
    assert sorted(path.name for path in folder.iterdir()) == kept


@pytest.mark.parametrize("how", ["a bit", "cut off", "gone", "the mark"])
def test_a_checkpoint_that_is_not_as_written_is_left_aside(
    tmp_path: Path, address: str, how: str
) -> None:
    checkpoints = Checkpoints(address)
    for epoch in (1, 2):
        checkpoints.save(saved(tmp_path, f"state {epoch}"), epoch)
    folder = Path(address.removeprefix("file://")) / "epoch-000002"
    file = folder / ("complete" if how == "the mark" else "state.pt")
    if how == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[3] ^= 16
        file.write_bytes(data[:5] if how == "cut off" else data)
    with checkpoints.last() as found:
        assert found.folder is not None
        assert (found.folder / "state.pt").read_text() == "state 1"
    assert found.damaged == (
        f"the checkpoint of epoch 2 is left aside, for {file.name} is not what was written"
    )


def test_a_checkpoint_from_before_it_said_what_is_in_it_is_read(
    tmp_path: Path, address: str
) -> None:
    checkpoints = Checkpoints(address)
    checkpoints.save(saved(tmp_path, "old"), 1)
    mark = Path(address.removeprefix("file://")) / "epoch-000001" / "complete"
    assert json.loads(mark.read_text())["state.pt"]["bytes"] == 3
    mark.write_bytes(b"")
    assert last(checkpoints) == "old"


def test_nothing_is_on_disk_without_the_mark_before_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the power takes with it is at most what came after: all files are synced before the
    mark is made, and the mark and its folders before others are forgotten."""
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        marked = (tmp_path / "run" / "epoch-000002" / "complete").exists()
        before = (tmp_path / "run" / "epoch-000000").exists()
        synced.append(f"{path.name} {'marked' if marked else 'unmarked'} {before}")
        fsync(descriptor)

    checkpoints = Checkpoints(str(tmp_path / "run"))
    for epoch in (0, 1):
        checkpoints.save(saved(tmp_path, str(epoch)), epoch)
    monkeypatch.setattr(os, "fsync", spy)
    checkpoints.save(saved(tmp_path, "2"), 2)
    assert synced == [
        "state.pt unmarked True",
        "complete marked True",
        "epoch-000002 marked True",
        "run marked True",
    ]
    assert not (tmp_path / "run" / "epoch-000000").exists()


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path, address: str) -> None:
    checkpoints = Checkpoints(address)
    checkpoints.save(saved(tmp_path, "1"), 1)
    half = Path(address.removeprefix("file://")) / "epoch-000002"
    half.mkdir()
    (half / "state.pt").write_text("hal")
    assert last(checkpoints) == "1"
    checkpoints.save(saved(tmp_path, "2"), 2)
    assert last(checkpoints) == "2"


def ending_at(line: int) -> Any:
    """What ends this process before the so manieth line of the module that it executes."""
    lines = itertools.count()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line" and next(lines) == line:
            os._exit(9)
        return trace

    return trace


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_line_of_saving_leaves_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    """Processes end, as by kill -9, at the first line of it, the second, ..., the last."""
    begun = Checkpoints(str(tmp_path / "begun"))
    for epoch in (1, 2):
        begun.save(saved(tmp_path, str(epoch)), epoch, best=1)
    content, seen = saved(tmp_path, "3"), set()
    for killed_at in itertools.count():
        folder = tmp_path / str(killed_at)
        shutil.copytree(tmp_path / "begun", folder)
        child = os.fork()
        if child == 0:
            sys.settrace(ending_at(killed_at))
            Checkpoints(str(folder)).save(content, 3, best=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = last(Checkpoints(str(folder)))
        assert found in ("2", "3"), killed_at
        seen.add(found)
        again = Checkpoints(str(folder))
        again.save(content, 3, best=1)
        assert {path.name for path in folder.iterdir()} == {f"epoch-00000{n}" for n in (1, 2, 3)}
        assert last(again) == "3"
        shutil.rmtree(folder)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert killed_at > 30
    assert seen == {"2", "3"}


def test_small_files_are_read_as_written(address: str) -> None:
    assert read_text(f"{address}/deep/config.json") is None
    write_text(f"{address}/deep/config.json", "é\n")
    write_text(f"{address}/deep/config.json", "ü\n")
    assert read_text(f"{address}/deep/config.json") == "ü\n"
