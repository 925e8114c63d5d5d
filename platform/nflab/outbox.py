"""What MLflow is to be told, kept on disk until it has taken it.

Runs go on while MLflow's server is away: every request is written to a file before it is sent, and
a thread sends them in their order as soon as the server answers. A request that MLflow has already
taken changes nothing when it is sent again, so one whose answer was lost is simply repeated.
"""

import json
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nflab.config import ConfigError
from nflab.progress import console
from nflab.tracking import Tracker, is_away

RETRY_SECONDS = 1.0
"""Between two tries while the server is away."""

PATIENCE_SECONDS = 600.0
"""How long a run waits at its end for a server that is away."""

SHORT_PATIENCE_SECONDS = 5.0
"""How long one that was interrupted waits for it."""

_NEW = "new-"


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
        self._away = False
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting: deque[dict[str, Any]] = deque()
        if self._file.is_file():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    self._waiting.append(json.loads(line))
                except json.JSONDecodeError:  # torn by a kill: it was never acted upon
                    break
        self._log = self._file.open("a", encoding="utf-8")
        self._changed = threading.Condition()
        threading.Thread(target=self._send_all, name="outbox", daemon=True).start()

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

        Raises:
            Refused: MLflow answered to an earlier request that it will never take it.
        """
        request = {"call": call, "run": run, "arguments": arguments}
        with self._changed:
            self._raise_refused()
            self._log.write(json.dumps(request) + "\n")
            self._log.flush()
            self._waiting.append(request)
            self._changed.notify_all()

    def put_file(self, run: str, name: str, write: Callable[[Path], None]) -> None:
        """Stores a file called `name`, which `write` makes, as an artifact of the run."""
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        write(folder / name)
        self.put("add_file", run, path=str(folder / name))

    def drain(self, patience: float = PATIENCE_SECONDS) -> None:
        """Waits until MLflow has taken everything.

        Raises:
            ConfigError: it is away for longer than `patience` seconds.
            Refused: see `put`.
        """
        deadline, told = time.monotonic() + patience, False
        with self._changed:
            while self._waiting and self._refused is None:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"MLflow at {self._tracker.uri} does not answer: what it has not taken is "
                        f"kept in {self._folder}, and sent when the same run is continued"
                    )
                if self._away and not told:
                    told = True
                    console().print(
                        f"waiting for MLflow at {self._tracker.uri}, which does not answer",
                        markup=False,
                    )
                self._changed.wait(0.5)
            self._raise_refused()

    def empties(self) -> bool:
        """Whether MLflow takes everything within a few seconds."""
        try:
            self.drain(SHORT_PATIENCE_SECONDS)
        except ConfigError:
            return False
        return True

    def close(self) -> None:
        """Ends the thread; what was not sent stays on disk."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _raise_refused(self) -> None:
        if self._refused is not None:
            refused, self._refused = self._refused, None
            raise refused

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                request = self._waiting[0]
            try:
                self._send(request)
            except Exception as error:  # clients and drivers of stores raise their own kinds
                self._away = is_away(error)
                if self._away:
                    time.sleep(RETRY_SECONDS)
                    continue
                self._refused = Refused(f"MLflow refused {request['call']!r}: {error}")
            self._away = False
            with self._changed:
                self._waiting.popleft()
                if not self._waiting:
                    self._log.truncate(0)
                self._changed.notify_all()

    def _send(self, request: dict[str, Any]) -> None:
        call, key, arguments = request["call"], request["run"], request["arguments"]
        if call == "start":
            self._ids[key] = self._tracker.start(**arguments, key=key)
            return
        run_id = self._ids.get(key) or (self._tracker.started(key) if key.startswith(_NEW) else key)
        getattr(self._tracker, call)(run_id, **arguments)
        if call == "add_file":
            shutil.rmtree(Path(arguments["path"]).parent)
