"""The recipes between the digits and ImageNet, shortened, on generated images of their layout."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from nflab.data import load_dataset
from nflab.learning.loop import train
from nflab.learning.validation import validate
from nflab.learning.worker import Worker
from nflab.settings.leaves import flat, replace
from nflab.settings.recipes import RECIPES
from tests.nflab.test_folder import write_cifar
from tests.photos import write_photos

CIFAR_SIZES = [128, 256, 512, 1024, 2048, 4096]


def write_cifar100(folder: Path, per_class: int = 10) -> None:
    """CIFAR-100's files, in its format, with fewer images."""
    rng = np.random.default_rng(0)
    files = folder / "cifar-100-python"
    files.mkdir(parents=True)
    for name in ("train", "test"):
        labels = [n % 100 for n in range(100 * per_class)]
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (files / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    names = {"fine_label_names": [f"class {n}" for n in range(100)]}
    (files / "meta").write_bytes(pickle.dumps(names))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenette"])
def test_every_number_has_its_source(name: str) -> None:
    recipe = RECIPES[name]
    c = flat(recipe.config)
    assert c["recipe"] == name
    assert all(source for _, source in recipe.settings.values())
    # As the paper's ablations: section 4.1 and figure 2.
    assert (c["base_learning_rate"], c["momentum"], c["warmup_epochs"]) == (0.1, 0.9, 5.0)
    assert (c["label_smoothing"], c["weight_decay"], c["ema_decay"]) == (0.1, 1e-4, None)
    sizes = recipe.space.batch_sizes()
    assert sizes == (CIFAR_SIZES if name != "imagenette" else [64, 128, 256, 512, 1024])
    assert recipe.space.clippings == (0.01, 0.02, 0.04, 0.08, 0.16)
    assert c["batch_size"] in sizes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dm_nf_resnet_small", "preact_resnet_small"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_trained_as_the_recipe_says(
    classes: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_cifar if classes == 10 else write_cifar100)(tmp_path)
    # The checksums are those of the real files.
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    config = replace(
        RECIPES[f"cifar{classes}"].config,
        dataset=str(tmp_path),
        model=model,
        clipping=None if model.startswith("preact") else 0.04,
        epochs=2,
        warmup_epochs=1.0,
        batch_size=32,
        subset=0.5,
    )
    validate(config)
    dataset = load_dataset(config)
    assert len(dataset.class_names) == classes
    reports: list[dict[str, Any]] = []
    train(config, Worker(report=reports.append))
    # Half of each class's images that are not for validation.
    images = 90 if classes == 10 else 500
    assert dataset.sizes["train"] == images
    assert [report["samples_seen"] for report in reports] == [
        n * (images // 32 * 32) for n in (1, 2)
    ]
    assert reports[-1]["outcome"] == "finished"
    assert reports[-1]["learning_rate"] < 0.1 * 32 / 256


@pytest.mark.slow
def test_a_folder_of_photographs_is_trained_as_imagenette_is(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", {"train": 20, "val": 3, "test": 3}, pixels=160)
    config = replace(
        RECIPES["imagenette"].config,
        dataset=str(folder),
        model="dm_nf_resnet_small",  # the recipe's takes minutes
        epochs=1,
        warmup_epochs=0.5,
        batch_size=8,
        subset=0.4,
        loaders=0,
    )
    validate(config)
    assert load_dataset(config).image_shape == (3, 160, 160)
    reports: list[dict[str, Any]] = []
    train(config, Worker(report=reports.append))
    assert (reports[-1]["outcome"], reports[-1]["samples_seen"]) == ("finished", 16)
