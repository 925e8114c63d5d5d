"""Networks that start from pre-trained weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nfnet
from nflab.data import load_dataset
from nflab.learning.evaluation import check_pretrained, evaluate_pretrained
from nflab.learning.loop import train
from nflab.learning.models import build_model
from nflab.learning.validation import validate
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.storage.checkpoints import Checkpoints

BASE = replace(RECIPES["digits"].config, dataset="digits:0-4", epochs=3)


def train_into(config: Config, folder: Path) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    train(config, Worker(report=reports.append, checkpoints=Checkpoints(str(folder))))
    return reports


def weights(folder: Path) -> Path:
    """Of the last epoch; the best one's are kept beside them."""
    return max(folder.glob("epoch-*/weights.pt"))


@pytest.mark.parametrize("model", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_fine_tuning_starts_from_the_features_under_a_new_head_and_leaves_what_is_frozen(
    tmp_path: Path, model: str
) -> None:
    base = replace(BASE, model=model)
    train_into(base, tmp_path / "base")
    path = weights(tmp_path / "base")
    config = replace(
        base,
        dataset="digits:5-9",
        pretrained=str(path),
        frozen=("stem", "stage1"),
        ema_decay=None,
        base_learning_rate=0.4,
    )
    reports = train_into(config, tmp_path / "tuned")
    assert [m["epoch"] for m in reports] == [0, 1, 2, 3]
    assert {"val_top1", "test_top1"} <= reports[0].keys()
    assert reports[-1]["val_top1"] > reports[0]["val_top1"] + 20
    before = torch.load(path, weights_only=True)
    after = torch.load(weights(tmp_path / "tuned"), weights_only=True)
    moved = {
        name
        for name, tensor in after.items()
        if tensor.is_floating_point() and not torch.equal(tensor, before[name])
    }
    assert {nfnet.layer_group(name) for name in moved} == {"stage2", "stage3", "head"}
    start = build_model(config, load_dataset(config), new_head=True).state_dict()
    assert not torch.equal(start["head.fc.weight"], before["head.fc.weight"])
    assert torch.equal(start["stages.2.0.conv1.weight"], before["stages.2.0.conv1.weight"])


def test_fine_tuning_goes_on_where_it_was(tmp_path: Path) -> None:
    train_into(replace(BASE, epochs=1), tmp_path / "base")
    config = replace(BASE, dataset="digits:5-9", pretrained=str(weights(tmp_path / "base")))
    whole = train_into(config, tmp_path / "tuned")
    again = train_into(config, tmp_path / "tuned")
    assert again == whole


def test_weights_that_do_not_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(nfnet.create_model("dm_nf_resnet_digits", num_classes=5).state_dict(), path)
    config = replace(Config(), pretrained=str(path))
    validate(config)  # five classes, under a new head
    check_pretrained(replace(config, dataset="digits:0-4"))
    with pytest.raises(
        ConfigError,
        match="needs a new classifier of 10 classes, not 5: fine",
    ):
        check_pretrained(config)
    with pytest.raises(ConfigError, match="do not fit the model"):
        validate(replace(config, model="preact_resnet_digits"))
    with pytest.raises(ConfigError, match="there is no file 'nowhere'"):
        validate(replace(config, pretrained="nowhere"))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        check_pretrained(Config())
    for part in ("head", "stage4"):
        with pytest.raises(ConfigError, match=f"'{part}' cannot be frozen: choose from stem, stag"):
            validate(replace(config, frozen=(part,)))


def test_imagenets_weights_are_fine_tuned_on_small_images_under_a_new_stem(tmp_path: Path) -> None:
    torch.save(nfnet.create_model("nf_resnet26", num_classes=7).state_dict(), tmp_path / "w.pt")
    config = replace(Config(), model="nf_resnet26", pretrained=str(tmp_path / "w.pt"))
    with pytest.warns(UserWarning, match="a new stem 3x3, not 7x7_pool"):
        validate(config)
    with pytest.warns(UserWarning, match="a new stem 3x3, not 7x7_pool"):
        model = build_model(config, load_dataset(config), new_head=True)
    assert (model.variant.stem, model.variant.num_classes) == ("3x3", 10)
    with pytest.raises(
        ConfigError,
        match="10 classes, not 7 and a new stem 3x3",
    ):
        check_pretrained(config)
    torch.save(
        nfnet.create_model("nf_resnet26", num_classes=10, in_channels=1).state_dict(),
        tmp_path / "w.pt",
    )
    with pytest.raises(ConfigError, match="needs a new stem 3x3, not 7x7_pool: fine"):
        check_pretrained(config)


def evaluated(config: Config) -> dict[str, Any]:
    reports: list[dict[str, Any]] = []
    evaluate_pretrained(config, Worker(report=reports.append))
    return reports[-1]


def test_classes_of_trained_weights_are_known_by_their_names(tmp_path: Path) -> None:
    train_into(replace(BASE, epochs=1), tmp_path / "base")
    path = weights(tmp_path / "base")
    config = replace(BASE, pretrained=str(path))
    expected = evaluated(config)
    assert expected["test_top1"] > 40
    # The same network, whose last class comes first.
    state, described = torch.load(path, weights_only=True), path.with_name("model.json")
    for name in ("head.fc.weight", "head.fc.bias"):
        state[name] = state[name].roll(1, 0)
    torch.save(state, path)
    named = json.loads(described.read_text())
    assert named["class_names"] == ["0", "1", "2", "3", "4"]
    described.write_text(json.dumps(named | {"class_names": ["4", "0", "1", "2", "3"]}))
    assert evaluated(config) == expected

    check_pretrained(config)
    with pytest.raises(
        ConfigError, match=r"are weights not of 5, 6, 7, \.\.\. but of 4, 0, 1, \.\.\.: give"
    ):
        check_pretrained(replace(config, dataset="digits:5-9"))
    validate(replace(config, dataset="digits:5-9"))  # under a new classifier
    described.write_text("{")
    with pytest.raises(ConfigError, match=r"the model\.json beside .* is damaged"):
        check_pretrained(config)


@pytest.mark.parametrize("name", ["digits:5-5", "digits:7-2"])
def test_fewer_than_two_classes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="has no two classes"):
        validate(replace(Config(), dataset=name))


@pytest.mark.slow
def test_a_network_is_checked_without_torchs_compiler_and_without_touching_the_dataset() -> None:
    ask = """
import sys
from nflab.data import load_dataset
from nflab.learning.models import check_model
from nflab.settings.config import Config
check_model(Config(), new_head=True)
print("torch._dynamo" in sys.modules, load_dataset(Config()).mean.device)
"""
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "cpu"]
