"""Which kind of GPU a run trained on, recorded with it; and that several were of other kinds."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest
import torch

from nflab.cluster import hardware
from nflab.cluster.hardware import gpu_of, in_words
from nflab.recording.outbox import Outbox
from nflab.recording.run_record import RunRecord
from nflab.recording.tracker import Tracker
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.studies.costs import gpu_sentences
from tests.nflab.test_loop import run
from tests.stores import new_database

SMALL = replace(RECIPES["digits"].config, epochs=2, batch_size=256)

TOLD = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""
"""By NVIDIA's driver; an older one says `NVIDIA UNIX x86_64 Kernel Module  535.183.01`."""


class Metadata(BaseHTTPRequestHandler):
    """A machine of AWS tells of its image."""

    def do_PUT(self) -> None:
        self._answer("token")

    def do_GET(self) -> None:
        self._answer("ami-0123" if self.path == "/latest/meta-data/ami-id" else None)

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def on_aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("driver", "version"),
    [
        (TOLD, "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12", "535.183.01"),
    ],
)
def test_a_gpu_is_told_with_its_driver_and_the_machines_image(
    on_aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, version: str
) -> None:
    monkeypatch.setattr(hardware, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text(driver)
    assert in_words("NVIDIA A10G") == f"NVIDIA A10G, driver {version}, image ami-0123"


def test_what_is_not_told_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "DRIVER", tmp_path / "none")
    assert in_words("NVIDIA L4") == "NVIDIA L4"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    assert in_words("NVIDIA L4") == "NVIDIA L4"
    assert gpu_of(torch.device("cpu")) is None


def test_it_is_told_once_and_recorded_with_the_run(tmp_path: Path) -> None:
    """Of a CPU nothing is told."""
    assert all("gpu" not in m for m in run(SMALL, tmp_path / "cpu").metrics)
    reports = run(SMALL, tmp_path / "gpu", gpu="NVIDIA A10G").metrics
    assert [m.get("gpu") for m in reports] == ["NVIDIA A10G", None]
    new_database(tmp_path / "mlflow.db")
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), "test")
    outbox = Outbox(tracker, tmp_path / "outbox")
    parent = tracker.start("sweep", {})
    for gpu in ("NVIDIA A10G", "NVIDIA L4", "NVIDIA A10G", None):
        record = RunRecord(outbox, outbox.start("trial", {"trial": "1"}, parent), SMALL)
        record.report({**reports[1], **({} if gpu is None else {"gpu": gpu})})
        record.finish("finished")
    (said,) = gpu_sentences(outbox.read(lambda: tracker.children(parent)))
    outbox.close()
    assert said.endswith("of GPU, whose rounding may differ: 2 on NVIDIA A10G; 1 on NVIDIA L4.")
    assert gpu_sentences(pd.DataFrame({"gpu": ["NVIDIA L4", "NVIDIA L4", None]})) == []
