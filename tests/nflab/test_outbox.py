"""The outbox against a real MLflow server that dies, loses answers and comes back."""

import errno
import http.client
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from nflab.recording.outbox import Outbox, Refused
from nflab.recording.tracker import Tracker
from nflab.settings.errors import ConfigError
from nflab.storage import files
from tests.conftest import ROOT
from tests.servers import MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not wait between its tries, so that tests are over soon."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


class Place:
    """An experiment of its own on the server, and a folder for what waits."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder / "unsent"
        self.tracker = Tracker(uri, str(folder), folder.name)
        self.outbox = Outbox(self.tracker, self.folder)
        self.client = MlflowClient(uri)

    def again(self) -> Outbox:
        """The outbox of a new process."""
        self.outbox.close()
        self.outbox = Outbox(self.tracker, self.folder)
        return self.outbox

    def run(self) -> Run:
        """The only run of the experiment, of those that were not deleted."""
        (run,) = self.client.search_runs([self.tracker.experiment_id])
        return self.client.get_run(run.info.run_id)

    def points(self, run: Run, metric: str = "val_top1") -> list[tuple[int, float]]:
        found = self.client.get_metric_history(run.info.run_id, metric)
        return [(point.step, point.value) for point in sorted(found, key=lambda p: p.timestamp)]

    def nothing_waits(self) -> bool:
        rejected = self.rejected()
        kept = {
            Path(r["arguments"]["path"]).parent.name for r in rejected if r["call"] == "add_file"
        }
        expected = {"requests.jsonl", *kept, *(["rejected.jsonl"] if rejected else [])}
        waiting = self.folder / "requests.jsonl"
        return {f.name for f in self.folder.iterdir()} == expected and not waiting.read_bytes()

    def rejected(self) -> list[dict[str, Any]]:
        """The requests that MLflow refused."""
        file = self.folder / "rejected.jsonl"
        return [json.loads(line) for line in file.open()] if file.exists() else []


@pytest.fixture
def place(server: MlflowServer, tmp_path: Path) -> Iterator[Place]:
    made = Place(server.uri, tmp_path)
    yield made
    made.outbox.close()


def log(outbox: Outbox, run: str, step: int) -> None:
    """One epoch; times rise with the steps, so that an order can be read back."""
    outbox.put("log", run, metrics={"val_top1": step / 3}, step=step, when=1000 + step)


def steps(count: int) -> list[tuple[int, float]]:
    return [(step, step / 3) for step in range(1, count + 1)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_goes_away_and_comes_back_has_every_point_once_and_in_order(
    place: Place, server: MlflowServer, number: signal.Signals
) -> None:
    outbox = place.outbox
    run = outbox.start("a", {"x": "y"})
    for step in range(1, 61):
        log(outbox, run, step)
    outbox.put("tag", run, key="told", value="before")
    time.sleep(random.uniform(0, 1))  # some are sent, one is under way
    server.stop(number)
    for step in range(61, 81):
        log(outbox, run, step)
    outbox.put("tag", run, key="told", value="after")
    outbox.put("finish", run, outcome="finished", when=2000)
    assert (place.folder / "requests.jsonl").stat().st_size > 0
    with pytest.raises(ConfigError, match=r"does not answer: what it has not taken is kept in "):
        outbox.drain(patience=0.5)
    server.start()
    outbox.drain()
    assert place.nothing_waits()
    found = place.run()
    assert place.points(found) == steps(80)
    assert found.data.tags["told"] == "after"
    assert (found.info.status, found.info.end_time) == ("FINISHED", 2000)


class Forgetful(BaseHTTPRequestHandler):
    """Passes requests on to a server; the answer to each is lost the first time."""

    port: int
    seen: set[bytes]

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        asked = f"{self.command} {self.path} ".encode() + body
        if asked not in self.seen:
            self.seen.add(asked)
            return  # which closes the connection
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def forgetful(server: MlflowServer) -> Iterator[tuple[str, set[bytes]]]:
    """Address of a proxy that loses answers, and the requests of which it has lost them."""
    handler = type("Handler", (Forgetful,), {"port": server.port, "seen": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}", handler.seen
        finally:
            proxy.shutdown()
            thread.join()


class Gateway(Forgetful):
    """Passes requests on, but while it forbids them."""

    answer: tuple[int, str, bytes] | None = None

    def forward(self) -> None:
        if self.answer is None:
            self.seen.add(  # no answer is lost
                f"{self.command} {self.path} ".encode()
                + (body := self.rfile.read(int(self.headers.get("Content-Length", 0))))
            )
            self.rfile = io.BytesIO(body)
            super().forward()
            return
        status, kind, content = self.answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward


@pytest.mark.parametrize(
    "answer",
    [
        (403, "text/html", b"<h1>Forbidden</h1>"),
        (403, "application/json", b'{"message": "token expired"}'),
        (401, "text/plain", b"log in"),
        (404, "text/html", b"no such service"),
        (400, "text/html", b"bad request"),
        (429, "text/plain", b"slowly"),
        (200, "text/html", b"<h1>Please log in</h1>"),
        (502, "text/html", b"bad gateway"),
    ],
    ids=lambda answer: f"{answer[0]}-{answer[1]}",
)
def test_what_a_gateway_forbids_for_a_while_is_sent_later(
    server: MlflowServer, tmp_path: Path, answer: tuple[int, str, bytes]
) -> None:
    handler = type("Handler", (Gateway,), {"port": server.port, "seen": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        try:
            place = Place(f"http://127.0.0.1:{proxy.server_port}", tmp_path)
            run = place.outbox.start("a", {})
            for step in range(1, 4):
                log(place.outbox, run, step)
            place.outbox.drain()
            handler.answer = answer
            for step in range(4, 9):
                log(place.outbox, run, step)
            time.sleep(1.5)
            assert (place.folder / "requests.jsonl").read_bytes()
            handler.answer = None
            for step in range(9, 12):
                log(place.outbox, run, step)
            place.outbox.put("finish", run, outcome="finished", when=2000)
            place.outbox.drain()
            assert place.points(place.run()) == steps(11)
            assert place.run().info.status == "FINISHED"
            assert not place.rejected()
        finally:
            place.outbox.close()
            proxy.shutdown()


def tell(outbox: Outbox) -> None:
    """One request of every kind that a run makes."""
    run = outbox.start("a", {"x": "y"})
    outbox.put("tag", run, key="error", value="of an earlier attempt")
    outbox.put("reopen", run)
    outbox.put("log_params", run, params={"clipping": "none", "seed": "1"})
    outbox.put("log_dataset", run, name="digits", fingerprint="f" * 40, sizes={"train": 3})
    outbox.put("add_text", run, text="{}", file="config.json")
    for step in (1, 2):
        log(outbox, run, step)
    diverged = {"val_top1": 1.0, "train_loss": float("nan"), "val_loss": float("inf")}
    outbox.put("log", run, metrics=diverged, step=3, when=1003, outcome="diverged")
    outbox.put_file(run, "agc.bin", lambda path: path.write_bytes(bytes(range(256))))
    outbox.put("describe", run, text="words")
    outbox.put("finish", run, outcome="diverged", tags={"agc_verdict": "loose"}, when=2000)


def check_told(place: Place) -> None:
    """MLflow has what `tell` told, once."""
    run = place.run()
    assert (run.info.status, run.info.end_time) == ("FINISHED", 2000)
    tags = run.data.tags
    assert "error" not in tags
    assert (tags["x"], tags["outcome"], tags["agc_verdict"]) == ("y", "diverged", "loose")
    assert tags["mlflow.note.content"] == "words"
    assert run.data.params == {"clipping": "none", "seed": "1"}
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["digits"]
    assert place.points(run) == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    ((step, value),) = place.points(run, "train_loss")
    assert step == 3 and math.isnan(value)
    assert len(place.points(run, "val_loss")) == 1
    files = {file.path for file in place.client.list_artifacts(run.info.run_id)}
    assert files == {"config.json", "agc.bin"}
    copy = place.client.download_artifacts(run.info.run_id, "agc.bin")
    assert Path(copy).read_bytes() == bytes(range(256))


@pytest.mark.parametrize("retries", ["0", "2"], ids=["outbox repeats", "client repeats"])
def test_requests_whose_answer_is_lost_are_done_once(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: str
) -> None:
    monkeypatch.setattr("nflab.recording.outbox.RETRY_SECONDS", 0.01)
    with forgetful(server) as (uri, lost):
        direct = Place(server.uri, tmp_path)
        direct.tracker.uri = uri
        direct.tracker._client = MlflowClient(uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
        tell(direct.outbox)
        direct.outbox.drain()
        direct.outbox.close()
        assert sum(b"runs/create" in request for request in lost) == 1
    check_told(direct)
    assert direct.nothing_waits()


def test_what_was_sent_before_a_kill_is_sent_again_and_changes_nothing(
    place: Place, server: MlflowServer
) -> None:
    server.stop()
    tell(place.outbox)
    written = (place.folder / "requests.jsonl").read_bytes()
    server.start()
    place.outbox.drain()
    check_told(place)
    place.outbox.close()
    (place.folder / "requests.jsonl").write_bytes(written)  # killed before it was emptied
    place.again().drain()
    check_told(place)
    assert place.nothing_waits()


CHILD = """
import sys
from pathlib import Path
from nflab.recording.outbox import Outbox
from nflab.recording.tracker import Tracker
uri, experiment, folder = sys.argv[1:]
outbox = Outbox(Tracker(uri, folder, experiment), Path(folder))
run = outbox.start("a", {})
print(run, flush=True)
for step in range(1, 10**6):
    outbox.put("log", run, metrics={"val_top1": step / 3}, step=step, when=1000 + step)
    print(step, flush=True)
