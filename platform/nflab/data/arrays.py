"""Datasets that fit in memory: scikit-learn's digits, CIFAR-10 and CIFAR-100."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import nfnet
from nflab.data.dataset import DatasetError, Split, contents


class ArrayDataset:
    """Implements `Dataset` over uint8 images (N, C, H, W) and labels (N,) of each split.

    Args:
        splits: images and labels of each split.
        class_names: name of each class.
        shift: pixels by which a training image is shifted at most, each way; zeros come in.
        flip: whether half of the training images are mirrored.
    """

    in_memory = True
    left_out = ""
    earlier_fingerprint: str | None = None

    def __init__(
        self,
        splits: Mapping[Split, tuple[Tensor, Tensor]],
        class_names: Sequence[str],
        shift: int,
        flip: bool,
    ) -> None:
        self._splits, self.shift, self.flip = splits, shift, flip
        self.class_names = tuple(class_names)
        self.sizes: Mapping[Split, int] = {split: len(y) for split, (_, y) in splits.items()}
        images, self.train_labels = splits["train"]
        _, channels, height, width = images.shape
        self.image_shape = (channels, height, width)
        self.preprocessing = nfnet.Preprocessing(height, height, crop=1.0, squash=True)
        train = images.double() / 255
        self.mean, self.std = (s.float() for s in (train.mean((0, 2, 3)), train.std((0, 2, 3))))
        digest = hashlib.sha256()
        for split_images, split_labels in splits.values():
            digest.update(split_images.numpy().tobytes() + split_labels.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.contents: Mapping[str, str] = contents(
            {split: labels.tolist() for split, (_, labels) in splits.items()},
            self.class_names,
            (
                hashlib.sha256(image.tobytes()).digest()
                for images, _ in splits.values()
                for image in images.numpy()
            ),
        )

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """Images shifted, and mirrored where the dataset says so."""
        images, labels = self._splits["train"]
        _, height, width = self.image_shape
        padded = F.pad(images[indices_N], [self.shift] * 4)
        draws_3N = nfnet.uniform(nfnet.hash_keys(keys_N, torch.tensor([[0], [1], [2]])))
        row_N, column_N = ((2 * self.shift + 1) * draws_3N[:2]).long()
        rows_NHW = (row_N[:, None] + torch.arange(height))[:, :, None]
        columns_NW = column_N[:, None] + torch.arange(width)
        if self.flip:
            columns_NW = torch.where(draws_3N[2][:, None] < 0.5, columns_NW.flip(1), columns_NW)
        items_N = torch.arange(len(indices_N))[:, None, None]
        # Indexing puts the channels last.
        cropped = padded[items_N, :, rows_NHW, columns_NW[:, None, :]].permute(0, 3, 1, 2)
        return cropped.contiguous(), labels[indices_N]

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """The images as they are."""
        images, labels = self._splits[split]
        return images[indices_N], labels[indices_N]


def digits(first: int, last: int) -> ArrayDataset:
    """scikit-learn's 1797 real 8x8 grey images of handwritten digits, those from `first` to `last`.

    In order of occurrence, of every five images of a class the first is a test image, the second a
    validation image and the rest are for training. No flips: a mirrored 2 is no 2.
    """
    package = find_spec("sklearn")  # to import it takes longer than to train
    assert package is not None
    assert package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    table = table[(table[:, -1] >= first) & (table[:, -1] <= last)]
    labels = torch.from_numpy(table[:, -1]).long() - first
    # The file's grey levels are 0..16.
    grey = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8)
    images = (grey * (255 / 16)).round().to(torch.uint8)
    fold_N = nth_of_class(labels) % 5
    members: dict[Split, Tensor] = {"train": fold_N > 1, "val": fold_N == 1, "test": fold_N == 0}
    splits = {split: (images[m], labels[m]) for split, m in members.items()}
    return ArrayDataset(
        splits, [str(digit) for digit in range(first, last + 1)], shift=1, flip=False
    )


_CIFAR = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
"""torchvision's class for the folder in which it keeps a dataset's files."""


def is_cifar(folder: Path) -> bool:
    """Whether a folder holds the files of CIFAR-10 or CIFAR-100."""
    return any((folder / name).is_dir() for name in _CIFAR)


def cifar(folder: Path) -> ArrayDataset:
    """CIFAR-10 or CIFAR-100: 60000 real colour images of 32x32 pixels, as torchvision stores them.

    Of every ten training images of a class, in the order of the files, the first is a validation
    image. Training images are shifted by up to 4 pixels and mirrored (arXiv 1512.03385, 4.2).

    Raises:
        DatasetError: the files are not whole, or both datasets are there.
    """
    found = [name for name in _CIFAR if (folder / name).is_dir()]
    if len(found) > 1:
        raise DatasetError(f"{folder} holds both {' and '.join(found)}: keep them in two folders")
    from torchvision import datasets  # takes seconds, which the digits can save

    kind = getattr(datasets, _CIFAR[found[0]])
    try:
        train, test = (kind(str(folder), train=is_train) for is_train in (True, False))
    except (RuntimeError, OSError) as error:
        raise DatasetError(f"the files in {folder / found[0]} are not whole: {error}") from None

    def arrays(of: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(of.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(of.targets)

    images, labels = arrays(train)
    held_out = nth_of_class(labels) % 10 == 0
    splits: dict[Split, tuple[Tensor, Tensor]] = {
        "train": (images[~held_out], labels[~held_out]),
        "val": (images[held_out], labels[held_out]),
        "test": arrays(test),
    }
    return ArrayDataset(splits, train.classes, shift=4, flip=True)


def nth_of_class(labels_N: Tensor) -> Tensor:
    """How many images of its class come before each image."""
    nth_N = torch.zeros_like(labels_N)
    for label in labels_N.unique():
        of_class = labels_N == label
        nth_N[of_class] = torch.arange(int(of_class.sum()))
    return nth_N
