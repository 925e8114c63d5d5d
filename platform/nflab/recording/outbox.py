"""What MLflow is to be told, kept on disk until it has taken it.

Runs go on while MLflow's server is away: every request is written to a file before it is sent, and
a thread sends them in their order as soon as the server answers. A request that MLflow has already
taken changes nothing when it is sent again, so one whose answer was lost is simply repeated. Only
what MLflow itself rejects is not sent again; it is kept in REJECTED.
"""

import json
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from nflab.recording.client import is_away, is_rejected
from nflab.recording.tracker import Tracker
from nflab.settings.errors import ConfigError
from nflab.storage.files import patiently
from nflab.terminal.wording import console

RETRY_SECONDS = 1.0
"""Between two tries while the server is away."""

PATIENCE_SECONDS = 600.0
"""How long a run waits at its end for a server that is away."""

SHORT_PATIENCE_SECONDS = 5.0
"""How long one that was interrupted waits for it."""

REJECTED = "rejected.jsonl"
"""File of the requests that MLflow will never take, each with the reason."""

_NEW = "new-"

T = TypeVar("T")


class Refused(ConfigError):
    """MLflow will never take a request: its run was deleted, say."""


class Outbox:
    """Requests to MLflow, sent in order by a thread of its own."""

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        """Takes up what an earlier process left in `folder`."""
        self._tracker, self._folder = tracker, folder
        self._file = folder / "requests.jsonl"
        self._ids: dict[str, str] = {}
        self._refused: Refused | None = None
        self._away: str | None = None
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting = deque(self._left())
        self._log = self._file.open("ab", buffering=0)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send_all, name="outbox", daemon=True)
        self._thread.start()

    def start(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Creates a run; returns what stands for its id in `put`."""
        key = f"{_NEW}{uuid.uuid4().hex}"
        when = int(time.time() * 1000)
        self.put("start", key, name=name, tags=dict(tags), parent=parent, when=when)
        return key

    def put(self, call: str, run: str, **arguments: Any) -> None:
        """Asks for a call of a method of the tracker that changes a run.

        Args:
            run: the run's id, or what `start` returned.
            arguments: of the method, as JSON has them.
        """
        request = {"call": call, "run": run, "arguments": arguments}
        with self._changed:
            patiently(
                str(self._file), partial(_add, self._log, json.dumps(request).encode() + b"\n")
            )
            self._waiting.append(request)
            self._changed.notify_all()

    def put_file(self, run: str, name: str, write: Callable[[Path], object]) -> None:
        """Stores a file called `name`, which `write` makes, as an artifact of the run."""
        folder = self._folder / uuid.uuid4().hex

        def make() -> None:
            folder.mkdir(exist_ok=True)
            write(folder / name)

        patiently(str(folder), make)
        self.put("add_file", run, path=str(folder / name))

    def drain(self, patience: float = PATIENCE_SECONDS) -> None:
        """Waits until MLflow has answered to everything.

        Raises:
            ConfigError: it is away for longer than `patience` seconds.
            Refused: it will never take one of the requests; told once.
        """
        deadline, told = time.monotonic() + patience, False
        with self._changed:
            while self._waiting:
                if time.monotonic() > deadline:
                    raise self._silent(self._away)
                if self._away and not told:
                    told = True
                    console().print(
                        f"waiting for MLflow at {self._tracker.uri}, which does not take what it "
                        f"is told: {self._away}",
                        markup=False,
                    )
                self._changed.wait(0.5)
            refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def read(self, ask: Callable[[], T]) -> T:
        """Waits as `drain` does; then returns what `ask` reads of MLflow, once it answers.

        Raises:
            ConfigError, Refused: as `drain` does.
        """
        self.drain()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return ask()
            except Exception as error:  # clients and drivers of stores raise their own kinds
                if not is_away(error):
                    raise
                if time.monotonic() > deadline:
                    raise self._silent(_reason(error)) from None
            time.sleep(RETRY_SECONDS)

    def empties(self) -> bool:
        """Whether MLflow answers to everything within a few seconds."""
        try:
            with suppress(Refused):
                self.drain(SHORT_PATIENCE_SECONDS)
        except ConfigError:
            return False
        return True

    def close(self) -> None:
        """Ends the thread, after the request on its way; what was not sent stays on disk."""
        with self._changed:
            self._closed = True
            self._log.close()
            self._changed.notify_all()
        self._thread.join(SHORT_PATIENCE_SECONDS)  # else two might send the same at once

    def _left(self) -> list[dict[str, Any]]:
        """The requests that an earlier process left; what a kill tore is removed."""
        content = self._file.read_bytes() if self._file.is_file() else b""
        requests, length = [], 0
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                requests.append(json.loads(line))
            except ValueError:  # it was never acted upon
                break
            length += len(line)
        if content:
            os.truncate(self._file, length)
        kept = [*requests, *self._rejected()]
        files = {Path(r["arguments"]["path"]).parent for r in kept if r["call"] == "add_file"}
        for folder in self._folder.iterdir():
            if folder.is_dir() and folder not in files:
                shutil.rmtree(folder)
        return requests

    def _rejected(self) -> list[dict[str, Any]]:
        file = self._folder / REJECTED
        found = []
        for line in file.read_bytes().splitlines() if file.exists() else []:
            with suppress(ValueError):  # a kill tore it
                found.append(json.loads(line))
        return found

    def _silent(self, reason: str | None) -> ConfigError:
        return ConfigError(
            f"MLflow at {self._tracker.uri} does not answer: what it has not taken is kept in "
            f"{self._folder}, and sent when the same run is continued"
            + (f" ({reason})" if reason else "")
        )

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                request = self._waiting[0]
            refused, self._away = self._try(request)
            with self._changed:
                if self._away:
                    self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)
                    continue
                if self._closed:  # the file is another's now, who sends this again
                    return
                self._refused = self._refused or refused
                self._waiting.popleft()
                if not self._waiting:
                    self._log.truncate(0)
                self._changed.notify_all()

    def _try(self, request: dict[str, Any]) -> tuple[Refused | None, str | None]:
        """Sends a request; returns why MLflow will never take it, and why it does not now."""
        try:
            self._send(request)
        except Exception as error:  # clients and drivers of stores raise their own kinds
            reason = _reason(error)
            if not (is_rejected(error) or isinstance(error, ConfigError)):
                return None, reason
            rejected = self._folder / REJECTED
            try:
                with rejected.open("ab", buffering=0) as file:
                    _add(file, json.dumps({**request, "reason": reason}).encode() + b"\n")
            except OSError as failure:  # it is asked for again until it can be kept
                return None, _reason(failure)
            return Refused(
                f"MLflow refused {request['call']!r} of a run, which is kept in {rejected}: "
                f"{reason}"
            ), None
        return None, None

    def _send(self, request: dict[str, Any]) -> None:
        call, key, arguments = request["call"], request["run"], request["arguments"]
        if call == "start":
            self._ids[key] = self._tracker.start(**arguments, key=key)
            return
        file = Path(arguments["path"]) if call == "add_file" else None
        if file is not None and not file.exists():  # sent by an earlier process
            return
        run_id = self._ids.get(key) or (self._tracker.started(key) if key.startswith(_NEW) else key)
        getattr(self._tracker, call)(run_id, **arguments)
        if file is not None:
            shutil.rmtree(file.parent)


def _add(file: FileIO, line: bytes) -> None:
    """Adds a line to a file, whole or not at all, and waits until it is on the disk: the machine
    may stop, not this process alone."""
    end = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
