"""`cluster/orphan.sh`, with commands that only note that they were called."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMMANDS = {"pgrep": 'test -f "$HOME/raylet"', "sudo": 'echo "$@" >> "$HOME/called"'}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, body in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)
    return tmp_path


def start(home: Path) -> "subprocess.Popen[bytes]":
    path = f"{home}/bin:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "cluster" / "orphan.sh"), "2"]
    return subprocess.Popen(command, env={"HOME": str(home), "PATH": path}, start_new_session=True)


def test_a_worker_without_ray_is_shut_down_and_one_with_it_is_not(home: Path) -> None:
    (home / "raylet").touch()
    guard = start(home)
    try:
        time.sleep(5)
        assert guard.poll() is None
        assert not (home / "called").exists()
        assert start(home).wait(20) == 0  # there is one already
        (home / "raylet").unlink()
        deadline = time.monotonic() + 60
        while not (home / "called").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert (home / "called").read_text().splitlines()[0] == "shutdown -h now"
    finally:
        os.killpg(guard.pid, 9)
        guard.wait(20)
