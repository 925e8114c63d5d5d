"""A cluster on AWS is driven from a Mac too: nothing of Linux, of GNU or of bash 4 is needed there.

There is no Mac here. Python is told that it runs on one, and loses what it has on Linux alone; a
PATH without GNU's programs shows what recipes call.
"""

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.clouds import emulated_aws
from tests.conftest import ROOT

AS_ON_A_MAC = """
import os, platform, runpy, signal, socket, sys
# Ray, boto3 and torch come to a Mac as files of their own: ours is what is tried here.
import boto3, psutil, ray, torch, yaml
from ray.autoscaler import sdk
from ray.autoscaler._private import commands, util
from ray.autoscaler._private.aws import config, node_provider

_, report, script, *words = sys.argv
for module, names in {
    os: "sched_getaffinity sched_setaffinity memfd_create pidfd_open posix_fallocate eventfd "
        "posix_fadvise copy_file_range splice getrandom getxattr setns unshare fdatasync",
    signal: "SIGPWR SIGSTKFLT SIGPOLL pidfd_send_signal sigtimedwait sigwaitinfo",
    socket: "AF_NETLINK AF_PACKET SO_PEERCRED",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if path.startswith(("/proc", "/sys/", "/dev/shm")):
            raise FileNotFoundError(2, "No such file or directory", path)
    if event == "subprocess.Popen":
        with open(report, "a") as file:
            print(os.path.basename(os.fsdecode(arguments[1][0])), file=file)

sys.platform = "darwin"
platform.system = lambda: "Darwin"
sys.addaudithook(refuse)
sys.argv = [script, *words]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""

BASH_4 = re.compile(
    r"\b(declare|local|typeset) -[a-zA-Z]*[AnlugI]|\b(mapfile|readarray|coproc)\b|\|&|&>>"
    r"|\$\{[^}]*(\^|,)[^}]*\}|\$\{[^}]*@[A-Za-z]\}|\$\{[\w]+\[-\d|\bwait -n|;;&|;&|%\([^)]*\)T"
)
"""What macOS's bash, of 2007, does not know."""

GNU = re.compile(
    r"\b(timeout|flock|setsid|realpath|tac|nproc|numfmt|sha256sum|seq|shuf)\b|\bsed -i |\bdate -d"
    r"|\breadlink -f|\bstat -c|\bgrep -[a-zA-Z]*P|\bxargs -r|\bmktemp -p|\bcp --|\bsort -V|/proc/"
)
"""Programs and flags that a Mac has not, or has otherwise."""


@pytest.fixture
def account() -> Iterator[Any]:
    """An account with the bucket of results, as a client of its machines."""
    with emulated_aws():
        boto3.client("s3").create_bucket(Bucket="nflab-results")
        yield boto3.client("ec2")


def on_a_mac(
    folder: Path, script: str, *words: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """What a script did, and the programs that it called."""
    called = folder / "called"
    called.touch()
    command = [sys.executable, "-c", AS_ON_A_MAC, str(called), str(ROOT / script), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done, called.read_text()


@pytest.mark.slow
def test_a_cluster_is_checked_from_a_mac(account: Any, tmp_path: Path) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = (ROOT / "cluster" / "gpu.yaml").read_text().replace("PYTHON=3.12", f"PYTHON={here}")
    file = tmp_path / "gpu.yaml"
    file.write_text(text)
    words = ("cluster/check.py", str(file), "--ssh-from", "198.51.100.0/24")
    done, called = on_a_mac(tmp_path, *words)
    assert (done.returncode, done.stdout, called) == (
        0,
        f"{file} can be launched; results go to s3://nflab-results\n",
        "",
    ), done.stderr
    assert account.describe_security_groups(GroupNames=["nflab-gpu"])["SecurityGroups"]


@pytest.mark.slow
def test_a_cluster_gets_its_token_on_a_mac(
    account: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("cluster/rotate_token.py", "cluster/gpu.yaml")
    for _ in range(2):
        done, called = on_a_mac(tmp_path, *words)
        assert (done.returncode, called) == (0, ""), done.stdout + done.stderr
    done, _ = on_a_mac(tmp_path, "cluster/tokens.py", "--of", "cluster/gpu.yaml")
    assert done.stdout == f"{tmp_path}/.ray/nflab/nflab-gpu.token\n", done.stderr


@pytest.mark.slow
def test_a_cluster_is_taken_down_from_a_mac(account: Any, tmp_path: Path) -> None:
    done, called = on_a_mac(tmp_path, "cluster/down.py", "cluster/gpu.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing of nflab-gpu is left" in done.stdout
    assert called == "ray\n"


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        (
            "up",
            [
                "python cluster/check.py cluster/gpu.yaml",
                "python cluster/up.py cluster/gpu.yaml --yes",
            ],
        ),
        ("status", ["ray exec cluster/gpu.yaml ray status"]),
        (
            "tunnel",
            ["ray exec cluster/gpu.yaml --port-forward 8265 --port-forward 5000 sleep infinity"],
        ),
        ("rotate-token", ["python cluster/rotate_token.py cluster/gpu.yaml --yes"]),
        (
            "submit",
            ["python cluster/tokens.py --of cluster/gpu.yaml", "ray job submit -- --yes"],
        ),
        ("down", ["python cluster/down.py cluster/gpu.yaml"]),
    ],
)
def test_recipes_call_nothing_but_python_and_ray(
    tmp_path: Path, target: str, calls: list[str]
) -> None:
    """With them, in an installed checkout, a shell is all that a Mac needs."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / ".venv" / "installed").touch()
    for name in ("python", "ray"):
        program = programs / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>"{tmp_path}/calls"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    make = next(p for p in map(Path, ("/usr/bin/make", "/bin/make")) if p.exists())
    env = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [make, target, "ARGS=--yes"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == calls


def test_what_runs_on_ones_own_machine_is_no_bash_4_and_calls_nothing_of_gnu() -> None:
    text = (ROOT / "cluster" / "local_head.sh").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert BASH_4.search(code) is None and GNU.search(code) is None
    for bad in ("declare -A x", "mapfile lines", "${name,,}", "a |& b", "printf '%(%F)T'"):
        assert BASH_4.search(bad) is not None
    assert GNU.search("timeout 60 ray") and GNU.search("sed -i s/a/b/ x")


def test_the_makefile_is_one_that_macs_make_reads() -> None:
    """Of GNU make 3.81 there is no package here: what came after it is looked for."""
    text = (ROOT / "Makefile").read_text()
    later = r"^\.ONESHELL|^undefine|^private |::=|!=|\$\(file|\$\(guile|^\s*load |--output-sync"
    known = "$(if $(filter output-sync,$(.FEATURES)),--output-sync=target)"
    assert known in text
    code = re.sub(r"^#.*", "", text.replace(known, ""), flags=re.MULTILINE)
    assert re.search(later, code, re.MULTILINE) is None
