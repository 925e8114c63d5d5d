"""Who runs a run: one process at a time, wherever processes and stores are.

A process that runs one puts a claim on a board that all others see too: a folder beside the run's
checkpoints (`FolderBoard`), and MLflow's run of it (`recording.board`). While it lives the claim
beats. Clocks of two machines are never compared: a process of another machine counts as gone when
its claim has stood still for as long as one has watched it.

Boards can only be read and written, not locked, so claims follow Lamport's bakery: whoever asks
writes first and reads then, so that of two who ask at once at least one sees the other.
"""

import dataclasses
import json
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nflab.settings.errors import ConfigError
from nflab.storage.files import delete, list_files, read_text, write_text

BEAT_SECONDS = 5.0
"""Between two beats of a claim."""

WATCH_SECONDS = 30.0
"""How long a claim of another machine is watched before it counts as left."""

LOOK_SECONDS = 0.5
"""Between two looks at a claim that is watched."""


class Owned(ConfigError):
    """A run that another process is running."""


@dataclass(frozen=True)
class Claim:
    """What one process says of itself on a board."""

    token: str
    """Of this claim, unlike any other; of two who ask at once the lower one goes first."""
    host: str
    machine: str
    """The same for all processes that can see each other's ids, and for no others."""
    pid: int
    began: str
    """When the process began, as its machine tells it: ids are given again."""
    owns: bool = False
    """Whether it runs the run; else it asks to."""
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether its process can be looked for on this machine."""
        return self.machine == _machine()

    @property
    def has_ended(self) -> bool:
        """Whether its process, of this machine, has gone."""
        return _began(self.pid) != self.began


class Board(Protocol):
    """Where claims on one run stand."""

    def claims(self) -> Mapping[str, Claim]:
        """All of them, by token."""
        ...

    def put(self, claim: Claim) -> None:
        """Writes one, or writes it again."""
        ...

    def remove(self, token: str) -> None:
        """Takes one away, if it is there."""
        ...


class FolderBoard:
    """A board in the folder of a run: a file for each claim.

    Object storage that is away is not waited for: the next beat asks it again.
    """

    def __init__(self, folder: str) -> None:
        """`folder`: path or address of all that the run keeps."""
        self._uri = f"{folder}/owners"

    def claims(self) -> dict[str, Claim]:
        """All of them."""
        found = {}
        for uri in list_files(self._uri, patience=0):
            with suppress(FileNotFoundError):  # taken away by now
                claim = (
                    claim_of(read_text(uri, patience=0) or "") if uri.endswith(".json") else None
                )
                if claim is not None:
                    found[claim.token] = claim
        return found

    def put(self, claim: Claim) -> None:
        """Writes one, or writes it again."""
        write_text(f"{self._uri}/{claim.token}.json", text_of(claim), patience=0)

    def remove(self, token: str) -> None:
        """Takes one away, if it is there."""
        delete(f"{self._uri}/{token}.json", patience=0)


def text_of(claim: Claim) -> str:
    """A claim as it is written."""
    return json.dumps(dataclasses.asdict(claim))


def claim_of(text: str) -> Claim | None:
    """What `text_of` wrote; None if it is none."""
    try:
        return Claim(**json.loads(text))
    except (ValueError, TypeError):
        return None


class Ownership:
    """This process's claim on a run; ends with `release`, or with the process."""

    def __init__(self) -> None:
        self._claim = Claim(uuid.uuid4().hex, platform.node(), _machine(), os.getpid(), _began())
        self._hearts: list[_Heart] = []

    @property
    def lost(self) -> bool:
        """Whether another process has taken the run over: this one must not write any more."""
        return any(heart.lost for heart in self._hearts)

    def take(self, board: Board, what: str, say: Callable[[str], None] = print) -> None:
        """Claims a run on one more board.

        Args:
            what: the run, as a person calls it.
            say: is told when it is taken over from a process that has gone.

        Raises:
            Owned: another process runs it.
        """
        heart = _Heart(board, self._claim)
        try:
            while others := self._living(board, heart.gone, what, say):
                ahead = [c for c in others if c.owns or c.token < self._claim.token]
                if ahead:
                    raise Owned(
                        f"another process is running {what}, {ahead[0]}: wait for it, or end it"
                    )
                time.sleep(LOOK_SECONDS)  # it has asked too, and will see that it comes after us
            heart.own()
        except BaseException:
            heart.stop()
            raise
        self._hearts.append(heart)

    def release(self) -> None:
        """Takes the claim away from all boards, as far as they answer within a few seconds."""
        for heart in self._hearts:
            heart.stop()
        self._hearts.clear()

    def _living(
        self, board: Board, gone: set[str], what: str, say: Callable[[str], None]
    ) -> list[Claim]:
        """The claims of others; those of processes that have gone are taken away, and noted in
        `gone`."""
        others = {t: c for t, c in board.claims().items() if t != self._claim.token}
        if any(not claim.is_here for claim in others.values()):
            say(f"{what} is claimed by another machine: watching for up to {WATCH_SECONDS:.0f} s")
        alive = living([board], self._claim.token)
        for token in set(others) - set(alive):
            board.remove(token)
            gone.add(token)
            if others[token].owns:
                say(f"{what} is taken over from {others[token]}, which has gone")
        return list(alive.values())


