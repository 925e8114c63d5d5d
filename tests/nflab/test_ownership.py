"""Who runs a run: claims on real boards, of living, dead and distant processes."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from nflab.recording.tracker import Tracker
from nflab.storage import ownership
from nflab.storage.ownership import Board, Claim, FolderBoard, Owned, Ownership, living

ELSEWHERE = Claim("f" * 32, "node-7", "another boot", 1, "1", owns=True)
"""A claim of another machine, of a token after all others."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and watches of fractions of a second."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 0.6)
    monkeypatch.setattr(ownership, "LOOK_SECONDS", 0.02)


@pytest.fixture
def board(tmp_path: Path) -> FolderBoard:
    return FolderBoard(str(tmp_path))


@pytest.fixture
def beating(board: FolderBoard) -> Iterator[Callable[[Claim], None]]:
    """Keeps a claim beating, as its process on another machine would."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def begin(claim: Claim) -> None:
        def beat() -> None:
            number = 0
            while not ended.wait(0.05):
                number += 1
                board.put(dataclasses.replace(claim, beat=number))

        board.put(claim)
        threads.append(threading.Thread(target=beat))
        threads[-1].start()

    yield begin
    ended.set()
    for thread in threads:
        thread.join()


def dead(**changes: object) -> Claim:
    """A claim of a process of this machine that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    mine = Ownership()._claim
    return dataclasses.replace(mine, token="0" * 32, pid=process.pid, owns=True, **changes)


def test_of_many_who_ask_at_once_one_owns_it(board: FolderBoard) -> None:
    start, owners, refused = threading.Barrier(8), [], []

    def ask() -> None:
        mine = Ownership()
        start.wait()
        try:
            mine.take(board, "r")
            owners.append(mine)
        except Owned:
            refused.append(mine)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)
    assert [claim.owns for claim in board.claims().values()] == [True]
    owners[0].release()
    assert board.claims() == {}


def test_a_second_process_is_refused_and_told_who_runs_it(board: FolderBoard) -> None:
    first = Ownership()
    first.take(board, "r")
    with pytest.raises(Owned, match=f"another process is running r, process {os.getpid()} on "):
        Ownership().take(board, "r")
    first.release()
    second = Ownership()
    second.take(board, "r")
    second.release()


@pytest.mark.parametrize("recycled", [False, True])
def test_a_process_of_this_machine_that_has_ended_is_followed_at_once(
    board: FolderBoard, recycled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 3600.0)
    left = dead()
    if recycled:  # its id is another process's now
        left = dataclasses.replace(left, pid=os.getpid(), began="1")
    board.put(left)
    said: list[str] = []
    mine = Ownership()
    mine.take(board, "r", said.append)
    assert said == [f"r is taken over from {left}, which has gone"]
    assert list(board.claims()) == [mine._claim.token]
    mine.release()


def test_an_owner_on_another_machine_is_watched(
    board: FolderBoard, beating: Callable[[Claim], None]
) -> None:
    beating(ELSEWHERE)
    with pytest.raises(Owned, match="process 1 on node-7"):
        Ownership().take(board, "r")
    assert list(board.claims()) == [ELSEWHERE.token]


def test_one_on_another_machine_that_stands_still_is_followed_after_a_while(
    board: FolderBoard,
) -> None:
    # What its clock says does not matter: it counts how long it stood still before one's eyes.
    board.put(dataclasses.replace(ELSEWHERE, beat=10**9))
    said: list[str] = []
    mine = Ownership()
    mine.take(board, "r", said.append)
    assert said == [
        "r is claimed by another machine: watching for up to 1 s",
        "r is taken over from process 1 on node-7, which has gone",
    ]
    mine.release()


class Late(FolderBoard):
    """A board on which another machine's claim beats after it was looked at a few times."""

    looks = 0

    def claims(self) -> dict[str, Claim]:
        self.looks += 1
        beat = int(self.looks > 5)
        return {**super().claims(), ELSEWHERE.token: dataclasses.replace(ELSEWHERE, beat=beat)}


def test_one_that_beats_late_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 3600.0)
    with pytest.raises(Owned, match="process 1 on node-7"):
        Ownership().take(Late(str(tmp_path)), "r")


