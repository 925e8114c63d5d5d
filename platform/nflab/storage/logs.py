"""The full log of each process of a run, kept beside its checkpoints."""

import contextlib
import functools
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nflab.storage.files import (
    PATIENCE_SECONDS,
    Away,
    is_local,
    patiently,
    read_text,
    write_text,
)

WAITING_BYTES = 1 << 20
"""Of what a full disk did not take, so much at most is kept to be written later."""


UNPRINTED = ("agc", "profile_trace")
"""What a report holds that nobody reads in a log."""


class Log:
    """The log of one process: a file on its disk, and the copy of that in object storage."""

    def __init__(self, path: Path, uri: str | None) -> None:
        self.path, self._uri = path, uri

    def report(self, metrics: dict[str, Any]) -> None:
        """Prints a report, without what is recorded of every layer and step."""
        print({key: value for key, value in metrics.items() if key not in UNPRINTED})
        with contextlib.suppress(Away):  # the next copy has it too
            self.copy(patience=0)

    def copy(self, patience: float = PATIENCE_SECONDS) -> None:
        """Brings the copy up to date.

        Raises:
            OSError: object storage does not take it.
        """
        if self._uri is not None:
            write_text(self._uri, self.path.read_text(encoding="utf-8"), patience)


@contextlib.contextmanager
def kept_log(folder: str, rank: int) -> Iterator[Log]:
    """While in use, all that this process prints is added to `folder`/rank-R.log, and an error's
    traceback too. In object storage the file is brought up to date at each report and at the end.

    Raises:
        OSError: object storage does not take it.
    """
    uri = f"{folder}/rank-{rank}.log"
    with contextlib.ExitStack() as stack:
        if is_local(folder):
            log = Log(Path(uri), None)
            patiently(folder, functools.partial(log.path.parent.mkdir, parents=True, exist_ok=True))
        else:
            temporary = stack.enter_context(tempfile.TemporaryDirectory())
            log = Log(Path(temporary) / "log", uri)
            log.path.write_text(read_text(uri) or "", encoding="utf-8")
        try:
            with _printed_to(log.path):
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} begins")
                yield log
        except Away:  # it has waited long enough
            raise
        except BaseException:
            with contextlib.suppress(OSError):  # the error itself is what is to be told
                log.copy()
            raise
        with contextlib.suppress(Away):  # what was computed is safe: it is no failure of the run
            log.copy()


@contextlib.contextmanager
def _printed_to(path: Path) -> Iterator[None]:
    """All that is printed goes to a file; an error's traceback too."""
    file = patiently(str(path), functools.partial(_LogFile, path))
    with (
        contextlib.closing(file),
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            yield
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            raise


class _LogFile(io.TextIOBase):
    """What is printed while the disk takes nothing is written when it does again: a full disk is no
    failure of the run."""

    encoding = "utf-8"

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""

    def write(self, text: str) -> int:
        if self.closed:  # its number may be another file's by now
            raise ValueError("write to a log that is closed")
        self._waiting += text.encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        self._waiting = self._waiting[-WAITING_BYTES:]
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
