"""Digests of files, read once."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from nflab.data import contents
from nflab.data.contents import MANIFEST, digests


class Reads:
    """Counts the files that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        digest = contents._digest

        def spy(path: Path) -> tuple[int, bytes]:
            self.paths.append(path)
            return digest(path)

        monkeypatch.setattr(contents, "_digest", spy)

    def pop(self) -> list[str]:
        names = sorted(path.name for path in self.paths)
        self.paths.clear()
        return names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reads:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Reads(monkeypatch)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Files that have been at rest for long."""
    folder = tmp_path / "data"
    folder.mkdir()
    made = [folder / f"{number}.bin" for number in range(5)]
    for number, path in enumerate(made):
        path.write_bytes(bytes([number]) * 100)
    return made


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is read an hour from now, when files have been at rest."""
    now = time.time_ns
    monkeypatch.setattr(contents.time, "time_ns", lambda: now() + 3600 * 10**9)


def expected(paths: list[Path]) -> list[bytes]:
    return [hashlib.sha256(path.read_bytes()).digest() for path in paths]


def test_files_are_read_once(paths: list[Path], reads: Reads) -> None:
    root = paths[0].parent
    assert digests(root, paths) == expected(paths)
    assert len(reads.pop()) == 5
    assert digests(root, paths[::-1]) == expected(paths)[::-1]
    assert reads.pop() == []
    assert (root / MANIFEST).exists()


def test_a_file_that_changed_is_read_again_whatever_its_size_and_time(
    paths: list[Path], reads: Reads
) -> None:
    root = paths[0].parent
    digests(root, paths)
    reads.pop()
    before = paths[2].stat()
    paths[2].write_bytes(b"y" * 100)
    os.utime(paths[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests(root, paths) == expected(paths)
    assert reads.pop() == ["2.bin"]


def test_a_file_that_may_still_be_changing_is_not_remembered(
    paths: list[Path], reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = paths[0].parent
    made = max(path.stat().st_ctime_ns for path in paths)
    monkeypatch.setattr(contents.time, "time_ns", lambda: made + 10**9)
    for _ in range(2):
        assert digests(root, paths) == expected(paths)
        assert len(reads.pop()) == 5


def test_a_copied_manifest_does_not_fit(paths: list[Path], reads: Reads, tmp_path: Path) -> None:
    digests(paths[0].parent, paths)
    reads.pop()
    copy = Path(shutil.copytree(paths[0].parent, tmp_path / "copy"))
    copied = [copy / path.name for path in paths]
    assert digests(copy, copied) == expected(paths)
    assert len(reads.pop()) == 5


@pytest.mark.parametrize("broken", [b"", b"no table", b"PAR1" * 9])
def test_a_manifest_that_is_none_is_made_anew(
    paths: list[Path], reads: Reads, broken: bytes
) -> None:
    root = paths[0].parent
    (root / MANIFEST).write_bytes(broken)
    for again in (5, 0):
        assert digests(root, paths) == expected(paths)
        assert len(reads.pop()) == again


def test_a_folder_that_cannot_be_written_to_has_its_manifest_in_the_cache(
    paths: list[Path], reads: Reads, tmp_path: Path
) -> None:
    root = paths[0].parent
    (root / MANIFEST).mkdir()  # root may write everywhere else
    for again in (5, 0):
        assert digests(root, paths) == expected(paths)
        assert len(reads.pop()) == again
    assert len([*(tmp_path / "cache").rglob("*.parquet")]) == 1


def test_what_was_read_before_an_interrupt_is_not_read_again(
    paths: list[Path], reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = paths[0].parent
    monkeypatch.setattr(contents, "AT_ONCE", 1)
    digest = contents._digest

    def interrupted(path: Path) -> tuple[int, bytes]:
        if path == paths[3]:
            raise KeyboardInterrupt
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(contents, "_digest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digests(root, paths)
    reads.pop()
    assert digests(root, paths) == expected(paths)
    assert reads.pop() == ["3.bin", "4.bin"]


def test_a_name_that_is_no_text_is_a_name(paths: list[Path], reads: Reads) -> None:
    root = paths[0].parent
    odd = paths[0].rename(root / os.fsdecode(b"\xff.bin"))
    for again in (1, 0):
        assert digests(root, [odd]) == expected([odd])
        assert len(reads.pop()) == again
