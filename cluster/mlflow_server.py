"""MLflow's server on the head of a cluster, started again whenever it ends.

`python mlflow_server.py start` starts it, in the place of one that runs, and waits until it
answers. The database is on the head's disk, copied to where results are kept every minute and
brought back from there by a new head; artifacts go there through the server, so that only the head
needs to reach it.

It answers the head alone, to which an SSH tunnel leads. With $NFLAB_MLFLOW_HOST, the name or
address by which others reach the head, it answers them too, if they give the password (see
password.py).
"""

import contextlib
import fcntl
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import urlopen

from backup import DATABASE, Backup
from password import protect

PORT = urlsplit(os.environ["MLFLOW_TRACKING_URI"]).port
"""Where jobs on the head ask."""

BACKUP_SECONDS = 60.0
"""Between two copies."""

START_SECONDS = 120.0
"""How long a start may take."""

FOLDER = DATABASE.parent

SERVER = FOLDER / "server.pid"
"""Says the id of the server's process, which leads a session of its own."""

LOCK = FOLDER / ".lock"
"""Held by the process that keeps the server running, whose id it says."""


def start() -> None:
    """Starts the server in the background, and waits until it answers."""
    host()
    FOLDER.mkdir(exist_ok=True)
    _end_earlier()
    _end_orphan()
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
    lock = LOCK.open("a")
    if not _taken(lock):
        return
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    backup = Backup(os.environ["NFLAB_RESULTS"])
    backup.take_over()
    _end_orphan()
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


def host() -> str | None:
    """The name by which others reach the head; None if nobody else is to ask MLflow.

    Ends the process with one sentence if it is no name.
    """
    name = os.environ.get("NFLAB_MLFLOW_HOST") or None
    if name is not None and (name == "0.0.0.0" or not re.fullmatch(r"[A-Za-z0-9.-]+", name)):
        sys.exit(
            f"error: NFLAB_MLFLOW_HOST={name} is not what browsers call the head: give its name or "
            "address, without http:// and port"
        )
    return name


def _serve() -> "subprocess.Popen[bytes]":
    # Several would share a socket that holds small answers back for 40 ms.
    words = [sys.executable, "-m", "mlflow", "server", "--port", str(PORT), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{DATABASE}"]
    words += ["--artifacts-destination", f"{os.environ['NFLAB_RESULTS']}/mlflow-artifacts"]
    # Its runners of jobs are for language models.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    name = host()
    if name is None:
        words += ["--host", "127.0.0.1"]
    else:
        words += ["--host", "0.0.0.0", "--app-name", "basic-auth"]
        # A page that pretends to be this server, or to belong to it, is answered nothing.
        words += ["--allowed-hosts", f"localhost:{PORT},127.0.0.1:{PORT},{name}:{PORT}"]
        words += ["--cors-allowed-origins", f"http://{name}:{PORT}"]
        env["MLFLOW_AUTH_CONFIG_PATH"] = str(protect(FOLDER))
        env["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)
    server = subprocess.Popen(words, env=env, start_new_session=True)
    SERVER.write_text(str(server.pid), encoding="utf-8")
    return server


def _end_orphan() -> None:
    """Ends the server of an earlier process that was killed: it would hold the port."""
    if SERVER.exists():
        pid = int(SERVER.read_text(encoding="utf-8") or 0)
        command = Path(f"/proc/{pid}/cmdline")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if pid and b"\0mlflow\0server\0" in command.read_bytes():
                os.killpg(pid, signal.SIGKILL)


def _end_earlier() -> None:
    """Ends the process that keeps a server running, if there is one: its settings may be old."""
    deadline = time.monotonic() + START_SECONDS
    with LOCK.open("a+") as lock:
        told = ""
        while not _taken(lock):
            lock.seek(0)
            pid = lock.read().strip()
            if pid and pid != told:
                told = pid
                os.kill(int(pid), signal.SIGTERM)
            if time.monotonic() > deadline:
                sys.exit(f"error: MLflow's process {pid} does not end")
            time.sleep(0.2)


def _taken(lock: IO[str]) -> bool:
    """Takes a lock unless another process holds it; returns whether it did."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server's processes: those that one left would hold its port."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _save(backup: Backup) -> None:
    try:
        backup.save()
    except Exception as error:  # the next one may succeed; MLflow goes on
        print(f"the database could not be copied: {error}", flush=True)


def _answers() -> bool:
    try:
        urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    {"start": start, "run": run}[sys.argv[1]]()
