"""Keys, tokens and passwords stay where they were put: no output, record or process shows them."""

import os
import re
import secrets
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import ROOT, free_port, stop_marked

SWEEP = "experiments/agc_sweep.py --trials 2 --epochs 1 --batch-size 64 --name secrets"

KEYS = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{64}\b"
    r"|\bgh[pousr]_\w{36}|\bhf_\w{30}"
)
"""AWS's, SSH's, a token of Ray, GitHub's, Hugging Face's."""


@contextmanager
def watched(needles: list[str]) -> Iterator[list[str]]:
    """While in use, collects the arguments of all processes that show one of `needles`."""
    shown: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for process in psutil.process_iter():
                try:
                    words = " ".join(process.cmdline())
                except psutil.Error:  # already gone
                    continue
                if any(needle in words for needle in needles):
                    shown.append(words)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield shown
    finally:
        over.set()
        thread.join()


def run(command: list[str], env: dict[str, str]) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sessions(mark: str) -> set[Path]:
    """The folders in which the Ray of a head keeps its logs."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("NFLAB_TEST") == mark:
                words = " ".join(process.cmdline())
                found |= {Path(path) for path in re.findall(r"/\S*?/session_\d[\d_-]+", words)}
        except psutil.Error:  # already gone
            continue
    return found


def test_a_sweep_on_a_head_shows_no_secret(tmp_path: Path) -> None:
    mark, port = f"secrets-of-test-{tmp_path}", free_port()
    key_id, key = f"AKIA{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)
    env = {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NFLAB_TEST": mark,
        "RAY_PORT": str(free_port()),
        "DASHBOARD_PORT": str(free_port()),
        "RAY_AUTH_MODE": "token",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "NFLAB_MLFLOW_HOST": "head.example",
        "NFLAB_RESULTS": str(tmp_path / "results"),
        "NFLAB_STORAGE": str(tmp_path / "results" / "runs"),
        "AWS_ACCESS_KEY_ID": key_id,
        "AWS_SECRET_ACCESS_KEY": key,
    }
    needles = [key_id, key]
    try:
        with watched(needles) as shown:
            printed = run([sys.executable, "cluster/mlflow_server.py", "start"], env)
            printed += run(["bash", "cluster/local_head.sh"], env)
            credentials = (tmp_path / ".mlflow" / "credentials").read_text()
            password = re.findall(r"password = (\S+)", credentials)[0]
            needles += [password, b64encode(f"nflab:{password}".encode()).decode()]
            needles.append((tmp_path / ".ray" / "auth_token").read_text().strip())
            api = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{env['DASHBOARD_PORT']}"}
            said = run(f"ray job submit -- python {SWEEP}".split(), {**env, **api})
            printed += said + run([sys.executable, "cluster/backup.py"], env)
        assert "Five best trials" in said
        logs = sessions(mark)
    finally:
        stop_marked(mark)

    assert shown == []
    assert not [needle for needle in needles if needle in printed]
    secret = {".ray/auth_token", ".mlflow/credentials", "mlflow/password.ini"}
    files = [path for folder in (tmp_path, *logs) for path in folder.rglob("*") if path.is_file()]
    for name in secret:  # where they are found if they are looked for
        assert any(needle.encode() in (tmp_path / name).read_bytes() for needle in needles), name
    names = {path.name for path in files}
    assert names >= {"mlflow.db", "users.db", "server.log", "gcs_server.out", "config.json"}
    assert [*(tmp_path / "results" / "backup").glob("mlflow.db")]
    for path in files:
        if path.is_relative_to(tmp_path) and path.relative_to(tmp_path).as_posix() in secret:
            continue
        content = path.read_bytes()
        assert not [needle for needle in needles if needle.encode() in content], path


def test_no_committed_file_holds_a_key() -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file():
            found = KEYS.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert found is None, (name, found)
