"""A cluster's token, here: made once, its owner's alone, no other cluster's, never shown; and what
`make up` and `make rotate-token` do where jobs run, but for what needs a cluster."""

import json
import os
import pty
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port, stop_marked

RAY = Path(sys.executable).parent / "ray"


def tokens(home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """What `cluster/tokens.py` does in a home."""
    return subprocess.run(
        [sys.executable, "cluster/tokens.py", *words],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_each_cluster_has_a_token_of_its_own_made_once_and_never_shown(tmp_path: Path) -> None:
    held = {}
    for name in ("one", "two", "one"):
        done = tokens(tmp_path, name)
        path = Path(done.stdout.strip())
        assert path == tmp_path / ".ray" / "nflab" / f"{name}.token", done.stderr
        assert done.stderr == ""
        assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o600, 0o700]
        token = path.read_text()
        assert len(token) == 64
        assert held.setdefault(name, token) == token
    assert held["one"] != held["two"]


def test_a_token_that_was_never_written_is_refused(tmp_path: Path) -> None:
    """Ray itself would end with a page of C++."""
    path = tmp_path / ".ray" / "nflab" / "one.token"
    path.parent.mkdir(parents=True)
    path.touch()
    done = tokens(tmp_path, "one")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{path} is empty" in done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["one.token"]


def test_a_home_that_cannot_hold_a_token_is_told(tmp_path: Path) -> None:
    (tmp_path / ".ray").touch()
    done = tokens(tmp_path, "one")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


ROTATE = """
import json, sys, down, launcher, rotate_token, running, tokens
from dataclasses import replace
cluster = launcher.read("gpu.yaml")
tokens.make(cluster.token)
before = tokens.digest(cluster.token)
running.find = lambda cluster: running.Head(before, None, None, {}, False)
cluster = replace(cluster, path=cluster.path.with_name("gone.yaml"))  # which `ray up` refuses
def interrupted(*words):
    raise KeyboardInterrupt
if sys.argv[1] == "interrupted":
    down.ray = interrupted
try:
    rotate_token.rotate(cluster, True, False)
except rotate_token.ConfigError as error:
    print(json.dumps([str(error), tokens.digest(cluster.token) == before]))
"""


@pytest.mark.parametrize("ends", ["refused", "interrupted"])
def test_a_rotation_that_fails_says_that_the_token_here_is_new(tmp_path: Path, ends: str) -> None:
    told, same = inside(ROTATE, tmp_path, ends)
    assert told.startswith("interrupted;") == (ends == "interrupted")
    assert "is new, and perhaps not the cluster's: run make rotate-token again" in told
    assert not same


UP = """
import json, sys, launcher, up
try:
    up.bring_up(launcher.read("gpu.yaml"), sys.argv[1:])
except up.ConfigError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("flags", ["-n other", "-nother", "-yn other", "--cluster-name=other"])
def test_the_name_is_the_launcher_files(tmp_path: Path, flags: str) -> None:
    assert "would be another cluster" in inside(UP, tmp_path, *flags.split())


@pytest.mark.parametrize("name", ["../auth_token", "a/b", "", ".hidden"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    done = tokens(tmp_path, name)
    assert done.returncode == 2 and "is no name for a cluster's token" in done.stderr
    assert not (tmp_path / ".ray").exists()


def test_a_launcher_file_without_a_token_here_says_how_it_comes(tmp_path: Path) -> None:
    done = tokens(tmp_path, "--of", "cluster/gpu.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no token of nflab-gpu at" in done.stderr and "make up makes it" in done.stderr


def inside(code: str, home: Path, *words: str) -> Any:
    """The JSON that code prints, which imports from `cluster/`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT / "cluster",
        env={**os.environ, "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CHECK = """
import json, sys, check, launcher
from dataclasses import replace
cluster = launcher.read("gpu.yaml")
content = {**cluster.content, "cluster_name": sys.argv[1]}
if sys.argv[2] != "-":
    content["file_mounts"] = {"~/.ray/auth_token": sys.argv[2]}
try:
    check.check_token(replace(cluster, content=content))
    print(json.dumps(None))
except check.ConfigError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    ("name", "token", "refusal"),
    [
        ("nflab-gpu", "-", None),
        ("mine", "-", "write ~/.ray/auth_token: ~/.ray/nflab/mine.token in its file_mounts"),
        ("mine", "~/.ray/nflab/mine.token", None),
        ("mine", "~/.ray/auth_token", None),  # a file of before, which is told
    ],
)
def test_a_launcher_file_names_its_own_token(
    tmp_path: Path, name: str, token: str, refusal: str | None
) -> None:
    told = inside(CHECK, tmp_path, name, token)
    assert (told is None) == (refusal is None)
    assert refusal is None or refusal in told


SPARE = """
import json, sys, launcher, running, up
told = json.loads(sys.argv[1])
cluster = launcher.read("gpu.yaml")
told["environment"] = told["environment"] or running.environment(cluster)
try:
    print(json.dumps(up.spare_jobs(cluster, running.Head(**told), sys.argv[2:])))
except up.ConfigError as error:
    print(json.dumps(str(error)))
"""

GPU = {"resources": {"CPU": 8, "GPU": 1, "memory": 1}, "labels": {"nflab-type": "as Ray adds it"}}

TYPES = {"head": {}, "gpu-spot": GPU, "gpu-on-demand": GPU}

JOB = "1 job runs on nflab-gpu (a: python b.py)"


@pytest.mark.parametrize(
    ("head", "flags", "added"),
    [
        ({}, [], []),
        ({}, ["--restart-only"], []),
        ({"replaced": True}, ["--yes"], []),
        ({"working": JOB}, [], ["--no-restart"]),
        ({"working": JOB}, ["--yes"], ["--no-restart"]),
        ({"working": JOB}, ["--no-restart"], []),
        ({"working": JOB}, ["--restart-only", "--yes"], []),
        ({"working": JOB}, ["--restart-only"], f"{JOB}, and --restart-only would end them"),
        ({"working": JOB, "replaced": True}, ["--no-restart"], "is not that of the head"),
        ({"working": JOB, "environment": "0"}, ["-y"], "would change the packages"),
        ({"working": JOB, "types": {}}, [], ["--no-restart"]),
        (
            {"working": JOB, "types": {"gpu-spot": GPU}},
            [],
            "would launch gpu-on-demand of",
        ),
        ({"working": JOB, "types": {**TYPES, "gpu-spot": {}}}, [], "would launch gpu-spot of"),
        ({"types": {"gpu-spot": GPU}}, [], []),
    ],
)
def test_jobs_are_not_ended_unasked(
    tmp_path: Path, head: dict[str, Any], flags: list[str], added: list[str] | str
) -> None:
    """With nobody at a terminal; `added` is a part of the refusal where it is a text."""
    told = {"token": None, "environment": None, "working": None, "types": TYPES, "replaced": False}
    told |= head
    found = inside(SPARE, tmp_path, json.dumps(told), *flags)
    assert found == added if isinstance(added, list) else added in found


ASK = """
import fcntl, signal, sys, termios, launcher, rotate_token, running, up
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C at it is this process's
signal.signal(signal.SIGINT, signal.default_int_handler)  # also in tests in the background
with launcher.told_in_a_sentence():
    cluster = launcher.read("gpu.yaml")
    if sys.argv[1] == "up":
        head = running.Head(None, None, sys.argv[2], {}, False)
        print(up.spare_jobs(cluster, head, []))
    else:
        print(rotate_token.ask(cluster, sys.argv[2] or None, False, False))
"""

SPARED = (0, "['--no-restart']")
KEPT = (2, "error: nflab-gpu keeps its token, for nobody said yes")


@pytest.mark.parametrize(
    ("script", "working", "typed", "comes"),
    [
        ("up", JOB, "y\n", (0, "[]")),
        ("up", JOB, "\n", SPARED),
        ("up", JOB, "\x04", SPARED),  # Ctrl-D
        ("up", JOB, "\x03", (130, "interrupted")),  # Ctrl-C
        ("rotate", "", "Yes\n", (0, "None")),
        ("rotate", "", "n\n", KEPT),
        ("rotate", JOB, "y\n", (0, "None")),
        (
            "rotate",
            JOB,
            "\x04",
            (2, f"error: {JOB}, and the restart for a new token would end that"),
        ),
    ],
)
def test_a_person_at_a_terminal_decides(
    tmp_path: Path, script: str, working: str, typed: str, comes: tuple[int, str]
) -> None:
    terminal, theirs = pty.openpty()
    asks = subprocess.Popen(
        [sys.executable, "-c", ASK, script, working],
        cwd=ROOT / "cluster",
        env={**os.environ, "HOME": str(tmp_path)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # the other side has ended
        for _ in range(100):
            # Again after a while: Ctrl-C a moment before Python reads is noted, and waited with.
            if select.select([terminal], [], [], 2)[0]:
                seen += os.read(terminal, 4096)
                asked = seen.endswith(b"[y/N] ")
            else:
                asked = b"[y/N] " in seen and comes[1].encode() not in seen
            if asked:
                os.write(terminal, typed.encode())
    os.close(terminal)  # ends who still waits at it
    told = seen.decode().replace("\r", "")
    assert told.count("[y/N] ") == 1
    assert asks.wait(timeout=60) == comes[0], told
    assert f"\n{comes[1]}" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_ray_takes_its_own_token_alone_and_a_renewed_one_from_its_next_start(
    tmp_path: Path,
) -> None:
    """Ray reads the file when it starts: this is why a new token takes a restart."""
    own, other = (Path(tokens(tmp_path, name).stdout.strip()) for name in ("own", "other"))
    before = tmp_path / "before"
    before.write_text(own.read_text())
    port, mark = free_port(), f"tokens-of-test-{tmp_path}"
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "NFLAB_TEST": mark,
        "RAY_AUTH_MODE": "token",
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }

    def start() -> None:
        words = f"start --head --port {port} --include-dashboard=false --disable-usage-stats"
        subprocess.run(
            [RAY, *words.split(), "--node-ip-address", "127.0.0.1"],
            env=env | {"RAY_AUTH_TOKEN_PATH": str(own)},
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=120,
        )

    def taken() -> list[bool]:
        """Of the three files, whether Ray answers who has it."""
        status = [RAY, "status", "--address", f"127.0.0.1:{port}"]
        done = [
            subprocess.run(
                status,
                env=env | {"RAY_AUTH_TOKEN_PATH": str(path)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            for path in (own, other, before)
        ]
        assert all(d.returncode == 0 or "InvalidAuthToken" in d.stderr for d in done)
        return [d.returncode == 0 for d in done]

    try:
        start()
        assert taken() == [True, False, True]
        inside(
            "import tokens, sys, pathlib; tokens.renew(pathlib.Path(sys.argv[1])); print(0)",
            tmp_path,
            str(own),
        )
        assert own.stat().st_mode & 0o777 == 0o600
        assert sorted(p.name for p in own.parent.iterdir()) == ["other.token", "own.token"]
        assert taken() == [False, False, True]
        stop_marked(mark)
        start()
        assert taken() == [True, False, False]
    finally:
        stop_marked(mark)
