"""The machine that a person sits at: on the hosts' network, with a home of its own."""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.hosts import USER, Host
from tests.conftest import ROOT


class Laptop:
    """Runs commands in the checkout, inside a host."""

    def __init__(self, host: Host, env: dict[str, str]) -> None:
        self.host = host
        self.env = {
            **env,
            "HOME": f"/home/{USER}",
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "TMPDIR": f"/home/{USER}",  # the launcher's cache is this laptop's own
            "TERM": "dumb",
            "PYTHONUNBUFFERED": "1",  # what is said is read at once, as on a terminal
        }

    @property
    def home(self) -> Path:
        """Its home, seen from outside."""
        return self.host.home

    def run(self, command: str, timeout: float = 600, **env: str) -> str:
        """What a command prints, which must succeed."""
        code, said = self.attempt(command, timeout, **env)
        assert code == 0, f"{command}\n{said}"
        return said

    def attempt(self, command: str, timeout: float = 600, **env: str) -> tuple[int, str]:
        """Exit code of a command, and what it prints."""
        done = subprocess.run(
            self._inside(command, env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def ask(self, code: str, **env: str) -> Any:
        """The JSON that Python code prints."""
        return json.loads(self.run(f"python -c {shlex.quote(code)}", **env).splitlines()[-1])

    @contextmanager
    def running(
        self, command: str, log: Path, ready: Callable[[], bool]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A command that goes on in the background, from when it is ready."""
        with log.open("ab") as said:
            process = subprocess.Popen(
                self._inside(command, {}),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 300
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(20)

    def answers(self, url: str) -> bool:
        """Whether a server answers here."""
        return self.attempt(f"curl --silent --fail --max-time 3 --output /dev/null {url}")[0] == 0

    def _inside(self, command: str, env: dict[str, str]) -> list[str]:
        variables = [f"{key}={value}" for key, value in {**self.env, **env}.items()]
        enter = f"nsenter --target {self.host.init} --net --pid --mount --uts --ipc --wd={ROOT}"
        return [*enter.split(), "env", "-i", *variables, "bash", "-c", command]
