"""Scripts run in processes that need not import: they are forked from one that has.

An import of PyTorch, Ray and MLflow takes longer than most small trainings. All else is a script's
own: its process, folder, environment, output and end.

Run as a program, this is the process that is forked: it reads what to run from its standard input,
a line of JSON each, and answers with the new process's id, and when it ends with its exit status.
"""

import ast
import atexit
import gc
import importlib
import json
import os
import queue
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """A script to run."""

    script: str
    arguments: tuple[str, ...]
    folder: str
    env: dict[str, str]
    output: str
    """File of what it prints."""
    errors: str
    """File of what it prints as errors."""


class Process:
    """A script that runs; as far as is needed, a `subprocess.Popen`."""

    def __init__(self, pid: int, command: list[str]) -> None:
        self.pid, self._command = pid, command
        self._status: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """Its exit status, a signal's number negative; None while it runs."""
        return self._status

    def wait(self, timeout: float) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self._command, timeout)
        assert self._status is not None
        return self._status

    def send_signal(self, number: int) -> None:
        """Does nothing if it has ended."""
        if self._status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """As `send_signal` does."""
        self.send_signal(signal.SIGKILL)

    def ended(self, status: int) -> None:
        """Tells those who wait."""
        self._status = status
        self._ended.set()


class WarmPython:
    """A Python that has imported all that the scripts import; it starts when first used, and ends
    with the process that uses it."""

    def __init__(self, env: dict[str, str]) -> None:
        """`env` is the environment in which it imports."""
        self._env = env
        self._python: subprocess.Popen[str] | None = None
        self._asking = threading.Lock()
        self._answers: queue.Queue[int] = queue.Queue()
        self._running: dict[int, Process] = {}

    def run(
        self, script: Path, arguments: tuple[str, ...], folder: Path, env: dict[str, str]
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a script to its end, as `subprocess.run` does.

        Args:
            env: all of its environment.

        Raises:
            subprocess.TimeoutExpired: it was ended after 15 minutes.
        """
        with tempfile.TemporaryDirectory() as written:
            output, errors = Path(written) / "output", Path(written) / "errors"
            process = self.start(script, arguments, folder, env, output, errors)
            try:
                status = process.wait(900)
            except BaseException:  # as `subprocess.run`
                process.kill()
                raise
            command = [sys.executable, str(script), *arguments]
            return subprocess.CompletedProcess(
                command, status, output.read_text(), errors.read_text()
            )

    def start(
        self,
        script: Path,
        arguments: tuple[str, ...],
        folder: Path,
        env: dict[str, str],
        output: Path,
        errors: Path,
    ) -> Process:
        """Starts a script in a session of its own, as `subprocess.Popen` does.

        Args:
            env: all of its environment.
            output: file to which what it prints is appended.
            errors: likewise.
        """
        asked = Command(str(script), arguments, str(folder), env, str(output), str(errors))
        with self._asking:
            if self._python is None:
                self._python = subprocess.Popen(
                    [sys.executable, __file__],
                    cwd=ROOT,
                    env=self._env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                threading.Thread(target=self._listen, daemon=True).start()
            assert self._python.stdin is not None
            self._python.stdin.write(json.dumps(asdict(asked)) + "\n")
            self._python.stdin.flush()
            pid = self._answers.get(timeout=300)
            return self._running[pid]

    def _listen(self) -> None:
        """Hears of processes that have begun, and that have ended."""
        assert self._python is not None and self._python.stdout is not None
        for line in self._python.stdout:
            pid, *status = map(int, line.split())
            if status:
                self._running.pop(pid).ended(*status)
            else:
                self._running[pid] = Process(pid, [sys.executable, __file__])
                self._answers.put(pid)


_PYTHONS: dict[frozenset[tuple[str, str]], WarmPython] = {}


def python_for(env: dict[str, str]) -> WarmPython:
    """The warm Python for scripts of this environment: Ray reads its settings when it is imported,
    so each set of them has one of its own."""
    settings = frozenset(
        (name, value)
        for name, value in env.items()
        if name == "HOME" or (name.startswith("RAY_") and name != "RAY_ADDRESS")
    )
    return _PYTHONS.setdefault(settings, WarmPython({**os.environ, **dict(settings)}))


def import_all() -> None:
    """Imports what any of the scripts imports, at any time."""
    for path in (ROOT / "experiments").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # Those that begin so stand beside the scripts, which import them themselves.
            if isinstance(node, ast.ImportFrom) and node.module and node.module[0] != "_":
                importlib.import_module(node.module)
    # PyTorch imports this for the first network, and MLflow lists all packages for the first model.
    importlib.import_module("torch._dynamo")
    importlib.import_module("mlflow.utils.requirements_utils")._init_packages_to_modules_map()


def fork_for_each_line() -> Command:
    """Returns only in the processes forked, with what each is to run."""
    running: set[int] = set()
    read = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.05)
        if ready:
            got = os.read(0, 1 << 16)
            if not got:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                raise SystemExit
            read += got
        while b"\n" in read:
            line, _, read = read.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return Command(**json.loads(line))
            running.add(pid)
            print(pid, flush=True)
        for pid in [*running]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                print(pid, os.waitstatus_to_exitcode(status), flush=True)


def become(asked: Command, set_by_imports: dict[str, str]) -> None:
    """Makes this process what a new one for the script would be, and runs it."""
    for name, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (asked.output, 1, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (asked.errors, 2, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update({**set_by_imports, **asked.env})
    os.chdir(asked.folder)
    sys.argv = [asked.script, *asked.arguments]
    sys.path[0] = str(Path(asked.script).parent)
    status: Any = 0
    try:
        runpy.run_path(asked.script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    # Python's own end would search all that was imported for garbage, for seconds.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    sys.path[1:1] = [str(ROOT), str(ROOT / "platform")]
    before = set(os.environ)
    gc.disable()
    import_all()
    gc.freeze()  # what was imported is no garbage, and is shared by all
    gc.enable()
    set_by_imports = {name: os.environ[name] for name in set(os.environ) - before}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tests' and the scripts'
    become(fork_for_each_line(), set_by_imports)
