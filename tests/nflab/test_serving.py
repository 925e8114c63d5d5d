"""A recorded model answers images, in this process and over HTTP."""

import base64
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import mlflow.pyfunc
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

import nfnet
from nflab.data import example_image, load_dataset
from nflab.learning.classifier import ImageClassifier
from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.recording.tracker import Tracker
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.storage.checkpoints import Checkpoints
from tests.conftest import free_port, run_script

CONFIG = replace(RECIPES["digits"].config, dataset="digits:3-7", epochs=3, batch_size=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    train(CONFIG, Worker(report=lambda metrics: None, checkpoints=Checkpoints(str(folder))))
    (found,) = folder.glob("epoch-*")
    return found


def png(image_CHW: torch.Tensor, scale: int = 1) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image_CHW[0].numpy())
    image.resize((8 * scale, 8 * scale), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def images() -> tuple[list[bytes], torch.Tensor]:
    """Test images as files, and the probabilities that the network itself gives them."""
    pixels, _ = load_dataset(CONFIG).eval_images("test", torch.arange(12))
    return [png(image) for image in pixels], pixels


def expected(checkpoint: Path) -> torch.Tensor:
    dataset = load_dataset(CONFIG)
    _, pixels = images()
    model = nfnet.create_model(CONFIG.model.model, pretrained=str(checkpoint / "weights.pt")).eval()
    with torch.no_grad():
        logits: torch.Tensor = model((pixels.float() / 255 - dataset.mean) / dataset.std)
    return logits.softmax(1)


def test_probabilities_are_the_networks(checkpoint: Path) -> None:
    classifier = ImageClassifier(checkpoint)
    assert classifier.class_names == ["3", "4", "5", "6", "7"]
    files, pixels = images()
    torch.testing.assert_close(classifier.probabilities(files), expected(checkpoint))
    # A larger picture of the same is resized.
    larger = classifier.probabilities([png(pixels[0], scale=5)])
    torch.testing.assert_close(larger, expected(checkpoint)[:1], atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="an input is no image"):
        classifier.probabilities([b"no image"])


def test_weights_that_are_not_what_is_said_of_them_answer_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    said = json.loads((folder / "model.json").read_text())
    said["settings"]["num_classes"] = 10
    (folder / "model.json").write_text(json.dumps(said))
    with (
        pytest.warns(UserWarning, match="adapted"),
        pytest.raises(ValueError, match=r"not what model\.json says: it needs a new classifier"),
    ):
        ImageClassifier(folder)


@pytest.mark.slow
def test_a_recorded_model_is_loaded_and_served(checkpoint: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "runs"), "train")
    run_id = tracker.start("x", {})
    tracker.add_model(run_id, checkpoint, example_image(CONFIG))
    tracker.finish(run_id, "finished")
    client = MlflowClient(tracker.uri)
    (logged,) = client.search_logged_models([tracker.experiment_id])
    assert logged.source_run_id == run_id
    assert str(tmp_path / "runs") in logged.artifact_location
    uri = client.get_run(run_id).data.tags["model_uri"]

    files, _ = images()
    wanted = expected(checkpoint)
    mlflow.set_tracking_uri(tracker.uri)
    model = mlflow.pyfunc.load_model(uri)
    assert [column.name for column in model.metadata.get_input_schema()] == ["image"]
    assert len(model.input_example) == 1
    answers = model.predict(pd.DataFrame({"image": files}))
    assert answers["class"].tolist() == [str(3 + int(best)) for best in wanted.argmax(1)]
    np.testing.assert_allclose(answers.probability, wanted.max(1).values, atol=1e-5)

    port = free_port()
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        [
            *[sys.executable, "-m", "mlflow", "models", "serve"],
            *["-m", uri, "-p", str(port), "--env-manager", "local"],
        ],
        cwd=tmp_path,
        env={"MLFLOW_TRACKING_URI": tracker.uri, "PATH": f"{Path(sys.executable).parent}:/usr/bin"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        rows = [[base64.b64encode(file).decode()] for file in files]
        answer = ask(port, {"dataframe_split": {"columns": ["image"], "data": rows}}, server)
        rows_of_answer = answer["predictions"]
        assert [row["class"] for row in rows_of_answer] == answers["class"].tolist()
        probabilities = [row["probabilities"] for row in rows_of_answer]
        np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait()
        log.close()


def ask(port: int, body: dict[str, object], server: "subprocess.Popen[bytes]") -> dict[str, list]:  # type: ignore[type-arg]
    """What the server answers, once it is up."""
    request = Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            with urlopen(request, timeout=60) as reply:
                found: dict[str, list] = json.load(reply)  # type: ignore[type-arg]
                return found
        except HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError("no answer")


@pytest.mark.slow
def test_export_py_writes_both_kinds_of_files(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.pt2"):
        done = run_script(
            tmp_path, {}, "export.py", str(checkpoint), name, cold=name == "model.pt2"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}: images (N, 1, 8, 8), logits (N, 5)\n"
        assert (tmp_path / name).stat().st_size > 100_000
    for arguments, message in (
        ([str(checkpoint), "model.bin"], "must end in .onnx or .pt2"),
        (["nowhere", "model.onnx"], "No such file"),
    ):
        failed = run_script(tmp_path, {}, "export.py", *arguments)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ")
        assert message in failed.stderr


def test_the_configuration_is_not_needed(checkpoint: Path) -> None:
    assert Config() != CONFIG
    (checkpoint / "config.json").unlink()
    ImageClassifier(checkpoint)
