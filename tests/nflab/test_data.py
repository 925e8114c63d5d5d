from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

import nfnet
from nflab.data import batches, load_dataset
from nflab.data.batches import cut
from nflab.data.mix import draw_mixing, mix
from nflab.data.randaugment import rand_augment
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from tests.feeds import eval_batches, train_batches


def images_of(split: str) -> tuple[Tensor, Tensor]:
    digits = load_dataset(Config())
    return digits.eval_images(split, torch.arange(digits.sizes[split]))  # type: ignore[arg-type, index]


def test_digits_splits_hold_every_image_once_and_all_classes_alike() -> None:
    images, labels = zip(*(images_of(split) for split in ("train", "val", "test")), strict=True)
    ours = sorted(
        (int(label), image.flatten().tolist())
        for image, label in zip(torch.cat(images), torch.cat(labels), strict=True)
    )
    bunch = load_digits()
    pixels = (torch.from_numpy(bunch.data) * 255 / 16).round().int()
    assert ours == sorted(zip(bunch.target.tolist(), pixels.tolist(), strict=True))
    for split_labels, share in zip(labels, (0.6, 0.2, 0.2), strict=True):
        counts = torch.bincount(split_labels)
        assert (counts / torch.bincount(torch.from_numpy(bunch.target)) - share).abs().max() < 0.01


def test_digits_splits_are_those_that_results_were_recorded_with() -> None:
    # A changed fingerprint means that recorded results no longer compare with new ones.
    assert load_dataset(Config()).fingerprint == "89dfd26e4a444b86"


def test_digits_crop_shifts_by_one_pixel_at_most_and_every_way() -> None:
    digits = load_dataset(Config())
    originals, labels = digits.eval_images("train", torch.zeros(500, dtype=torch.long))
    keys = nfnet.hash_keys(1, torch.arange(500))
    shifted, shifted_labels = digits.train_images(torch.zeros(500, dtype=torch.long), keys)
    padded = torch.nn.functional.pad(originals[0, 0], (1, 1, 1, 1))
    crops = padded.unfold(0, 8, 1).unfold(1, 8, 1).reshape(9, 8, 8)
    found = (shifted[:, 0, None] == crops).all((2, 3))
    assert found.any(1).all()
    assert found.any(0).all()
    assert torch.equal(labels, shifted_labels)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    batch_size=st.integers(7, 200),
    world_size=st.integers(1, 7),
    level=st.sampled_from([0, 7]),
    mixup=st.booleans(),
    cutmix=st.booleans(),
    partners=st.sampled_from(["batch", "fresh"]),
)
def test_no_cut_over_workers_changes_a_batch(
    seed: int,
    batch_size: int,
    world_size: int,
    level: int,
    mixup: bool,
    cutmix: bool,
    partners: str,
) -> None:
    config = replace(
        Config(),
        seed=seed,
        batch_size=batch_size,
        augmentation_level=level,
        mixup=mixup,
        cutmix=cutmix,
        partners=partners,
    )
    digits = load_dataset(Config())
    whole = next(train_batches(digits, config, 3, 0, 1))
    parts = [next(train_batches(digits, config, 3, r, world_size)) for r in range(world_size)]
    assert torch.equal(whole.images_NCHW, torch.cat([part.images_NCHW for part in parts]))
    assert torch.equal(whole.targets_NK, torch.cat([part.targets_NK for part in parts]))
    assert torch.equal(torch.arange(batch_size), torch.cat([part.places_N for part in parts]))


def test_an_epoch_meets_each_image_once_in_an_order_of_its_own() -> None:
    digits = load_dataset(Config())
    config = replace(Config(), batch_size=1071, label_smoothing=0.0)
    epochs = [
        [batch.targets_NK.argmax(1) for batch in train_batches(digits, config, epoch, 0, 1)]
        for epoch in (0, 0, 1)
    ]
    assert [len(epoch) for epoch in epochs] == [1, 1, 1]
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert not torch.equal(epochs[0][0], epochs[2][0])
    assert torch.equal(torch.bincount(epochs[0][0]), torch.bincount(images_of("train")[1]))


def test_targets_are_smoothed() -> None:
    config = replace(Config(), batch_size=50, label_smoothing=0.1)
    targets = next(train_batches(load_dataset(Config()), config, 0, 0, 1)).targets_NK
    assert torch.allclose(targets.max(1).values, torch.tensor(0.91))
    assert torch.allclose(targets.min(1).values, torch.tensor(0.01))


