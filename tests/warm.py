"""Scripts run in processes that need not import: they are forked from one that has.

An import of PyTorch, Ray and MLflow takes longer than most small trainings. All else is a script's
own: its process, folder, environment, output and end.

Run as a program, this is the process that is forked: it reads what to run from its standard input,
a line of JSON each, and answers with the new process's id, then with its exit status.
"""

import ast
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

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


class WarmPython:
    """A Python that has imported all that the scripts import; it starts when first used, and ends
    with the process that uses it."""

    def __init__(self, env: dict[str, str]) -> None:
        """`env` is the environment in which it imports."""
        self._env = env
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def run(
        self, script: Path, arguments: tuple[str, ...], folder: Path, env: dict[str, str]
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a script to its end, as `subprocess.run` does.

        Args:
            env: all of its environment.

        Raises:
            subprocess.TimeoutExpired: it was ended after 15 minutes.
        """
        with self._one_at_a_time, tempfile.TemporaryDirectory() as written:
            output, errors = Path(written) / "output", Path(written) / "errors"
            asked = Command(str(script), arguments, str(folder), env, str(output), str(errors))
            command = [sys.executable, str(script), *arguments]
            status = self._ask(asked, command)
            return subprocess.CompletedProcess(
                command, status, output.read_text(), errors.read_text()
            )

    def _ask(self, asked: Command, command: list[str], seconds: float = 900) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        told, answers = self._process.stdin, self._process.stdout
        assert told is not None and answers is not None
        told.write(json.dumps(asdict(asked)) + "\n")
        told.flush()
        pid = int(answers.readline())
        late = threading.Event()

        def end() -> None:
            late.set()
            os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            status = int(answers.readline())
        except BaseException:  # as `subprocess.run`
            end()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(command, seconds)
        return status


_PYTHONS: dict[frozenset[tuple[str, str]], WarmPython] = {}


def python_for(env: dict[str, str]) -> WarmPython:
    """The warm Python for scripts of this environment: Ray reads its settings when it is imported,
    so each set of them has one of its own."""
    settings = frozenset(
        (name, value)
        for name, value in env.items()
        if name == "HOME" or (name.startswith("RAY_") and name != "RAY_ADDRESS")
    )
    return _PYTHONS.setdefault(settings, WarmPython(env))


def import_all() -> None:
    """Imports what any of the scripts imports, at any time."""
    for path in (ROOT / "experiments").glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                importlib.import_module(node.module)
    # PyTorch imports this for the first network, and MLflow lists all packages for the first model.
    importlib.import_module("torch._dynamo")
    importlib.import_module("mlflow.utils.requirements_utils")._init_packages_to_modules_map()


def fork_for_each_line() -> Command:
    """Returns only in the processes forked, with what each is to run."""
    for line in sys.stdin:
        asked = Command(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return asked
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


def become(asked: Command, set_by_imports: dict[str, str]) -> None:
    """Makes this process what a new one for the script would be, and runs it."""
    for name, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (asked.output, 1, os.O_WRONLY | os.O_CREAT),
        (asked.errors, 2, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update({**set_by_imports, **asked.env})
    os.chdir(asked.folder)
    sys.argv = [asked.script, *asked.arguments]
    sys.path[0] = str(Path(asked.script).parent)
    runpy.run_path(asked.script, run_name="__main__")


if __name__ == "__main__":
    sys.path[1:1] = [str(ROOT), str(ROOT / "platform")]
    before = set(os.environ)
    import_all()
    set_by_imports = {name: os.environ[name] for name in set(os.environ) - before}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tests' and the scripts'
    become(fork_for_each_line(), set_by_imports)
