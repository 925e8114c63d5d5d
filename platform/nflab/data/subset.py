"""A part of a dataset's training split, for searches that cannot pay for all of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nflab.data.dataset import Dataset, DatasetError, Split, UnreadableImage
from nflab.settings.streams import Stream, keys


class Subset:
    """Implements `Dataset` over a part of another's training images; the other splits, the class
    names and how pixels are standardised are the other's.

    Of each class it has the same share, and one image at least. Which they are depends on the share
    and on the places in the split alone: all seeds have the same, and a smaller part lies within a
    larger one.

    Args:
        whole: the dataset; it tells the labels of its training images as `train_labels`.
        share: of each class, in (0, 1].

    Raises:
        DatasetError: it does not tell them.
    """

    def __init__(self, whole: Dataset, share: float) -> None:
        labels_N = getattr(whole, "train_labels", None)
        if labels_N is None or len(labels_N) != whole.sizes["train"]:
            raise DatasetError(
                "a subset needs the label of each training image, which this dataset does not "
                "tell: give it an attribute train_labels, a tensor of all of them, or leave "
                "--subset out"
            )
        self.whole = whole
        self._places_N = chosen(torch.as_tensor(labels_N).long(), share)
        self.train_labels = torch.as_tensor(labels_N)[self._places_N]
        self.class_names, self.image_shape = whole.class_names, whole.image_shape
        self.preprocessing, self.in_memory = whole.preprocessing, whole.in_memory
        self.mean, self.std = whole.mean, whole.std
        self.contents, self.fingerprint = whole.contents, whole.fingerprint
        self.left_out = whole.left_out
        self.sizes: Mapping[Split, int] = {**whole.sizes, "train": len(self._places_N)}

    @property
    def earlier_fingerprint(self) -> str | None:
        """Of the whole, which a checkpoint names beside the share."""
        return self.whole.earlier_fingerprint

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """See `Dataset`; `indices_N` are places in the part."""
        try:
            return self.whole.train_images(self._places_N[indices_N], keys_N)
        except UnreadableImage as damaged:
            raise self._in_part(damaged) from None

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """See `Dataset`; of `train`, `indices_N` are places in the part."""
        if split != "train":
            return self.whole.eval_images(split, indices_N)
        try:
            return self.whole.eval_images(split, self._places_N[indices_N])
        except UnreadableImage as damaged:
            raise self._in_part(damaged) from None

    def _in_part(self, damaged: UnreadableImage) -> UnreadableImage:
        """The same of an image by its place in the part, where the reader looks for it."""
        place = int(torch.searchsorted(self._places_N, damaged.index))
        return UnreadableImage(str(damaged), place)


def chosen(labels_N: Tensor, share: float) -> Tensor:
    """The places of a keyed part of a split, in their order.

    Args:
        labels_N: of each image of the split.
        share: of each class, rounded to whole images, and one at least.
    """
    # By a key of its own, not by the seed: seeds and settings are compared on the same images.
    drawn_N = keys(0, Stream.SUBSET, torch.arange(len(labels_N))).argsort()
    nth_N, counts = torch.empty_like(labels_N), labels_N.bincount()
    # All of one class after all of another, each in the drawn order.
    by_class_N = drawn_N[labels_N[drawn_N].argsort(stable=True)]
    begins = counts.cumsum(0) - counts
    nth_N[by_class_N] = torch.arange(len(labels_N)) - begins[labels_N[by_class_N]]
    taken = (counts.double() * share + 0.5).floor().clamp(min=1)
    return (nth_N < taken[labels_N]).nonzero()[:, 0]
