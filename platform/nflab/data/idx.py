"""Datasets in MNIST's IDX files: MNIST, Fashion-MNIST, KMNIST and EMNIST come so."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch

from nflab.data.arrays import ArrayDataset, nth_of_class
from nflab.data.dataset import DatasetError, Split
from nflab.settings.locations import checkout

FASHION_MNIST = "fashion-mnist"
"""Name of the dataset that is looked for where Debian and torchvision put it."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""

_VALIDATION = 10_000
"""Training images that are kept for validation, at most."""

_SHIFT = 2
"""Pixels; half of CIFAR's 4, for objects that fill 20 of 28 pixels."""

_FASHION_LABELS = "657fbd221bfc9f41"
"""SHA-256 of Fashion-MNIST's training labels: its first 16 hex digits."""

_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_FILE = re.compile(
    r"(?P<set>(emnist-\w+-)?)(train|t10k|test)-(images-idx3|labels-idx1)-ubyte(.gz)?"
)

Array = np.ndarray


def is_idx(folder: Path) -> bool:
    """Whether a folder holds IDX files by the names that MNIST's have."""
    return any(_FILE.fullmatch(file.name) for file in folder.iterdir())


def fashion_mnist() -> ArrayDataset:
    """Fashion-MNIST (arXiv 1708.07747): 70,000 real grey images of 28x28 pixels, in ten classes.

    Raises:
        DatasetError: it is not on this machine, or its files are not whole.
    """
    places = (
        DEBIAN,
        *(root / "data/FashionMNIST/raw" for root in (checkout(), Path.home())),
    )
    for place in places:
        if place.is_dir() and is_idx(place):
            return load_idx(place)
    raise DatasetError(
        f"Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist, or "
        f"torchvision.datasets.FashionMNIST({str(places[1].parents[1])!r}, download=True), "
        "or give the folder of its files"
    )


def load_idx(folder: Path) -> ArrayDataset:
    """A dataset in IDX files, packed or not: train-images-idx3-ubyte[.gz] and so on.

    Of the training images, 10,000 are for validation, or a fifth of a small set's: as many of each
    class, evenly over its images in the order of the file. Training images are shifted by up to 2
    pixels; those of Fashion-MNIST, which it knows by its labels, are mirrored too: a mirrored shoe
    is a shoe, a mirrored 2 is no 2.

    Raises:
        DatasetError: a file is missing, damaged or does not fit the others; or a class has too few
            images.
    """
    names = {match["set"] for f in folder.iterdir() if (match := _FILE.fullmatch(f.name))}
    if len(names) > 1:
        raise DatasetError(
            f"{folder} holds {len(names)} datasets: keep each in a folder of its own"
        )
    (name,) = names
    test = "test" if name else "t10k"
    train_images, train_labels = _pair(folder, f"{name}train")
    test_images, test_labels = _pair(folder, f"{name}{test}")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DatasetError(
            f"the images in {folder} have two sizes: {_size(train_images)} for training and "
            f"{_size(test_images)} for test"
        )
    # EMNIST's letters begin with 1.
    found = np.unique(train_labels)
    if not np.isin(test_labels, found).all():
        raise DatasetError(f"{folder} has test images of a class without training images")
    if len(found) < 2:
        raise DatasetError(f"{folder} has images of one class only")
    is_fashion = hashlib.sha256(train_labels.tobytes()).hexdigest()[:16] == _FASHION_LABELS
    held_out = _held_out(np.searchsorted(found, train_labels), folder)
    arrays: dict[Split, tuple[Array, Array]] = {
        "train": (train_images[~held_out], train_labels[~held_out]),
        "val": (train_images[held_out], train_labels[held_out]),
        "test": (test_images, test_labels),
    }
    splits = {
        split: (
            torch.from_numpy(images).unsqueeze(1),
            torch.from_numpy(np.searchsorted(found, labels)),
        )
        for split, (images, labels) in arrays.items()
    }
    known = _class_names(folder, name, is_fashion)
    class_names = [known[label] if label < len(known) else str(label) for label in found]
    return ArrayDataset(splits, class_names, shift=_SHIFT, flip=is_fashion)


def _pair(folder: Path, part: str) -> tuple[Array, Array]:
    """Images (N, H, W) and labels (N,) of a part."""
    images = _read(folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise DatasetError(f"{folder} has {len(images)} images and {len(labels)} labels of {part}")
    if not images.size:
        raise DatasetError(f"{folder} has no images of {part}")
    return images, labels


def _read(folder: Path, name: str, dimensions: int) -> Array:
    """The bytes that an IDX file holds, in its shape; of two files the one that is not packed.

    Source: http://yann.lecun.com/exdb/mnist/, "the IDX file format".
    """
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.exists()), None)
    if file is None:
        raise DatasetError(f"{folder} has no file {name} or {name}.gz")
    try:
        packed = file.read_bytes()
        data = gzip.decompress(packed) if file.suffix == ".gz" else packed
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from None
    # Two zeros, the type (8: unsigned bytes), how many dimensions; then each of them.
    head = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < head:
        raise DatasetError(f"{file} is no IDX file of bytes in {dimensions} dimensions")
    shape = [int(n) for n in np.frombuffer(data, ">u4", dimensions, offset=4)]
    if len(data) != head + prod(shape):
        raise DatasetError(
            f"{file} is damaged: it holds {len(data) - head} bytes, and says {prod(shape)}"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()


def _held_out(labels_N: Array, folder: Path) -> Array:
    """Which of the training images are for validation."""
    counts = np.bincount(labels_N)
    each = min(_VALIDATION // len(counts), counts.min() // 5)
    if not each:
        raise DatasetError(f"{folder} has a class of fewer than 5 training images")
    nth_N, of_N = nth_of_class(torch.from_numpy(labels_N)).numpy(), counts[labels_N]
    return (nth_N + 1) * each // of_N > nth_N * each // of_N


def _size(images_NHW: Array) -> str:
    return "x".join(str(side) for side in images_NHW.shape[1:])


def _class_names(folder: Path, name: str, is_fashion: bool) -> Sequence[str]:
    """The name of each label, of the well-known sets; else none."""
    if is_fashion:
        return _CLOTHES
    of_kmnist = "kmnist" in (part.lower() for part in folder.parts)
    if not name and not of_kmnist:
        return ()
    from torchvision import datasets  # takes seconds

    names: Sequence[str] = datasets.KMNIST.classes
    if name:
        names = datasets.EMNIST.classes_split_dict.get(name.split("-")[1], ())
    return names