"""


def test_what_a_killed_process_left_is_sent_by_the_next(
    place: Place, server: MlflowServer, tmp_path: Path
) -> None:
    place.outbox.close()
    command = [sys.executable, "-c", CHILD, server.uri, tmp_path.name, str(place.folder)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    run = child.stdout.readline().strip()
    said = [child.stdout.readline() for _ in range(random.randrange(50, 100))]
    child.kill()
    said += child.stdout
    child.wait(10)
    last = int([line for line in said if line.endswith("\n")][-1])
    server.stop()
    with (place.folder / "requests.jsonl").open("ab") as file:
        file.write(b'{"call": "log", "run": "torn by a ki')
    (place.folder / "file-without-request").mkdir()
    outbox = place.again()
    left = len(outbox._waiting)
    for step in range(last + 2, last + 5):
        log(outbox, run, step)
    place.again()  # killed again before the server is back
    server.start()
    place.outbox.drain()
    told = place.points(place.run())
    assert left > 0
    # The last one may have been put and not been printed any more.
    printed = {(step, step / 3) for step in [*range(1, last + 1), *range(last + 2, last + 5)]}
    assert printed <= set(told) <= printed | {(last + 1, (last + 1) / 3)}
    assert len(told) == len(set(told))
    assert [step for step, _ in told] == sorted(step for step, _ in told)
    assert place.nothing_waits()


def test_a_deleted_run_is_told_once_and_is_in_no_other_runs_way(place: Place) -> None:
    deleted, kept = (place.tracker.start(name, {}) for name in ("deleted", "kept"))
    place.client.delete_run(deleted)
    for step in (1, 2, 3):
        log(place.outbox, deleted, step)
        log(place.outbox, kept, step)
    place.outbox.put_file(deleted, "x.txt", partial(Path.write_text, data="x"))
    with pytest.raises(Refused, match=r"MLflow refused 'log' of a run, .*deleted") as refused:
        place.outbox.drain()
    assert "\n" not in str(refused.value)
    assert [r["call"] for r in place.rejected()] == ["log"] * 3
    assert all(r["run"] == deleted and r["reason"] for r in place.rejected())
    assert place.points(place.run()) == steps(3)
    place.outbox.drain()
    log(place.outbox, kept, 4)
    assert place.outbox.empties()
    assert place.points(place.run()) == steps(4)
    place.again().drain()
    assert place.nothing_waits()


def test_a_run_that_was_deleted_before_its_requests_were_sent_is_told_too(
    place: Place, server: MlflowServer
) -> None:
    run = place.outbox.start("a", {})
    place.outbox.drain()
    place.client.delete_run(place.run().info.run_id)
    place.again()
    log(place.outbox, run, 1)
    with pytest.raises(Refused, match="it was deleted"):
        place.outbox.drain()
    states = place.client.search_runs([place.tracker.experiment_id], run_view_type=ViewType.ALL)
    assert len(states) == 1


def test_a_server_that_stays_away_is_told_in_a_sentence(
    place: Place, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nflab.recording.outbox.SHORT_PATIENCE_SECONDS", 0.2)
    run = place.tracker.start("a", {})
    server.stop()
    log(place.outbox, run, 1)
    assert not place.outbox.empties()
    with pytest.raises(ConfigError) as silent:
        place.outbox.drain(0.2)
    assert "\n" not in str(silent.value) and str(place.folder) in str(silent.value)
    server.start()
    assert place.outbox.read(lambda: place.tracker.metrics(run)) == {"val_top1": 1 / 3}


def test_a_point_is_known_by_its_time(place: Place) -> None:
    """Why a request holds the time at which it was written: sent twice, it is one point."""
    run = place.tracker.start("a", {})
    for when in (1000, 1000, 1001):
        place.tracker.log(run, {"val_top1": 50.0}, step=1, when=when)
    assert place.points(place.run()) == [(1, 50.0), (1, 50.0)]


def test_a_run_that_a_lost_answer_left_half_begun_is_completed(place: Place) -> None:
    tags = {"kind": "sweep", "outcome": "running"}
    for _ in range(2):  # the client's own second try makes another
        place.client.create_run(
            place.tracker.experiment_id, run_name="s", tags={**tags, "record": "1"}, start_time=1
        )
    run = place.tracker.start("s", tags, key="1")
    assert place.run().info.run_id == run == place.tracker.start("s", tags, key="1")
    assert place.run().data.params == {"kind": "sweep"}
    assert place.tracker.start("t", tags) != run


def test_a_request_on_a_full_disk_is_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), "x")
    outbox = Outbox(tracker, tmp_path / "unsent")
    run, sync, tries = tracker.start("a", {}), os.fsync, []

    def full(file: int) -> None:
        tries.append(file)
        if len(tries) % 3:
            raise OSError(errno.ENOSPC, "full")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with outbox._changed:  # nothing is sent meanwhile
        for number in range(4):
            outbox.put("tag", run, key="k", value=str(number))
        lines = (tmp_path / "unsent" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["arguments"]["value"] for line in lines] == ["0", "1", "2", "3"]
    assert len(tries) == 12
    outbox.drain()
    assert MlflowClient(tracker.uri).get_run(run).data.tags["k"] == "3"
    outbox.close()


def test_what_was_rejected_is_read_though_a_kill_tore_it(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), "x")
    outbox = Outbox(tracker, tmp_path / "unsent")
    outbox.put("tag", "0" * 32, key="k", value="v")  # of a run that there is not
    with pytest.raises(Refused, match="not found"):
        outbox.drain()
    outbox.close()
    file = tmp_path / "unsent" / "rejected.jsonl"
    (line,) = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(line[:50] + b"\n" + line)
    again = Outbox(tracker, tmp_path / "unsent")
    assert [request["call"] for request in again._rejected()] == ["tag"]
    again.close()
