"""MLflow's server as the head of a cluster runs it: on the loopback, or behind a password."""

import importlib
import os
import stat
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

from tests.conftest import ROOT, free_port, stop_marked

NAME = "head.example"

RECORD = """
import sys
from nflab.recording.tracker import Tracker
tracker = Tracker(sys.argv[1], "/nowhere", "experiment")
run = tracker.start("run", {})
tracker.log_params(run, {"clipping": 0.1})
tracker.add_text(run, "said", "said.txt")
tracker.finish(run, "finished")
print(tracker.outcome(run))
"""


class Server:
    """The server of a head whose home is `home`."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "NFLAB_TEST": f"mlflow-of-test-{home}",
            "NFLAB_RESULTS": str(home / "results"),
            "MLFLOW_TRACKING_URI": self.uri,
        }

    def start(self, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(ROOT / "cluster" / "mlflow_server.py"), "start"],
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=200,
        )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("NFLAB_TEST") == self.env["NFLAB_TEST"]:
                    found.append(process)
            except psutil.Error:  # already gone
                continue
        return found

    def listens_at(self) -> set[str]:
        """Addresses of the sockets that anyone can connect to."""
        return {
            connection.laddr.ip
            for process in self.processes()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    def status(self, password: str | None, user: str = "nflab", host: str | None = None) -> int:
        """What a request for all experiments is answered."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1"
        )
        if password is not None:
            given = b64encode(f"{user}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {given}")
        if host is not None:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code

    def record(self, **env: str) -> "subprocess.CompletedProcess[str]":
        """A run that a process on the head records."""
        return subprocess.run(
            [sys.executable, "-c", RECORD, self.uri],
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def password(self) -> str:
        (line,) = (
            line
            for line in (self.home / ".mlflow" / "credentials").read_text().splitlines()
            if line.startswith("mlflow_tracking_password")
        )
        return line.split(" = ")[1]


@contextmanager
def served(home: Path) -> Iterator[Server]:
    server = Server(home)
    try:
        yield server
    finally:
        stop_marked(server.env["NFLAB_TEST"])


def test_only_behind_a_password_others_than_this_machine_are_answered(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        assert server.start().returncode == 0
        assert server.listens_at() == {"127.0.0.1"}
        assert server.status(None) == 200
        assert not (tmp_path / ".mlflow").exists()

        started = server.start(NFLAB_MLFLOW_HOST=NAME)  # takes the place of the other
        assert started.returncode == 0, started.stdout + started.stderr
        assert "0.0.0.0" in server.listens_at()
        assert len(server.password) == 32
        for file in (".mlflow/credentials", "mlflow/password.ini"):
            assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o600

        assert server.status(None) == 401
        assert server.status("0" * 32) == 401
        assert server.status("password1234", user="admin") == 401  # MLflow's own, long ago
        assert server.status(server.password) == 200
        assert server.status(server.password, host=f"{NAME}:{server.port}") == 200
        assert server.status(server.password, host="another.example") == 403

        told = server.record()
        assert told.stdout == "finished\n", told.stderr
        refused = server.record(MLFLOW_TRACKING_PASSWORD="0" * 32)
        assert refused.stderr.splitlines()[-1] == (
            f"nflab.settings.errors.ConfigError: the tracking store {server.uri} refuses the user "
            "and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write "
            "them into ~/.mlflow/credentials"
        )

        words = [word for process in server.processes() for word in process.cmdline()]
        assert not [word for word in words if server.password in word]
        holding = [
            path.relative_to(tmp_path).as_posix()
            for path in tmp_path.rglob("*")
            if path.is_file() and server.password.encode() in path.read_bytes()
        ]
        assert sorted(holding) == [".mlflow/credentials", "mlflow/password.ini"]


def test_the_password_stays_until_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "cluster"))
    password = importlib.import_module("password")
    monkeypatch.setattr(password, "CREDENTIALS", tmp_path / ".mlflow" / "credentials")
    users, found = tmp_path / "users.db", []
    for _ in range(2):
        found.append(password.protect(tmp_path).read_text())
        users.touch()
    assert found[0] == found[1]
    (tmp_path / ".mlflow" / "credentials").unlink()
    found.append(password.protect(tmp_path).read_text())
    assert found[1] != found[2]
    assert not users.exists()  # whoever knew the one before is asked for the new one


@pytest.mark.parametrize("name", ["0.0.0.0", "http://head.example", "head.example:5000"])
def test_what_is_no_name_of_the_head_is_refused(tmp_path: Path, name: str) -> None:
    with served(tmp_path) as server:
        refused = server.start(NFLAB_MLFLOW_HOST=name)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"error: NFLAB_MLFLOW_HOST={name} is not what browsers")
        assert refused.stderr.count("\n") == 1
        assert server.processes() == []


def test_a_server_whose_keeper_was_killed_makes_room_for_the_next(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        assert server.start().returncode == 0
        orphans = set(server.processes())
        (keeper,) = [p for p in orphans if "mlflow_server.py" in " ".join(p.cmdline())]
        keeper.kill()
        started = server.start()
        assert started.returncode == 0, started.stdout + started.stderr
        assert not orphans & set(server.processes())
        assert server.status(None) == 200
