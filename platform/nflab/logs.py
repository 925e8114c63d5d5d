"""The full log of each process of a run, kept beside its checkpoints."""

import contextlib
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nflab.files import is_local, write_text


@contextlib.contextmanager
def kept_log(folder: str, rank: int) -> Iterator[None]:
    """While in use, all that this process prints goes to `folder`/rank-R.log, and an error's
    traceback too. In object storage the file appears at the end."""
    if is_local(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"rank-{rank}.log"
    else:
        path = Path(tempfile.mkdtemp()) / f"rank-{rank}.log"
    with (
        path.open("a", buffering=1, encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} begins")
        try:
            yield
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            raise
        finally:
            log.flush()
            if not is_local(folder):
                write_text(f"{folder}/rank-{rank}.log", path.read_text(encoding="utf-8"))


def without_trace(metrics: dict[str, Any]) -> dict[str, Any]:
    """A report as a log shows it: without what is recorded of every layer and step."""
    return {key: value for key, value in metrics.items() if key != "agc"}
