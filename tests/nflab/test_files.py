"""Files in object storage that fails: what passes is waited for, what stays is told at once."""

import errno
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.storage import files
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import Away, exists, local_copy, read_text, write_text
from nflab.storage.logs import kept_log
from nflab.studies.session import open_session
from nflab.terminal.interrupts import raise_on_interrupt
from tests.buckets import Bucket, Failure

FAILURES: list[Failure] = ["refuses", "answers 503", "resets"]


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with Bucket() as started:
        yield started


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.05)
    return server


def made(folder: Path, text: str) -> Path:
    """A checkpoint's files."""
    folder.mkdir()
    (folder / "state.pt").write_text(text)
    (folder / "weights.pt").write_bytes(bytes(6 << 20))  # more than S3 takes in one part
    return folder


@pytest.mark.parametrize("how", FAILURES)
def test_what_is_asked_while_the_bucket_fails_is_done_when_it_is_back(
    bucket: Bucket, tmp_path: Path, how: Failure, capfd: pytest.CaptureFixture[str]
) -> None:
    root = f"s3://{bucket.name}/{how.replace(' ', '-')}"
    checkpoints = Checkpoints(f"{root}/checkpoints")
    checkpoints.save(made(tmp_path / "1", "one"), 1)
    write_text(f"{root}/config.json", "é")

    def last() -> str:
        with checkpoints.last() as found:
            assert found.folder is not None
            assert (found.folder / "weights.pt").stat().st_size == 6 << 20
            return (found.folder / "state.pt").read_text()

    with ThreadPoolExecutor() as pool:
        with bucket.failing(how):
            asked = [
                pool.submit(write_text, f"{root}/experiment", "train"),
                pool.submit(read_text, f"{root}/config.json"),
                pool.submit(exists, f"{root}/config.json"),
                pool.submit(last),
            ]
            said = ""
            while said.count("waiting for") < len(asked):
                time.sleep(0.1)
                said += capfd.readouterr().out
            assert not any(one.done() for one in asked)
        assert [one.result(60) for one in asked] == [None, "é", True, "one"]
    assert read_text(f"{root}/experiment") == "train"


def test_a_checkpoint_is_saved_whole_though_the_bucket_fails_again_and_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(f"s3://{bucket.name}/torn/checkpoints")
    checkpoints.save(made(tmp_path / "1", "one"), 1)
    saving = threading.Thread(target=checkpoints.save, args=(made(tmp_path / "2", "two"), 2))
    saving.start()
    for _ in range(8):
        time.sleep(0.05)
        with bucket.failing("resets"):
            time.sleep(0.2)
    saving.join(60)
    names = ["complete", "state.pt", "weights.pt"]
    kept = bucket.files("torn/")
    expected = [f"checkpoints/epoch-00000{epoch}/{name}" for epoch in (1, 2) for name in names]
    assert sorted(kept) == expected
    assert bucket.read("torn/checkpoints/epoch-000002/state.pt") == b"two"
    assert kept["checkpoints/epoch-000002/weights.pt"] == 6 << 20


@pytest.mark.parametrize("how", ["answers 503", "is silent"])
def test_a_bucket_that_stays_away_is_told_in_a_sentence(bucket: Bucket, how: Failure) -> None:
    with bucket.failing(how), pytest.raises(Away) as told:
        write_text(f"s3://{bucket.name}/x", "", patience=0.5)
    assert str(told.value).startswith(f"s3://{bucket.name}/x cannot be used: ")
    assert "\n" not in str(told.value)


def test_an_interrupt_ends_the_waiting(bucket: Bucket) -> None:
    raise_on_interrupt()
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with bucket.failing("refuses"), pytest.raises(KeyboardInterrupt):
        write_text(f"s3://{bucket.name}/x", "", patience=60)


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("nowhere", None, "NO_SUCH_BUCKET"),
        (None, "answers 403", "INVALID_ACCESS_KEY_ID"),
        (None, "refuses", "cannot be used"),
    ],
)
def test_a_run_does_not_begin_without_its_bucket(
    bucket: Bucket, tmp_path: Path, name: str | None, how: Failure | None, reason: str
) -> None:
    name = name or bucket.name
    config = replace(Config(), storage=f"s3://{name}", tracking_uri=f"sqlite:///{tmp_path}/m.db")
    failing = nullcontext() if how is None else bucket.failing(how)
    with failing, pytest.raises(ConfigError, match=reason) as told:
        open_session(config, "train", resume=False)
    assert str(told.value).startswith(f"cannot write to the storage s3://{name}: ")
    assert "\n" not in str(told.value)


