"""`make head` beside MLflow's server with passwords, then jobs as its output tells: from anywhere,
of an edited copy, refused without the token; and none of its secrets is shown anywhere."""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import ROOT, edited_copy, free_port, stop_marked
from tests.records import children_of

TOKEN = ".ray/nflab/this-machine.token"

SWEEP = "experiments/agc_sweep.py --trials 2 --epochs 1 --batch-size 64"


@dataclass
class Head:
    home: Path
    """Holds all that it and its jobs write, but Ray's own logs."""
    env: dict[str, str]
    """Of the commands that started it."""
    needles: list[str]
    """Secrets that nothing may show."""
    shown: list[str]
    """Arguments of processes that showed one."""
    shell: dict[str, str] = field(default_factory=dict)
    """All that a new shell has that exported what `make head` printed."""
    printed: str = ""
    """By all commands so far."""

    @property
    def client(self) -> MlflowClient:
        """Reads the server's database: the server itself wants the password."""
        return MlflowClient(f"sqlite:///{self.home}/mlflow/mlflow.db")

    def run(self, command: list[str], env: dict[str, str], folder: str | Path = ROOT) -> str:
        """What a command prints."""
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.printed += done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, folder: str | Path, *options: str) -> Run:
        """Submits the small sweep from `folder`; returns its parent run."""
        words = ["ray", "job", "submit", *options, *f"-- python {SWEEP}".split()]
        assert "Five best trials" in self.run(words, self.shell, folder)
        experiment = self.client.get_experiment_by_name("agc_sweep")
        assert experiment is not None
        runs = self.client.search_runs([experiment.experiment_id])
        return next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)

    def session(self) -> set[Path]:
        """The folder in which its Ray keeps logs."""
        found = set()
        for process in psutil.process_iter():
            try:
                if process.environ().get("NFLAB_TEST") == self.env["NFLAB_TEST"]:
                    words = " ".join(process.cmdline())
                    found |= {Path(p) for p in re.findall(r"/\S*?/session_\d[\d_-]+", words)}
            except psutil.Error:  # already gone
                continue
        return found


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


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head started by the script behind `make head`, with a fresh home, its own ports and an
    MLflow server that others than the head may ask."""
    home = tmp_path_factory.mktemp("head")
    mark = f"head-of-test-{home}"
    keys = {
        "AWS_ACCESS_KEY_ID": f"AKIA{secrets.token_hex(8).upper()}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
    }
    env = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "NFLAB_TEST": mark,
        "RAY_PORT": str(free_port()),
        "DASHBOARD_PORT": str(free_port()),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
        "NFLAB_MLFLOW_HOST": "head.example",
        "NFLAB_RESULTS": str(home / "results"),
        "NFLAB_STORAGE": str(home / "results" / "runs"),
        **keys,
    }
    needles = [*keys.values()]
    try:
        with watched(needles) as shown:
            head = Head(home, env, needles, shown)
            head.run([sys.executable, "cluster/mlflow_server.py", "start"], env)
            told = head.run(["bash", "cluster/local_head.sh"], env)
            credentials = (home / ".mlflow" / "credentials").read_text()
            password = re.findall(r"password = (\S+)", credentials)[0]
            needles += [password, b64encode(f"nflab:{password}".encode()).decode()]
            needles.append((home / TOKEN).read_text().strip())
            exports = [
                line.removeprefix("export ").split("=", 1)
                for line in told.splitlines()
                if line.startswith("export ")
            ]
            assert {name for name, _ in exports} >= {"PATH", "RAY_AUTH_MODE"}
            assert dict(exports)["RAY_AUTH_TOKEN_PATH"] == str(home / TOKEN)
            head.shell = {"HOME": str(home), **keys, **dict(exports)}
            yield head
    finally:
        stop_marked(mark)


@pytest.fixture(scope="module")
def swept(head: Head) -> Run:
    """The parent run of a sweep that was submitted from a folder without code."""
    return head.submit("/")


def test_a_job_belongs_to_its_head_whatever_other_ray_is_started(head: Head) -> None:
    """Ray asks the file `ray_current_cluster` of the head's folder, which each `ray start` with
    that folder writes: nobody else may have it."""
    (session,) = head.session()
    assert session.parent != Path("/tmp/ray")
    address = (session.parent / "ray_current_cluster").read_text()
    assert address.endswith(f":{head.env['RAY_PORT']}")


def test_a_job_runs_from_any_folder(head: Head, swept: Run) -> None:
    assert swept.info.status == "FINISHED"
    assert len(children_of(head.client, swept)) == 2


def test_an_edited_copy_runs_its_own_code_of_both_packages_on_workers_too(
    head: Head, swept: Run, tmp_path: Path
) -> None:
    copy = edited_copy(
        tmp_path / "copy",
        {
            "nfnet/schedule.py": ("    if step < warmup_steps:", "    return 0.0625\n"),
            "platform/nflab/learning/loop.py": (
                "        history.append(metrics)",
                "        metrics['train_loss'] = 7\n",
            ),
        },
    )
    before = time.time()
    parent = head.submit(copy, "--working-dir", ".")
    assert parent.info.start_time > before * 1000  # found in the store of the checkout's head
    children = children_of(head.client, parent)
    assert len(children) == 2
    for run in children:
        assert run.data.metrics["learning_rate"] == 0.0625
        assert run.data.metrics["train_loss"] == 7


def test_the_token_is_the_heads_own_and_its_owner_alone_reads_it(head: Head) -> None:
    assert (head.home / TOKEN).stat().st_mode & 0o777 == 0o600
    assert (head.home / TOKEN).parent.stat().st_mode & 0o777 == 0o700
    assert not (head.home / ".ray" / "auth_token").exists()


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_submission_without_the_right_token_is_refused(head: Head, token: str | None) -> None:
    request = urllib.request.Request(
        f"{head.shell['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        data=json.dumps({"entrypoint": "true"}).encode(),
        headers={"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {token}"} if token else {}),
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code in (401, 403)


def test_a_sweep_on_a_head_shows_no_secret(head: Head, swept: Run) -> None:
    """In output, in files or as an argument of a process."""
    head.run([sys.executable, "cluster/backup.py"], {**head.env, **head.shell})
    assert head.shown == []
    assert not [needle for needle in head.needles if needle in head.printed]
    secret = {TOKEN, ".mlflow/credentials", "mlflow/password.ini"}
    logs = head.session()
    files = [path for folder in (head.home, *logs) for path in folder.rglob("*") if path.is_file()]
    for name in secret:  # where they are found if they are looked for
        content = (head.home / name).read_bytes()
        assert any(needle.encode() in content for needle in head.needles), name
    names = {path.name for path in files}
    assert names >= {"mlflow.db", "users.db", "server.log", "gcs_server.out", "config.json"}
    assert [*(head.home / "results" / "backup").glob("mlflow.db")]
    for path in files:
        if path.is_relative_to(head.home) and path.relative_to(head.home).as_posix() in secret:
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # Ray's own, removed meanwhile
            continue
        assert not [needle for needle in head.needles if needle.encode() in content], path