@pytest.mark.parametrize("what", ["crop", "augment", "mix"])
def test_each_kind_of_randomness_differs_by_epoch_and_by_image(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images of an epoch are the same one, so that only chance tells them apart."""
    digits = load_dataset(Config())
    image, label = digits.eval_images("train", torch.tensor([7]))
    drawn: list[Tensor] = []

    def same_image(indices: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if what == "crop":
            drawn.append(keys)
        return image.expand(len(indices), -1, -1, -1), label.expand(len(indices))

    monkeypatch.setattr(digits, "train_images", same_image)
    for module, name, kind in (
        (batches, "rand_augment", "augment"),
        (batches, "draw_mixing", "mix"),
    ):
        original = getattr(module, name)

        def spy(*args: Any, original: Any = original, kind: str = kind) -> Any:
            if what == kind:
                drawn.append(args[1] if kind == "augment" else args[0])
            return original(*args)

        monkeypatch.setattr(module, name, spy)
    config = replace(Config(), batch_size=100, augmentation_level=1, cutmix=what == "mix")
    for epoch in (0, 1):
        list(train_batches(digits, config, epoch, 0, 1))
    keys = torch.cat(drawn)
    assert len(keys) >= 2 * 1000
    assert len(keys.unique()) == len(keys)


def test_evaluation_sees_each_image_once_on_any_number_of_workers() -> None:
    digits = load_dataset(Config())
    labels = [
        label
        for rank in range(3)
        for _, labels in eval_batches(digits, "test", 50, rank, 3)
        for label in labels.tolist()
    ]
    assert labels == images_of("test")[1].tolist()


def test_standardised_training_images_have_mean_0_and_deviation_1() -> None:
    digits = load_dataset(Config())
    pixels = torch.cat([images for images, _ in eval_batches(digits, "train", 64, 0, 1)])
    assert pixels.mean().abs() < 1e-5
    assert (pixels.std() - 1).abs() < 1e-5


@given(st.integers(0, 1000), st.integers(1, 50))
def test_a_cut_covers_everything_evenly(size: int, world_size: int) -> None:
    parts = [range(size)[cut(size, rank, world_size)] for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rand_augment_changes_images_more_as_its_level_grows() -> None:
    images, _ = images_of("train")
    keys = nfnet.hash_keys(5, torch.arange(len(images)))
    change = [
        float((rand_augment(images, keys, 2, level).float() - images.float()).abs().mean())
        for level in (0, 3, 6, 10)
    ]
    assert change == sorted(change)
    assert change[0] == 0


def keys_and_places(batch_size: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(batch_size)
    return nfnet.hash_keys(11, places), places


def test_mixing_draws_from_the_papers_distributions() -> None:
    keys, places = keys_and_places(20000)
    mixing = draw_mixing(keys, places, 20000, mixup=True, cutmix=True)
    for_mixup = places < 10000
    ratio = mixing.keep_N[for_mixup]
    # Beta(0.2, 0.2): mean 1/2, variance 1 / (4 (2 * 0.2 + 1)).
    assert abs(ratio.mean() - 0.5) < 0.01
    assert abs(ratio.var() - 1 / 5.6) < 0.005
    assert (mixing.keep_N[~for_mixup] == 1).all()
    top, bottom, left, right = mixing.box_N4.T
    area = (bottom - top) * (right - left)
    assert (area[for_mixup] == 0).all()
    # The uncut side is sqrt(u), u and the centre c uniform: E[side within the image] is
    # E[s] - 2 E[max(0, s/2 - c)] = 2/3 - 2 E[s^2 / 8] = 2/3 - 1/8.
    for low, high in ((top, bottom), (left, right)):
        assert abs((high - low)[~for_mixup].mean() - (2 / 3 - 1 / 8)) < 0.01


@pytest.mark.parametrize(("mixup", "cutmix"), [(True, False), (False, True), (True, True)])
def test_labels_are_mixed_as_the_pixels_are(mixup: bool, cutmix: bool) -> None:
    keys, places = keys_and_places(64)
    mixing = draw_mixing(keys, places, 64, mixup, cutmix)
    white = torch.full((64, 1, 40, 40), 255, dtype=torch.uint8)
    mixed, share = mix(white, torch.zeros_like(white), mixing)
    assert (mixed.double().mean((1, 2, 3)) / 255 - share).abs().max() < 0.003
    assert share.min() < 0.3
    assert share.max() > 0.7


def test_nothing_is_mixed_where_nothing_is_asked_for() -> None:
    keys, places = keys_and_places(16)
    images, _ = images_of("val")
    mixing = draw_mixing(keys, places, 16, mixup=False, cutmix=False)
    mixed, share = mix(images[:16], images[16:32], mixing)
    assert torch.equal(mixed, images[:16])
    assert (share == 1).all()


def test_mixed_pixels_are_those_of_double_precision() -> None:
    keys, places = keys_and_places(200)
    mixing = draw_mixing(keys, places, 200, mixup=True, cutmix=True)
    images = torch.randint(0, 256, (400, 3, 9, 13), dtype=torch.uint8)
    own, partners = images.split(200)
    before = own.clone()
    mixed, share = mix(own, partners, mixing)
    assert torch.equal(own, before)
    keep = mixing.keep_N[:, None, None, None]
    blended = (keep * own + (1 - keep) * partners).round()
    # A half may be rounded either way.
    assert (mixed[:100].double() - blended[:100]).abs().max() <= 1
    assert (mixed[:100] == blended[:100]).double().mean() > 0.9999
    for place in range(100, 200):
        top, bottom, left, right = (
            round(float(at) * size)
            for at, size in zip(mixing.box_N4[place], (9, 9, 13, 13), strict=True)
        )
        expected = own[place].clone()
        expected[:, top:bottom, left:right] = partners[place][:, top:bottom, left:right]
        assert torch.equal(mixed[place], expected)
        assert float(share[place]) == pytest.approx(1 - (bottom - top) * (right - left) / 117)


class Spied:
    """A dataset of images that tell their index, which notes what is read."""

    def __init__(self, size: int) -> None:
        self.class_names = tuple(str(index) for index in range(size))
        self.sizes = {"train": size}
        self.mean, self.std = torch.zeros(1), torch.ones(1)
        self.read: list[int] = []
        self.keys: list[int] = []

    def train_images(self, indices: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        self.read += indices.tolist()
        self.keys += keys.tolist()
        return torch.zeros(len(indices), 1, 8, 8, dtype=torch.uint8), indices


def pairs_of(batch: batches.Batch) -> list[tuple[int, ...]]:
    """The classes that have part in each target."""
    return [tuple(row.nonzero()[:, 0].tolist()) for row in batch.targets_NK]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_neighbours_in_the_batch_are_mixed_and_none_is_read_twice(world_size: int) -> None:
    config = replace(Config(), batch_size=10, mixup=True, label_smoothing=0.0)
    found = []
    for rank in range(world_size):
        dataset: Any = Spied(40)
        for batch in train_batches(dataset, config, 0, rank, world_size):
            found += list(zip(batch.places_N.tolist(), pairs_of(batch), strict=True))
        assert len(dataset.read) == len(set(dataset.read))
    mixed = [pair for _, pair in found if len(pair) == 2]
    assert len(mixed) > 30  # a ratio may be 1
    partners: dict[int, set[int]] = {}
    for a, b in mixed:
        partners.setdefault(a, set()).add(b)
        partners.setdefault(b, set()).add(a)
    assert all(len(others) == 1 for others in partners.values())  # pairs are disjoint


def test_the_last_of_an_odd_batch_stays_as_it_is() -> None:
    config = replace(Config(), batch_size=9, mixup=True, cutmix=True, label_smoothing=0.0)
    dataset: Any = Spied(90)
    for batch in train_batches(dataset, config, 0, 0, 1):
        assert len(pairs_of(batch)[-1]) == 1
    assert len(dataset.read) == len(set(dataset.read)) == 90


def test_fresh_partners_are_other_images_with_crops_of_their_own() -> None:
    config = replace(
        Config(), batch_size=50, mixup=True, cutmix=True, label_smoothing=0.0, partners="fresh"
    )
    dataset: Any = Spied(1000)
    mixed = [pair for b in train_batches(dataset, config, 0, 0, 1) for pair in pairs_of(b)]
    # Each image once for itself and once as a partner, each time with another crop.
    assert sorted(dataset.read) == sorted(2 * list(range(1000)))
    assert len(set(dataset.keys)) == 2000
    own_batch = [set(dataset.read[100 * n : 100 * n + 50]) for n in range(20)]
    partners = [set(dataset.read[100 * n + 50 : 100 * n + 100]) for n in range(20)]
    shared = sum(len(a & b) for a, b in zip(own_batch, partners, strict=True))
    assert shared < 100  # 50 by chance, where all 1000 would be were they of the same batch
    assert sum(len(pair) == 2 for pair in mixed) > 850
