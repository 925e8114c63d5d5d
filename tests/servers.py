"""A real MLflow server that tests stop and start."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.request import urlopen

import psutil

from tests.conftest import free_port
from tests.stores import new_database


class MlflowServer:
    """`mlflow server` over the files of a folder, on a port that it keeps; a context that ends
    it."""

    def __init__(
        self, folder: Path, artifacts: str | None = None, store: str | None = None
    ) -> None:
        """
        Args:
            artifacts: an address for them; else they are in the folder too.
            store: the database; else one in the folder.
        """
        self.folder, self.port = folder, free_port()
        self._artifacts = artifacts or str(folder / "artifacts")
        if store is None:
            new_database(folder / "server.db")
        self._store = store or f"sqlite:///{folder}/server.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self._processes: list[psutil.Process] = []

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self._store]
        command += ["--artifacts-destination", self._artifacts]
        # Its runners of jobs are for language models.
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = (self.folder / "server.log").open("a")
        process = subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self._processes = [psutil.Process(process.pid)]
        deadline = time.monotonic() + 120
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError((self.folder / "server.log").read_text())
            time.sleep(0.1)
        self._processes += self._processes[0].children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to all of its processes and waits until they are gone."""
        for process in self._processes:
            if process.is_running():
                process.send_signal(number)
        _, left = psutil.wait_procs(self._processes, timeout=20)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=20)
        self._processes = []

    def _answers(self) -> bool:
        try:
            urlopen(f"{self.uri}/health", timeout=2).close()
        except OSError:
            return False
        return True
