"""Datasets of encoded images that are read one by one: what folders and stores have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import nfnet
from nflab.data.crop import random_crops
from nflab.data.dataset import Split, UnreadableImage

MAX_HELD_OUT = 10_000
"""Images of ImageNet's training set that the authors set aside to choose settings on."""

AT_ONCE = 32
"""Decoded images that are held at the same time."""


class EncodedImages(ABC):
    """Implements `Dataset` over images that are stored as `train`, `val` and maybe `test`.

    Without `test`, `val` is the test split, as ImageNet's is in papers, and the validation split is
    taken from `train`: a tenth of it, spread over all classes, but 10000 images at most.

    Args:
        labels: of each image of each stored part, in their order, int64 (N,).
        class_names: in the order of the labels.
        sizes: pixels of training and evaluation, and the evaluation's crop.
    """

    in_memory = False

    def __init__(
        self,
        labels: Mapping[str, Tensor],
        class_names: tuple[str, ...],
        sizes: nfnet.Preprocessing,
    ) -> None:
        self.class_names, self.preprocessing = class_names, sizes
        train = torch.arange(len(labels.get("train", ())))
        parts: dict[Split, tuple[str, Tensor]] = {
            "train": ("train", train),
            "val": ("val", torch.arange(len(labels["val"]))),
        }
        if "test" in labels:
            parts["test"] = ("test", torch.arange(len(labels["test"])))
        else:
            held_out = _held_out(len(train))
            parts["test"] = parts["val"]
            parts["train"], parts["val"] = ("train", train[~held_out]), ("train", train[held_out])
        self._places = parts
        none = torch.zeros(0, dtype=torch.long)
        self._labels = {
            split: labels.get(part, none)[places_N] for split, (part, places_N) in parts.items()
        }
        self.sizes: Mapping[Split, int] = {split: len(y) for split, y in self._labels.items()}
        self.train_labels = self._labels["train"]
        self.image_shape = (3, sizes.train_size, sizes.train_size)
        self.mean = torch.tensor(nfnet.IMAGENET_MEAN)
        self.std = torch.tensor(nfnet.IMAGENET_STD)

    @abstractmethod
    def _file(self, part: str, place: int) -> Path | BytesIO:
        """An image of a stored part, as `nfnet.read_image` takes it."""

    @abstractmethod
    def _name(self, part: str, place: int) -> str:
        """What a person finds it by."""

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """Random resized crops (bicubic), half of them mirrored."""
        side = (self.preprocessing.train_size,) * 2
        pixels: list[Tensor] = []
        for some_N, of_some_N in zip(indices_N.split(AT_ONCE), keys_N.split(AT_ONCE), strict=True):
            images = [self._read("train", index) for index in some_N.tolist()]
            boxes_N4 = random_crops(torch.tensor([image.size for image in images]), of_some_N)
            pixels += [
                nfnet.to_pixels(image.resize(side, Image.Resampling.BICUBIC, box=tuple(box)))
                for image, box in zip(images, boxes_N4.tolist(), strict=True)
            ]
        mirrored = (nfnet.uniform(nfnet.hash_keys(keys_N, -1)) < 0.5).tolist()
        images_NCHW = torch.stack(
            [one.flip(2) if flips else one for one, flips in zip(pixels, mirrored, strict=True)]
        )
        return images_NCHW, self._labels["train"][indices_N]

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own evaluation crop."""
        images = [
            nfnet.to_pixels(self.preprocessing.crop_image(self._read(split, index)))
            for index in indices_N.tolist()
        ]
        return torch.stack(images), self._labels[split][indices_N]

    def _read(self, split: Split, index: int) -> Image.Image:
        part, places_N = self._places[split]
        place = int(places_N[index])
        try:
            return nfnet.read_image(self._file(part, place))
        except ValueError as error:
            name = self._name(part, place)
            raise UnreadableImage(f"cannot read the image {name}: {error}", index) from None


def _held_out(size: int) -> Tensor:
    """Which of the training images are for validation: an even sample, bool (size,)."""
    count = min(MAX_HELD_OUT, max(1, size // 10), size)
    chosen_N = torch.zeros(size, dtype=torch.bool)
    chosen_N[torch.arange(count) * size // max(count, 1)] = True
    return chosen_N
