"""The one interface of every dataset."""

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

import nfnet

Split = Literal["train", "val", "test"]


class DatasetError(ValueError):
    """A dataset that cannot be used; the message is one sentence for the user."""


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
    fingerprint: str
    """Changes whenever an image, a label or a split does."""
    in_memory: bool
    """Whether images are at hand, without reading files."""

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """Randomly cropped training images, uint8 (N, C, H, W), and labels (N,).

        The crop of an image is a function of its key alone.
        """
        ...

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """Images of a split as they are evaluated, uint8 (N, C, H, W), and labels (N,)."""
        ...
