"""Datasets in IDX files: small ones written here, and Fashion-MNIST where it is installed."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import nfnet
from nflab.data import DatasetError, load_dataset
from nflab.data.dataset import Dataset
from nflab.learning.models import build_model
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def write(file: Path, array: np.ndarray) -> None:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)


def make(
    folder: Path,
    counts: tuple[int, ...] = (30, 20),
    prefix: str = "",
    test: str = "t10k",
    ending: str = "",
    first_label: int = 0,
) -> Path:
    """A dataset whose image n of a class is filled with the grey n, and has its label above."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, scale in ((f"{prefix}train", 1), (f"{prefix}{test}", 2)):
        labels = np.concatenate([np.full(n // scale, k) for k, n in enumerate(counts)])
        nth = np.concatenate([np.arange(n // scale) for n in counts])
        order = np.random.default_rng(0).permutation(len(labels))
        order = order[np.argsort(nth[order], kind="stable")]  # n-th of its class, in file order
        images = np.broadcast_to(nth[order][:, None, None], (len(order), 6, 5)).copy()
        images[:, 0, 0] = labels[order]
        write(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write(folder / f"{part}-labels-idx1-ubyte{ending}", labels[order] + first_label)
    return folder


def load(folder: Path | str) -> Dataset:
    return load_dataset(replace(Config(), dataset=str(folder)))


def test_both_packed_and_plain_files_are_read_and_are_one_dataset(tmp_path: Path) -> None:
    plain, packed = load(make(tmp_path / "a")), load(make(tmp_path / "b", ending=".gz"))
    assert plain.sizes == {"train": 42, "val": 8, "test": 25}
    assert plain.fingerprint == packed.fingerprint
    assert plain.image_shape == (1, 6, 5)
    assert plain.class_names == ("0", "1")
    images, labels = plain.eval_images("test", torch.arange(25))
    assert torch.equal(images[:, 0, 0, 0], labels.to(torch.uint8))


def test_validation_has_as_many_of_each_class_spread_over_the_file(tmp_path: Path) -> None:
    dataset = load(make(tmp_path / "a", (30, 20, 100)))
    images, labels = dataset.eval_images("val", torch.arange(dataset.sizes["val"]))
    assert torch.bincount(labels).tolist() == [4, 4, 4]  # a fifth of the smallest class
    nth = images[:, 0, 5, 4]
    for label, count in enumerate((30, 20, 100)):
        of_class = nth[labels == label].int().tolist()
        assert of_class[-1] == count - 1
        gaps = np.diff([-1, *of_class])
        assert gaps.max() - gaps.min() <= 1
    train, train_labels = dataset.eval_images("train", torch.arange(dataset.sizes["train"]))
    both = torch.cat([train_labels, labels]), torch.cat([train[:, 0, 5, 4], nth])
    assert len({*zip(both[0].tolist(), both[1].tolist(), strict=True)}) == 150


def test_labels_may_begin_with_one_and_names_are_those_of_the_set(tmp_path: Path) -> None:
    counts = (10,) * 26
    letters = make(tmp_path / "e", counts, "emnist-letters-", "test", first_label=1)
    assert load(letters).class_names == tuple("abcdefghijklmnopqrstuvwxyz")
    kmnist = make(tmp_path / "KMNIST" / "raw", (10,) * 10)
    assert load(kmnist).class_names == tuple(datasets.KMNIST.classes)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte").unlink(), "has no file t10k-labels-idx1-ubyte"),
        (lambda f: cut(f / "train-images-idx3-ubyte"), "is damaged: it holds 1499 bytes, and says"),
        (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(b""), "is no IDX file of bytes"),
        (
            lambda f: (f / "train-labels-idx1-ubyte").replace(f / "train-images-idx3-ubyte"),
            "is no IDX file of bytes in 3 dimensions",
        ),
        (
            lambda f: write(f / "train-labels-idx1-ubyte", np.zeros(49)),
            "has 50 images and 49 labels of train",
        ),
        (
            lambda f: write(f / "t10k-labels-idx1-ubyte", np.full(25, 2)),
            "has test images of a class without training images",
        ),
        (
            lambda f: write(f / "t10k-images-idx3-ubyte", np.zeros((25, 7, 5))),
            "have two sizes: 6x5 for training and 7x5 for test",
        ),
        (lambda f: make(f, (30, 4)), "has a class of fewer than 5 training images"),
        (lambda f: make(f, (30,)), "has images of one class only"),
        (lambda f: make(f, prefix="emnist-mnist-", test="test"), "holds 2 datasets"),
        (lambda f: pack(f / "train-images-idx3-ubyte", 100), "cannot be read: Compressed file"),
        (lambda f: pack(f / "train-images-idx3-ubyte", None), "cannot be read: (CRC|Error|inv)"),
        (
            lambda f: write(f / "t10k-images-idx3-ubyte", np.zeros((0, 6, 5))),
            "has 0 images and 25 labels of t10k",
        ),
    ],
)
def test_files_that_are_not_whole_are_told_in_a_sentence(
    spoil: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "a")
    spoil(folder)
    with pytest.raises(DatasetError, match=told) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def pack(file: Path, length: int | None) -> None:
    """Packs a file, and cuts it off, or turns a byte in its midst."""
    packed = bytearray(gzip.compress(file.read_bytes()))
    packed[len(packed) // 2] ^= 0xFF if length is None else 0
    file.with_name(f"{file.name}.gz").write_bytes(packed[:length])
    file.unlink()


def test_without_fashion_mnist_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nflab.data import _load, idx

    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(idx, "checkout", lambda: tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with pytest.raises(DatasetError, match=r"apt-get install dataset-fashion-mnist, or torchvis"):
        _load.__wrapped__("fashion-mnist", nfnet.preprocessing("dm_nf_resnet_small"), False)
    make(tmp_path / "data" / "FashionMNIST" / "raw")
    found = _load.__wrapped__("fashion-mnist", nfnet.preprocessing("dm_nf_resnet_small"), False)
    assert found.sizes["train"] == 42


def test_the_word_is_no_path() -> None:
    assert locations.absolute("fashion-mnist") == "fashion-mnist"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_what_torchvision_reads(tmp_path: Path) -> None:
    config = RECIPES["fashion_mnist"].config
    dataset = load_dataset(config)
    assert dataset.class_names == tuple(datasets.FashionMNIST.classes)
    assert dataset.sizes == {"train": 50_000, "val": 10_000, "test": 10_000}
    assert dataset.fingerprint == "ad5460d2fb6da7fe"  # what results were recorded with
    for split, count in (("train", 5000), ("val", 1000), ("test", 1000)):
        _, labels = dataset.eval_images(split, torch.arange(dataset.sizes[split]))
        assert torch.bincount(labels).tolist() == [count] * 10
    unpacked = tmp_path / "t10k-images-idx3-ubyte"
    unpacked.write_bytes(gzip.decompress((DEBIAN / f"{unpacked.name}.gz").read_bytes()))
    theirs = datasets.mnist.read_image_file(str(unpacked))
    ours, _ = dataset.eval_images("test", torch.arange(10_000))
    assert torch.equal(ours[:, 0], theirs)
    model = build_model(config, dataset, new_head=True)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert model.variant.stem == "3x3_stride2"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_clothes_are_mirrored_and_other_sets_are_not(tmp_path: Path) -> None:
    keys = nfnet.hash_keys(1, torch.arange(400))
    for dataset, mirrored in ((load(DEBIAN), True), (load(make(tmp_path / "a")), False)):
        original, _ = dataset.eval_images("train", torch.tensor([3]))
        crops, _ = dataset.train_images(torch.full((400,), 3), keys)
        found = [same_but_for_a_shift(crop[0], original[0, 0]) for crop in crops[:40]]
        flipped = [same_but_for_a_shift(crop[0].flip(1), original[0, 0]) for crop in crops[:40]]
        assert all(a or b for a, b in zip(found, flipped, strict=True))
        assert all(found) != mirrored


def same_but_for_a_shift(crop: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether a crop is the original shifted by 2 pixels at most, each way."""
    padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
    height, width = original.shape
    places = [(y, x) for y in range(5) for x in range(5)]
    return any(torch.equal(padded[y : y + height, x : x + width], crop) for y, x in places)