def test_what_does_not_pass_is_not_waited_for(
    bucket: Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        write_text("s3://nowhere/x", "")
    with bucket.failing("answers 403"), pytest.raises(OSError, match="ACCESS_DENIED"):
        read_text(f"s3://{bucket.name}/x")
    assert "waiting" not in capfd.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS])
def test_a_disk_that_fails_is_waited_for(
    number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
    tries = []

    def write() -> str:
        tries.append(number)
        if len(tries) < 5:
            raise OSError(number, os.strerror(number), "/x")
        return "written"

    assert files.patiently("/x", write) == "written"
    assert capfd.readouterr().out.count("waiting for /x, which cannot be used now") == 1


def test_a_disk_that_stays_full_is_told_in_a_sentence() -> None:
    def fill() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    with pytest.raises(Away, match=r"^/dev/full cannot be used: .*No space left on device$"):
        files.patiently("/dev/full", fill, patience=0)


def test_what_is_wrong_with_a_file_is_not_waited_for(tmp_path: Path) -> None:
    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR):
        with pytest.raises(OSError, match="x") as told:
            files.patiently("/x", functools.partial(_raise, OSError(number, "x")))
        assert not isinstance(told.value, Away)


def test_a_log_that_is_closed_writes_into_no_other_file(tmp_path: Path) -> None:
    with kept_log(str(tmp_path), 0):
        late = sys.stdout  # as a handler of a library keeps it
    other = (tmp_path / "other").open("wb", buffering=0)  # takes the number that is free
    with pytest.raises(ValueError, match="closed"):
        late.write("late words")
    other.close()
    assert (tmp_path / "other").read_bytes() == b""


def test_a_log_is_opened_when_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
    opens, tries = os.open, []

    def full(path: Path, *how: int) -> int:
        if str(path).endswith(".log"):
            tries.append(path)
            if len(tries) < 4:
                raise OSError(errno.ENOSPC, "full")
        return opens(path, *how)

    monkeypatch.setattr(os, "open", full)
    with kept_log(str(tmp_path), 0):
        print("written")
    assert len(tries) == 4
    assert "written" in (tmp_path / "rank-0.log").read_text()


def _raise(error: Exception) -> None:
    raise error


def test_what_a_full_disk_does_not_take_of_a_log_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = os.write

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    with kept_log(str(tmp_path), 0):
        print("before")
        monkeypatch.setattr(os, "write", full)
        print("while it is full, é")
        monkeypatch.setattr(os, "write", takes)
        print("after")
    lines = (tmp_path / "rank-0.log").read_text(encoding="utf-8").splitlines()
    assert lines[-3:] == ["before", "while it is full, é", "after"]


def test_a_log_is_in_the_bucket_as_far_as_its_last_report(bucket: Bucket) -> None:
    def stored() -> str:
        return read_text(f"s3://{bucket.name}/logged/rank-1.log") or ""

    with kept_log(f"s3://{bucket.name}/logged", 1) as log:
        log.report({"epoch": 1, "agc": ["long"]})
        assert stored().splitlines()[0].endswith("rank 1 begins")
        assert stored().splitlines()[1] == "{'epoch': 1}"
        with bucket.failing("refuses"):
            log.report({"epoch": 2})
        log.report({"epoch": 3})
        assert stored().splitlines()[1:] == ["{'epoch': 1}", "{'epoch': 2}", "{'epoch': 3}"]
        print("the end")
    assert stored().endswith("the end\n")
    with pytest.raises(ValueError, match="boom"), kept_log(f"s3://{bucket.name}/logged", 1):
        raise ValueError("boom")
    assert stored().count("rank 1 begins") == 2
    assert stored().endswith("ValueError: boom\n")


def test_pre_trained_weights_in_a_bucket_are_read_from_a_copy(bucket: Bucket) -> None:
    write_text(f"s3://{bucket.name}/weights.pt", "text")
    with local_copy(f"s3://{bucket.name}/weights.pt") as path:
        assert path.endswith(".pt") and Path(path).read_text() == "text"
    assert not Path(path).exists()
    with pytest.raises(FileNotFoundError), local_copy(f"s3://{bucket.name}/none.pt"):
        pass
