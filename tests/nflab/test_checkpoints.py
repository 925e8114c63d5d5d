from pathlib import Path

import pytest

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
    with checkpoints.last() as folder:
        return None if folder is None else (folder / "state.pt").read_text()


def test_the_last_checkpoint_is_kept_and_no_other(tmp_path: Path, address: str) -> None:
    checkpoints = Checkpoints(address)
    assert last(checkpoints) is None
    for epoch in (9, 10, 11):
        checkpoints.save(saved(tmp_path, str(epoch)), epoch)
        assert last(Checkpoints(address)) == str(epoch)
    folder = Path(address.removeprefix("file://"))
    assert [path.name for path in folder.iterdir()] == ["epoch-000011"]


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path, address: str) -> None:
    checkpoints = Checkpoints(address)
    checkpoints.save(saved(tmp_path, "1"), 1)
    half = Path(address.removeprefix("file://")) / "epoch-000002"
    half.mkdir()
    (half / "state.pt").write_text("hal")
    assert last(checkpoints) == "1"
    checkpoints.save(saved(tmp_path, "2"), 2)
    assert last(checkpoints) == "2"


def test_small_files_are_read_as_written(address: str) -> None:
    assert read_text(f"{address}/deep/config.json") is None
    write_text(f"{address}/deep/config.json", "é\n")
    write_text(f"{address}/deep/config.json", "ü\n")
    assert read_text(f"{address}/deep/config.json") == "ü\n"