class _Heart:
    """Keeps one claim beating on one board."""

    def __init__(self, board: Board, claim: Claim) -> None:
        self._board, self._claim = board, claim
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self.gone: set[str] = set()
        """Claims of processes that have gone, whose last write may yet come."""
        self.lost = False
        board.put(claim)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def own(self) -> None:
        """From now on the claim says that its process runs the run."""
        self._put(owns=True)

    def stop(self) -> None:
        """Takes the claim away, if the board answers; one that is left is seen to be of no
        process."""
        self._stopped.set()
        removal = threading.Thread(target=self._remove, name="heartbeat", daemon=True)
        removal.start()
        removal.join(BEAT_SECONDS)

    def _remove(self) -> None:
        with self._writing, suppress(Exception):  # after a beat that is on its way
            self._board.remove(self._claim.token)

    def _put(self, **changes: Any) -> None:
        with self._writing:
            if not self._stopped.is_set():
                claim = dataclasses.replace(self._claim, **changes)
                self._board.put(claim)
                self._claim = claim

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                others = {t: c for t, c in self._board.claims().items() if t != self._claim.token}
                for token in self.gone & others.keys():
                    self._board.remove(token)
                    del others[token]
                rivals = [c for c in others.values() if not (c.is_here and c.has_ended)]
                if self._claim.owns and any(claim.owns for claim in rivals):
                    self.lost = True
                    print("another process has taken this run over: ending", flush=True)
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                self._put(beat=self._claim.beat + 1)
            except Exception:  # whoever watches cannot reach it either
                continue


def living(boards: Sequence[Board], own: str = "") -> dict[str, Claim]:
    """The claims on boards whose processes live, by token.

    Those of this machine are known at once; others are watched until all of them have beaten on one
    board, for WATCH_SECONDS at most.

    Args:
        own: token of a claim that does not count.
    """

    def look() -> dict[tuple[int, str], Claim]:
        return {
            (place, token): claim
            for place, board in enumerate(boards)
            for token, claim in board.claims().items()
            if token != own and not (claim.is_here and claim.has_ended)
        }

    first = now = look()
    alive = {token for (_, token), claim in first.items() if claim.is_here}
    deadline = time.monotonic() + WATCH_SECONDS
    while {token for _, token in now} - alive and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        now = look()
        # A store that is away from its owner shows an old beat: one board that moves is enough.
        alive |= {at[1] for at, c in now.items() if at not in first or c.beat != first[at].beat}
    return {token: claim for (_, token), claim in now.items() if token in alive}


def _machine() -> str:
    """What processes that see each other's ids have in common: a boot, and a space of ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return f"{uuid.getnode():x}"
    return f"{boot.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def _began(pid: int | None = None) -> str:
    """When a process of this machine began; empty if there is none of this id."""
    pid = os.getpid() if pid is None else pid
    file = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").is_file():
            # The name, in brackets, may hold anything; a zombie has ended.
            state, *fields = file.read_text().rpartition(")")[2].split()
            return "" if state in "ZX" else fields[18]
        os.kill(pid, 0)
    except (OSError, IndexError):
        return ""
    return "unknown"
