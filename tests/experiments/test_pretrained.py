"""Pre-trained weights: fine-tuned on photographs, then evaluated on several workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

import nfnet
from tests.conftest import Script
from tests.photos import write_photos

MODEL = "dm_nf_resnet_digits"


def only_run(store: dict[str, str], experiment: str) -> Run:
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return run


def top1_by_hand(photos: Path, weights: Path) -> float:
    """Accuracy on `val`, image by image, in percent."""
    model = nfnet.create_model(MODEL, in_channels=3, pretrained=str(weights)).eval()
    normalise = v2.Normalize(list(nfnet.IMAGENET_MEAN), list(nfnet.IMAGENET_STD))
    right = []
    for label, name in enumerate(("china", "flower")):
        for path in sorted((photos / "val" / name).iterdir()):
            with Image.open(path) as image:
                pixels = torch.from_numpy(
                    np.array(image.resize((24, 24), Image.Resampling.BICUBIC))
                )
            x = normalise(pixels.permute(2, 0, 1).float() / 255)
            right.append(int(model(x[None]).argmax()) == label)
    return 100 * sum(right) / len(right)


def test_photographs_are_fine_tuned_on_and_evaluated(
    script: Script, store: dict[str, str], tmp_path: Path, ray_address: str
) -> None:
    photos = write_photos(tmp_path / "photos", {"train": 40, "val": 13})
    start = tmp_path / "start.pt"
    torch.save(nfnet.create_model(MODEL, num_classes=7, in_channels=3).state_dict(), start)
    data = ["--dataset", "photos", "--image-size", "24", "--batch-size", "12"]
    tuned = script(
        *["finetune.py", "--model", MODEL, "--pretrained", "start.pt", *data],
        *["--epochs", "4", "--clipping", "0.16", "--base-learning-rate", "1"],
        *["--frozen", "stem", "--loaders", "1", "--name", "tuned"],
        RAY_ADDRESS=ray_address,
    )
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    run = only_run(store, "finetune")
    before, after = run.data.metrics, tuned.stdout
    assert "before" in after
    assert f"{before['test_top1']:.2f} % after fine-tuning" in after
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    classes = client.download_artifacts(run.info.run_id, "classes.json")
    assert Path(classes).read_text() == '["china", "flower"]'

    weights = max((tmp_path / "runs" / "tuned").glob("checkpoints/epoch-*/weights.pt"))
    done = script(
        *["evaluate.py", "--model", MODEL, "--pretrained", str(weights), *data],
        *["--num-workers", "2", "--loaders", "0"],
        RAY_ADDRESS=ray_address,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    evaluated = only_run(store, "evaluate").data.metrics
    assert evaluated["test_top1"] == pytest.approx(before["test_top1"])
    assert evaluated["test_top1"] == pytest.approx(top1_by_hand(photos, weights))
    assert f"test top-1 {evaluated['test_top1']:.2f} %" in done.stdout


def test_nothing_to_start_from_is_said_at_once(script: Script) -> None:
    for name in ("finetune.py", "evaluate.py"):
        done = script(name, "--recipe", "digits", cold=True)
        assert done.returncode == 2
        assert "give --pretrained" in done.stderr
