"""The one interface of every dataset."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

import nfnet

Split = Literal["train", "val", "test"]


class DatasetError(ValueError):
    """A dataset that cannot be used; the message is one sentence for the user."""


class UnreadableImage(DatasetError):
    """An image whose file is damaged or gone."""

    def __init__(self, message: str, index: int = -1) -> None:
        """`index`: of the image in its split; a process that reads ahead tells only the message."""
        super().__init__(message)
        self.index = index


class Dataset(Protocol):
    """Images with labels in three fixed splits; the search sees `train` and `val` only."""

    class_names: tuple[str, ...]
    """Name of each class, in the order of the labels."""
    image_shape: tuple[int, int, int]
    """(channels, height, width) of a training image as a network sees it."""
    preprocessing: nfnet.Preprocessing
    """How an image of any size becomes one that is evaluated."""
    sizes: Mapping[Split, int]
    """Images in each split."""
    mean: Tensor
    """Mean over the training images, per channel (C,), of pixels scaled to 0..1."""
    std: Tensor
    """Standard deviation likewise."""
    contents: Mapping[str, str]
    """Part of what is stored, such as train/CLASS -> how many images there are, and a digest of
    them in their order."""
    fingerprint: str
    """Changes whenever an image, a label or a split does."""
    left_out: str
    """What is stored beside it and no part of it, in words; empty if nothing is."""
    in_memory: bool
    """Whether images are at hand, without reading files."""

    @property
    def earlier_fingerprint(self) -> str | None:
        """What earlier versions of nflab called the fingerprint, where that was another."""
        ...

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """Randomly cropped training images, uint8 (N, C, H, W), and labels (N,).

        The crop of an image is a function of its key alone.

        Raises:
            UnreadableImage: one of them cannot be read.
        """
        ...

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """Images of a split as they are evaluated, uint8 (N, C, H, W), and labels (N,).

        Raises:
            UnreadableImage: one of them cannot be read.
        """
        ...


def contents(
    labels: Mapping[str, Sequence[int]], class_names: Sequence[str], digests: Iterable[bytes]
) -> dict[str, str]:
    """What `Dataset.contents` says.

    Args:
        labels: of each image of each part, such as a split.
        digests: of each image, of all parts in their order.
    """
    counts: dict[str, int] = {}
    parts: dict[str, Any] = {}
    each = iter(digests)
    for split, of_split in labels.items():
        for label in of_split:
            part = f"{split}/{class_names[label]}"
            counts[part] = counts.get(part, 0) + 1
            parts.setdefault(part, hashlib.sha256()).update(next(each))
    return {part: f"{counts[part]} images {of.hexdigest()[:16]}" for part, of in parts.items()}


def fingerprint(contents: Mapping[str, str]) -> str:
    """16 hex digits of all contents, in their order."""
    text = "\n".join(f"{part} {said}" for part, said in contents.items())
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def is_called(dataset: Dataset, fingerprint: str) -> bool:
    """Whether a fingerprint, of this version of nflab or an earlier one, is the dataset's."""
    # The earlier one takes a look at every file.
    return fingerprint == dataset.fingerprint or fingerprint == dataset.earlier_fingerprint


def changes(before: Mapping[str, str], now: Mapping[str, str], most: int = 3) -> str:
    """In words, where two contents differ: 'train/ant (12 images -> 11 images), ...'.

    Args:
        most: how many are named.
    """
    found = []
    for part in dict.fromkeys((*before, *now)):
        was, is_ = (of.get(part, "no images ").rpartition(" ") for of in (before, now))
        if was != is_:
            how = "other contents" if was[0] == is_[0] else f"{was[0]} -> {is_[0]}"
            found.append(f"{part} ({how})")
    more = f", and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
