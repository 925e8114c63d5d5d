"""A part of the training split is a setting: which images it has, and that nothing else reads it
otherwise than a dataset of its own."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nflab import data
from nflab.data import DatasetError, load_dataset
from nflab.data.arrays import ArrayDataset
from nflab.data.subset import Subset, chosen
from nflab.learning.computation import (
    CONFIG,
    MADE_BY,
    OtherComputation,
    digest,
    digests,
    made_by,
    require_same,
)
from nflab.learning.loop import train
from nflab.learning.validation import validate
from nflab.learning.worker import Worker
from nflab.recording.run_record import dataset_entry
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.settings.search_space import scales
from nflab.settings.serialization import to_json
from nflab.settings.streams import Stream, keys
from tests.feeds import train_batches
from tests.photos import write_photos

TENTH = replace(RECIPES["digits"].config, subset=0.1, batch_size=16, epochs=2)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    shares=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=2),
)
def test_a_part_has_its_share_of_each_class_and_lies_within_a_larger_one(
    labels: list[int], shares: list[float]
) -> None:
    labels_N = torch.tensor(labels)
    small, large = (chosen(labels_N, share) for share in sorted(shares))
    assert set(small.tolist()) <= set(large.tolist())
    assert small.tolist() == sorted(set(small.tolist()))
    whole, part = Counter(labels), Counter(labels_N[small].tolist())
    assert set(part) == set(whole)
    for label, count in part.items():
        assert count == 1 or abs(count - min(shares) * whole[label]) <= 0.5 + 1e-9
    # Another way to the same: one class after another, by hand.
    drawn = keys(0, Stream.SUBSET, torch.arange(len(labels))).argsort().tolist()
    by_hand = [
        i for label in whole for i in [j for j in drawn if labels[j] == label][: part[label]]
    ]
    assert small.tolist() == sorted(by_hand)


def test_the_digits_part_is_the_one_that_results_were_recorded_with() -> None:
    part = load_dataset(TENTH)
    assert isinstance(part, Subset)
    assert part.sizes == {**load_dataset(Config()).sizes, "train": 109}
    assert (
        part._places_N[:8].tolist() == load_dataset(replace(TENTH, seed=5))._places_N[:8].tolist()
    )  # type: ignore[attr-defined]
    counts = part.train_labels.bincount()
    assert counts.max() - counts.min() <= 1
    assert part._places_N[:8].tolist() == FIRST


FIRST = [14, 19, 28, 35, 58, 74, 75, 79]


def test_the_whole_is_what_it_was_and_a_part_is_another_cell() -> None:
    whole = replace(TENTH, subset=1.0)
    assert not isinstance(load_dataset(whole), Subset)
    assert len({digest(replace(TENTH, subset=s)) for s in (0.1, 0.2, 1.0)}) == 3
    assert digests(TENTH)[0] == digest(TENTH)
    # The dataset is the same one, and MLflow has one entry of it.
    assert dataset_entry(TENTH) == dataset_entry(whole)


@pytest.mark.parametrize("mixed", [{}, {"mixup": True}, {"cutmix": True, "partners": "fresh"}])
@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_those_of_a_dataset_that_holds_no_more(
    mixed: dict[str, Any], world_size: int
) -> None:
    config = replace(TENTH, augmentation_level=3, **mixed)
    part, whole = load_dataset(config), load_dataset(replace(config, subset=1.0))
    assert isinstance(part, Subset)
    assert isinstance(whole, ArrayDataset)
    splits = dict(whole._splits)
    images, labels = splits["train"]
    splits["train"] = images[part._places_N], labels[part._places_N]
    alone = ArrayDataset(splits, whole.class_names, shift=1, flip=False)
    for epoch in (0, 1):
        for rank in range(world_size):
            own = list(train_batches(part, config, epoch, rank, world_size))
            others = list(train_batches(alone, config, epoch, rank, world_size))
            assert len(own) == 109 // 16
            for a, b in zip(own, others, strict=True):
                assert torch.equal(a.images_NCHW, b.images_NCHW)
                assert torch.equal(a.targets_NK, b.targets_NK)


@pytest.mark.slow
def test_a_part_of_a_folder_skips_the_image_that_is_damaged(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", {"train": 20, "val": 2, "test": 2})
    config = replace(
        Config(),
        dataset=str(folder),
        model="dm_nf_resnet_digits",
        image_size=16,
        subset=0.5,
        batch_size=8,
        bad_images="skip",
    )
    part: Any = load_dataset(config)
    assert part.sizes["train"] == 20
    before = list(train_batches(part, config, 0, 0, 1))
    order = keys(config.run.seed, Stream.ORDER, 0, torch.arange(20)).argsort()
    place = int(part._places_N[order[3]])
    path = Path(part.whole._files["train"][place])
    path.write_bytes(path.read_bytes()[:200])
    data._load.cache_clear()
    data._part.cache_clear()
    part = load_dataset(config)
    for loaders in (0, 2):
        after = list(train_batches(part, config, 0, 0, 1, loaders))
        assert [batch.replaced for batch in after] == [1, 0]
        changed = (after[0].images_NCHW != before[0].images_NCHW).flatten(1).any(1)
        assert changed.nonzero()[:, 0].tolist() == [3]
        assert torch.equal(after[0].images_NCHW[3], before[0].images_NCHW[4])


@pytest.mark.slow
def test_a_run_on_a_part_takes_its_steps_and_tests_on_all() -> None:
    reports: list[dict[str, Any]] = []
    train(TENTH, Worker(report=reports.append))
    assert [report["samples_seen"] for report in reports] == [96, 192]
    size = load_dataset(TENTH).sizes["test"]
    hits = reports[-1]["test_top1"] * size / 100
    assert hits == pytest.approx(round(hits))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subset": 0.0}, "subset 0 must be above 0, and at most 1"),
        ({"subset": 1.5}, "subset 1.5 must be above 0, and at most 1"),
        ({"subset": float("nan")}, "subset nan must be above 0, and at most 1"),
        (
            {"subset": 0.1, "batch_size": 128},
            "batch_size 128 exceeds the 109 training images of subset 0.1 of digits",
        ),
    ],
)
def test_what_is_no_part_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(replace(RECIPES["digits"].config, **changes))


def test_trials_share_their_part() -> None:
    with pytest.raises(ConfigError, match="subset cannot be searched: trials are compared by it"):
        scales(["subset=0.1,0.2"])


def test_a_dataset_that_does_not_tell_its_labels_has_no_part() -> None:
    silent: Any = SimpleNamespace(sizes={"train": 3})
    with pytest.raises(DatasetError, match="give it an attribute train_labels"):
        Subset(silent, 0.5)


def test_a_checkpoint_of_the_whole_is_none_of_a_part(tmp_path: Path) -> None:
    whole = replace(TENTH, subset=1.0)
    (tmp_path / MADE_BY).write_text(json.dumps(made_by(whole)))
    part = load_dataset(TENTH)
    with pytest.raises(OtherComputation, match=r"subset 1\.0 -> 0\.1"):
        require_same(tmp_path, 1, made_by(TENTH), part)
    (tmp_path / MADE_BY).unlink()
    (tmp_path / CONFIG).write_text(to_json(whole))  # of before there was MADE_BY
    with pytest.raises(OtherComputation, match=r"subset 1\.0 -> 0\.1"):
        require_same(tmp_path, 1, made_by(TENTH), part)
