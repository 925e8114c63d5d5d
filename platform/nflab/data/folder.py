"""A folder of images in ImageNet's layout, on a local or a shared disk."""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import nfnet
from nflab.data.contents import digests
from nflab.data.crop import random_crop as random_crop
from nflab.data.crop import random_crops
from nflab.data.dataset import DatasetError, Split, UnreadableImage, contents, fingerprint
from nflab.data.layout import Files, scan

MAX_HELD_OUT = 10_000
"""Images of ImageNet's training set that the authors set aside to choose settings on."""

CHECKED = 20_000
"""Files that are looked at before anything starts, spread over all of them."""

CHECKED_AT_ONCE = 16
"""They wait for the disk."""

AT_ONCE = 32
"""Decoded images that are held at the same time."""


class ImageFolder:
    """Implements `Dataset` over `root/train/CLASS/...`, `root/val/CLASS/...` and, if it is there,
    `root/test/CLASS/...` (see `layout.scan`); without `train` there is nothing to train on.

    Without `test`, `val` is the test split, as ImageNet's is in papers, and the validation split is
    taken from `train`: a tenth of it, spread over all classes, but 10000 images at most.

    Args:
        root: the folder.
        sizes: pixels of training and evaluation, and the evaluation's crop.
        skips: whether images that cannot be read are told instead of refused.

    Raises:
        DatasetError: the layout is another, a class has no images, or a file is no image.
    """

    in_memory = False

    def __init__(self, root: Path, sizes: nfnet.Preprocessing, skips: bool = False) -> None:
        self._root, self.preprocessing = root, sizes
        layout = scan(root)
        self.class_names, self.left_out = layout.class_names, layout.left_out
        found = {"train": [], **layout.files}
        if "test" in found:
            splits: dict[Split, Files] = {
                "train": found["train"],
                "val": found["val"],
                "test": found["test"],
            }
        else:
            train, held_out = _hold_out(found["train"])
            splits = {"train": train, "val": held_out, "test": found["val"]}
        self._files = {split: [path for path, _ in files] for split, files in splits.items()}
        self._labels = {
            split: torch.tensor([label for _, label in files]) for split, files in splits.items()
        }
        self.sizes: Mapping[Split, int] = {split: len(files) for split, files in splits.items()}
        self.image_shape = (3, sizes.train_size, sizes.train_size)
        self.mean = torch.tensor(nfnet.IMAGENET_MEAN)
        self.std = torch.tensor(nfnet.IMAGENET_STD)
        # As they lie on the disk: which of them are held out follows from that.
        paths = [path for files in found.values() for path, _ in files]
        damaged = _damaged(paths)
        if damaged:
            told = f"{', '.join(damaged[:3])}{', ...' if len(damaged) > 3 else ''}"
            if not skips:
                raise DatasetError(
                    f"{len(damaged)} files cannot be read as images: {told}; remove or replace "
                    "them, or go on without them with --bad-images skip"
                )
            told = f"{len(damaged)} files that cannot be read as images ({told})"
            self.left_out = ", ".join(filter(None, (self.left_out, told)))
        try:
            found_digests = digests(root, paths)
        except OSError as error:
            raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from None
        self.contents: Mapping[str, str] = contents(
            {name: [label for _, label in files] for name, files in found.items()},
            self.class_names,
            found_digests,
        )
        self.fingerprint = fingerprint(self.contents)

    @cached_property
    def earlier_fingerprint(self) -> str | None:
        """Of names and sizes alone."""
        digest = hashlib.sha256()
        for split, paths in self._files.items():
            for path in paths:
                size = path.stat().st_size
                digest.update(f"{split} {path.relative_to(self._root)} {size}\n".encode())
        return digest.hexdigest()[:16]

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """Random resized crops (bicubic), half of them mirrored."""
        side = (self.preprocessing.train_size,) * 2
        pixels = []
        for some_N, of_some_N in zip(indices_N.split(AT_ONCE), keys_N.split(AT_ONCE), strict=True):
            images = [self._read("train", index) for index in some_N.tolist()]
            boxes_N4 = random_crops(torch.tensor([image.size for image in images]), of_some_N)
            pixels += [
                nfnet.to_pixels(image.resize(side, Image.Resampling.BICUBIC, box=tuple(box)))
                for image, box in zip(images, boxes_N4.tolist(), strict=True)
            ]
        cropped_NCHW = torch.stack(pixels)
        flip_N111 = (nfnet.uniform(nfnet.hash_keys(keys_N, -1)) < 0.5).view(-1, 1, 1, 1)
        return (
            torch.where(flip_N111, cropped_NCHW.flip(3), cropped_NCHW),
            self._labels["train"][indices_N],
        )

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own evaluation crop."""
        images = [
            nfnet.to_pixels(self.preprocessing.crop_image(self._read(split, index)))
            for index in indices_N.tolist()
        ]
        return torch.stack(images), self._labels[split][indices_N]

    def _read(self, split: Split, index: int) -> Image.Image:
        path = self._files[split][index]
        try:
            return nfnet.read_image(path)
        except ValueError as error:
            raise UnreadableImage(f"cannot read the image {path}: {error}", index) from None


def _damaged(paths: list[Path]) -> list[str]:
    """What is wrong with files that are no images, as far as their ends tell: each would end a run
    hours later."""
    if not paths:
        return []

    def wrong(path: Path) -> str | None:
        try:
            nfnet.check_image(path)
        except ValueError as error:
            return f"{path} ({error})"
        return None

    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        found = pool.map(wrong, paths[:: math.ceil(len(paths) / CHECKED)])
        return [one for one in found if one is not None]


def _hold_out(files: Files) -> tuple[Files, Files]:
    """What stays for training, and an even sample of the rest."""
    count = min(MAX_HELD_OUT, max(1, len(files) // 10), len(files))
    chosen = {i * len(files) // count for i in range(count)}
    held_out = [file for i, file in enumerate(files) if i in chosen]
    return [file for i, file in enumerate(files) if i not in chosen], held_out
