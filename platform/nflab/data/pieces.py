"""What a store of images is made from, piece by piece."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from nflab.data.arrays import ArrayDataset
from nflab.data.dataset import DatasetError
from nflab.storage.files import is_away

_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Word in a file's name -> the part that it is of."""


class Encoded(NamedTuple):
    """An image as it is stored."""

    key: str
    """Unlike any other of its part; in a class images are ordered by it."""
    label: int
    image: bytes


@dataclass(frozen=True)
class Piece:
    """What one task reads."""

    part: str
    """`train`, `val` or `test`."""
    number: int
    """Counted over all parts."""
    holds: tuple[Any, ...]
    """Where it is in the source."""


class Source(ABC):
    """Encoded images with labels, in pieces."""

    class_names: tuple[str, ...] | None = None
    """In the order of the labels; None if the labels are all that is known."""
    left_out = ""
    """What is beside the images, in words."""
    array: ArrayDataset | None = None
    """The dataset, if it is one of small images that fit in memory."""

    @abstractmethod
    def pieces(self, size: int) -> list[Piece]:
        """All of it, in pieces of about `size` bytes."""

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[Encoded]:
        """The images of a piece, in their order.

        Raises:
            DatasetError: the source is damaged, or is not what it was.
        """


def part_of(name: str, address: str) -> str:
    """The part that a file is of, by the words in its name or in that of its folder."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        if word in _PARTS:
            return _PARTS[word]
    raise DatasetError(
        f"the name of {name} in {address} says neither train nor val nor test: rename it"
    )


def below(address: str, name: str) -> str:
    """The address of a file that was listed at or below another."""
    return address if address.rpartition("/")[2] == name else f"{address}/{name}"


def what_is_wrong(error: Exception, address: str) -> Exception:
    """What is wrong with a file that cannot be read; a store that is away damages nothing."""
    return error if is_away(error) else DatasetError(f"{address} is damaged: {error}")
