"""A spot machine that is taken away: with a notice, a checkpoint is made before it goes."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from nflab.cluster.preemption import spot_end
from nflab.storage.checkpoints import Checkpoints
from tests.conftest import edited_copy
from tests.faults.runs import Run, check_exact, reported, wait_until
from tests.faults.stores import Stores


class Metadata(ThreadingHTTPServer):
    """AWS's instance metadata, version 2, of one machine, as AWS's user guide describes it."""

    end: float | None = None
    """When the machine ends, in seconds since 1970."""

    class RequestHandlerClass(BaseHTTPRequestHandler):  # type: ignore[misc]
        server: "Metadata"

        def do_PUT(self) -> None:
            assert self.path == "/latest/api/token"
            assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
            self._answer(200, "the-token")

        def do_GET(self) -> None:
            end = self.server.end
            if self.headers["X-aws-ec2-metadata-token"] != "the-token":
                self._answer(401, "")
            elif self.path != "/latest/meta-data/spot/instance-action" or end is None:
                self._answer(404, "")
            else:
                told = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                self._answer(200, json.dumps({"action": "terminate", "time": told}))

        def _answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def metadata() -> Iterator[Metadata]:
    server = Metadata(("127.0.0.1", 0), Metadata.RequestHandlerClass)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_machine_is_asked_as_aws_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spot_end() is None  # this is none of AWS's
    with metadata() as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.address)
        assert spot_end() is None
        server.end = 1_800_000_000.0
        assert spot_end() == server.end
    with pytest.raises(OSError, match="refused"):
        spot_end()


@pytest.fixture
def machines() -> Iterator[Cluster]:
    """A Ray of one machine, for the driver."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.mark.long
@pytest.mark.parametrize("script", ["train", "agc_sweep"])
def test_a_notice_makes_a_checkpoint_from_which_another_machine_goes_on(
    script: str, tmp_path: Path, machines: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take a while, and no other checkpoint is made before the epoch's end."""
    slow = ("            optimizer.zero_grad()", "            __import__('time').sleep(1)\n")
    copy = edited_copy(tmp_path / "copy", {"platform/nflab/learning/loop.py": slow})
    stores = Stores(tmp_path, script, "p")
    stores.env["RAY_ADDRESS"] = machines.address
    stores.env["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"
    flags = "--epochs 2 --batch-size 64 --augmentation-level 0 --clipping 0.08".split()
    if script == "agc_sweep":
        flags += ["--trials", "1"]
    with metadata() as server:
        # A node's processes have its environment.
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.address)
        spot = machines.add_node(num_cpus=1)
        monkeypatch.delenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        run = Run(stores, f"{script}.py", "--name", "p", *flags, root=copy)
        wait_until(lambda: reported(stores) >= 1, run)
        server.end = time.time() + 120  # as AWS has it
        folders = [tmp_path / "runs/p", tmp_path / "runs/p/trials/0001"]
        checkpoints = Checkpoints.of_run(str(folders[script == "agc_sweep"]))
        wait_until(lambda: checkpoints.last_mark() not in (None, (1, 0)), run)
        mark = checkpoints.last_mark()
        assert mark is not None and mark[0] == 1 and 0 < mark[1] < 16, mark
        machines.add_node(num_cpus=1)
        machines.remove_node(spot, allow_graceful=False)
        assert run.wait() == 0, run.output()
    ours = stores.children()[1] if script == "agc_sweep" else stores.parent()
    assert stores.steps(ours) == [1, 2]
    check_exact(stores, ours)
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/p/**/rank-0.log"))
    assert logs.count("this machine is about to be taken away") == 1
    assert "continues after epoch 1 and" in logs
