"""MLflow's server on the head of a cluster, started again whenever it ends.

`python mlflow_server.py start` starts it unless it runs, and waits until it answers. The database
is on the head's disk, copied to where results are kept every minute and brought back from there by
a new head; artifacts go there through the server, so that only the head needs to reach it.
"""

import contextlib
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from urllib.request import urlopen

from backup import DATABASE, Backup

PORT = 5000

BACKUP_SECONDS = 60.0
"""Between two copies."""

START_SECONDS = 120.0
"""How long a start may take."""

FOLDER = DATABASE.parent


def start() -> None:
    """Starts the server in the background, and waits until it answers."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "server.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, __file__, "run"],
            cwd=FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not _answers():
        if time.monotonic() > deadline:
            sys.exit(f"error: MLflow does not start; {FOLDER}/server.log on the head says why")
        time.sleep(0.5)


def run() -> None:
    """Keeps the server running and its database copied, unless another process does."""
    lock = (FOLDER / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    backup = Backup(os.environ["NFLAB_RESULTS"])
    backup.restore()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    server = _serve()
    try:
        saved = time.monotonic()
        while True:
            time.sleep(1)
            if server.poll() is not None:
                _end(server)
                server = _serve()
            if time.monotonic() > saved + BACKUP_SECONDS:
                _save(backup)
                saved = time.monotonic()
    finally:
        _end(server)
        _save(backup)


def _serve() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += [
        "--port",
        str(PORT),
        "--workers",
        "2",
        "--backend-store-uri",
        f"sqlite:///{DATABASE}",
    ]
    command += ["--artifacts-destination", f"{os.environ['NFLAB_RESULTS']}/mlflow-artifacts"]
    # Its runners of jobs are for language models.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.Popen(command, env=env, start_new_session=True)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server's processes: those that one left would hold its port."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _save(backup: Backup) -> None:
    try:
        backup.save()
    except (OSError, sqlite3.Error) as error:  # the next one may succeed
        print(f"the database could not be copied: {error}", flush=True)


def _answers() -> bool:
    try:
        urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    {"start": start, "run": run}[sys.argv[1]]()
