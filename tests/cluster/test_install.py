"""`cluster/install.sh` on machines of one kind, with a bucket that keeps the environment."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buckets import Bucket
from tests.conftest import ROOT, free_port

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

TOOLS = ("aws", "zstd")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS),
    reason="install aws and zstd: apt-get install -y awscli zstd",
)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with Bucket() as empty:
        yield empty


class Machine:
    """A home with the files that `install.sh` reads; from it no registry can be reached."""

    def __init__(self, home: Path, bucket: Bucket, constraints: str = "wheel==1\n") -> None:
        self.checkout = home / "nflab"
        shutil.copytree(ROOT / "cluster", self.checkout / "cluster")
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        (self.checkout / "constraints.txt").write_text(constraints)
        (home / ".bashrc").write_text("echo mine\n")
        self.results = f"s3://{bucket.name}/mine"
        (home / ".nflab").write_text(f"export NFLAB_RESULTS={self.results} NFLAB_PYTHON={PYTHON}\n")
        nowhere = f"http://127.0.0.1:{free_port()}/"
        self.env = {
            **os.environ,
            **bucket.env,
            "HOME": str(home),
            "PIP_INDEX_URL": nowhere,
            "UV_INDEX_URL": nowhere,
            "PIP_RETRIES": "0",
            "PIP_NO_CACHE_DIR": "1",
        }

    def has_environment(self) -> None:
        """As if it had been installed: a Python, a package, and the mark of what was wanted."""
        venv = self.checkout / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        (package,) = venv.glob("lib/*/site-packages")
        (package / "kept.py").write_text("answer = 42\n")
        files = (self.checkout / name for name in ("constraints.txt", "pyproject.toml"))
        wanted = f"python{PYTHON}\n".encode() + b"".join(file.read_bytes() for file in files)
        (venv / "installed").write_text(f"{hashlib.sha256(wanted).hexdigest()}  -\n")

    def install(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(self.checkout / "cluster/install.sh"), *words],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def answer(self) -> str:
        """What the environment says that was kept."""
        ask = [self.checkout / ".venv/bin/python", "-c", "import kept; print(kept.answer)"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def test_a_new_machine_unpacks_what_another_has_kept(tmp_path: Path, bucket: Bucket) -> None:
    head = Machine(tmp_path / "head", bucket)
    head.has_environment()
    done = head.install("keep")
    assert done.returncode == 0, done.stderr
    (kept,) = bucket.files("mine/environments/")
    assert done.stdout == f"{head.results}/environments/{kept}: new machines unpack it\n"

    worker = Machine(tmp_path / "worker", bucket)
    done = worker.install()
    assert done.returncode == 0, done.stderr
    assert worker.answer() == "42"
    profile = (tmp_path / "worker" / ".bashrc").read_text()
    assert profile == ". ~/nflab/cluster/env.sh\necho mine\n"
    # It is there: nothing is asked again, though the bucket does not answer.
    with bucket.failing("refuses"):
        assert worker.install().returncode == 0

    # Other versions are wanted: what is kept is not what they are.
    other = Machine(tmp_path / "other", bucket, constraints="wheel==2\n")
    assert other.install().returncode != 0
    assert not list(other.checkout.glob(".venv/lib/*/site-packages/kept.py"))


@pytest.mark.parametrize("damaged", [True, False])
def test_without_a_whole_kept_environment_it_installs(
    tmp_path: Path, bucket: Bucket, damaged: bool
) -> None:
    """Which here it cannot: no part of another one is left in its place."""
    head = Machine(tmp_path / "head", bucket, constraints=f"wheel==3.{damaged:d}\n")
    head.has_environment()
    assert head.install("keep").returncode == 0
    worker = Machine(tmp_path / "worker", bucket, constraints=f"wheel==3.{damaged:d}\n")
    if damaged:
        for name in bucket.files("mine/environments/"):
            key = f"mine/environments/{name}"
            body = bucket.behind.get_object(Bucket=bucket.name, Key=key)["Body"].read()
            bucket.behind.put_object(Bucket=bucket.name, Key=key, Body=body[: len(body) // 2])
        done = worker.install()
    else:
        with bucket.failing("answers 403"):
            done = worker.install()
    assert done.returncode != 0
    assert "No matching distribution found for uv" in done.stderr
    assert not (worker.checkout / ".venv" / "installed").exists()
    assert not list(worker.checkout.glob(".venv/lib/*/site-packages/kept.py"))
