"""The time of a training step: of which models, at which sizes, and what is drawn."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nflab.analysis.figures import draw_latency
from nflab.analysis.published import EFFICIENTNETS, NFNETS
from nflab.learning.step_time import step_seconds, train_size
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "size"),
    # arXiv 2102.06171, table 1; arXiv 1905.11946 as Keras lists its sizes.
    [
        ("dm_nfnet_f0", 192),
        ("dm_nfnet_f6", 448),
        ("efficientnet_b0", 224),
        ("efficientnet_b7", 600),
    ],
)
def test_models_are_measured_at_the_sizes_of_their_authors(name: str, size: int) -> None:
    assert train_size(name) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dm_nfnet_f9", "efficientnet_b9"])
def test_an_unknown_model_is_told(name: str) -> None:
    command = [sys.executable, "experiments/latency.py", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["nf_regnet_b0", "efficientnet_b0"])
def test_a_step_takes_time(name: str) -> None:
    assert step_seconds(name, 2, torch.device("cpu"), bfloat16=False) > 0


def test_what_has_an_accuracy_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "latency.png"
    seconds = {"dm_nfnet_f0": 1.0, "dm_nfnet_f1": 2.0, "efficientnet_b7": 9.0, "other": 1.0}
    draw_latency(seconds, {"NFNet": NFNETS, "EfficientNet": EFFICIENTNETS}, "CPU", path)
    with Image.open(path) as image:
        assert image.size == (960, 630)