def test_who_asks_goes_on_beating_while_it_watches(board: FolderBoard) -> None:
    """Two machines that both watch a dead owner must not take each other for dead."""
    board.put(dataclasses.replace(ELSEWHERE, token="5" * 32))
    mine = Ownership()
    thread = threading.Thread(target=mine.take, args=(board, "r"))
    thread.start()
    beats = set()
    while thread.is_alive():
        beats |= {c.beat for t, c in board.claims().items() if t == mine._claim.token}
        time.sleep(0.01)
    thread.join()
    assert len(beats) > 3
    mine.release()


def test_one_whose_run_was_taken_over_ends(
    board: FolderBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its machine slept for longer than another watched."""
    ended = threading.Event()
    monkeypatch.setattr(os, "kill", lambda pid, number: pid == os.getpid() and ended.set())
    mine = Ownership()
    mine.take(board, "r")
    board.put(ELSEWHERE)
    assert ended.wait(10)
    assert mine.lost
    mine.release()
    assert list(board.claims()) == [ELSEWHERE.token]


class Slow(FolderBoard):
    """A board whose writes take a while."""

    def put(self, claim: Claim) -> None:
        time.sleep(0.1)
        super().put(claim)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_a_beat_on_its_way_takes_nothing_back(tmp_path: Path, attempt: int) -> None:
    """Neither that the run is owned, nor that the claim was taken away."""
    board = Slow(str(tmp_path))
    mine = Ownership()
    mine.take(board, "r")
    time.sleep(0.03 * attempt)
    for _ in range(20):
        (claim,) = board.claims().values()
        assert claim.owns
        time.sleep(0.02)
    mine.release()
    time.sleep(0.3)
    assert board.claims() == {}


def test_the_last_write_of_one_that_has_gone_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = threading.Event()

    class Told(FolderBoard):
        """Tells when a claim was taken away."""

        def remove(self, token: str) -> None:
            super().remove(token)
            removed.set()

    board = Told(str(tmp_path))
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    board.put(ELSEWHERE)
    mine = Ownership()
    mine.take(board, "r", lambda said: None)
    removed.clear()
    board.put(ELSEWHERE)  # which was on its way for longer than one watched
    assert removed.wait(60)
    assert list(board.claims()) == [mine._claim.token]
    assert (killed, mine.lost) == ([], False)
    mine.release()


def test_one_whose_beats_reach_one_of_two_boards_lives(
    tmp_path: Path, board: FolderBoard, beating: Callable[[Claim], None]
) -> None:
    """Its storage is away, say, and shows a beat that is beyond those in MLflow."""
    still = FolderBoard(str(tmp_path / "still"))
    still.put(dataclasses.replace(ELSEWHERE, beat=10**9))
    beating(ELSEWHERE)
    assert set(living([still, board])) == {ELSEWHERE.token}


def test_what_lives_is_told_of_many_boards_at_once(
    tmp_path: Path, board: FolderBoard, beating: Callable[[Claim], None]
) -> None:
    beating(ELSEWHERE)
    gone = FolderBoard(str(tmp_path / "gone"))
    gone.put(dataclasses.replace(ELSEWHERE, token="1" * 32))
    gone.put(dead())
    assert set(living([board, gone])) == {ELSEWHERE.token}
    assert living([FolderBoard(str(tmp_path / "none"))]) == {}


def test_a_claim_that_is_torn_counts_for_nothing(tmp_path: Path, board: FolderBoard) -> None:
    board.put(ELSEWHERE)
    (tmp_path / "owners" / "a.json").write_text('{"token": "a"')
    (tmp_path / "owners" / "b.json").write_text("[]")
    assert list(board.claims()) == [ELSEWHERE.token]


def test_runs_of_one_name_in_mlflow_are_one_board(tmp_path: Path) -> None:
    """Two storages with one tracking store may begin a run of one name at once."""
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), "grids")
    one, other, third = (tracker.start(name, {}) for name in ("g", "g", "h"))
    first, second, apart = Ownership(), Ownership(), Ownership()
    first.take(tracker.board("g", one), "g")
    with pytest.raises(Owned, match="another process is running g"):
        second.take(tracker.board("g", other), "g")
    apart.take(tracker.board("h", third), "h")
    boards: list[Board] = [tracker.board("g", other), tracker.board("h", third)]
    assert len(living(boards)) == 2
    for owned in (first, apart):
        owned.release()
    client = MlflowClient(tracker.uri)

    def left() -> list[str]:
        tags = [key for run in (one, other, third) for key in client.get_run(run).data.tags]
        return [key for key in tags if key.startswith("owner.")]

    deadline = time.monotonic() + 30
    while left():  # nobody waits for a slow store
        assert time.monotonic() < deadline
        time.sleep(0.05)
