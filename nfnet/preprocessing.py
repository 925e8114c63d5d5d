"""How images become a network's input: sizes, crops and pixel statistics of each model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nfnet.images import convert_image
from nfnet.zoo import find_variant

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of each channel of ImageNet's training pixels, as shares of the brightest."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""


@dataclass(frozen=True)
class Preprocessing:
    """Sizes in pixels, and the crop of an evaluation."""

    train_size: int
    """Pixels along each side of a training image."""
    test_size: int
    """Pixels along each side of an image that is evaluated."""
    crop: float
    """Pixels of the evaluated crop over those of the resized image, in (0, 1]."""
    squash: bool
    """Resize to a square whatever the image's shape; else its shorter side is resized."""

    def crop_image(self, image: Image.Image) -> Image.Image:
        """An image resized (bicubic) and cropped in its centre for evaluation."""
        # timm rounds down; a crop that is a ratio of whole pixels loses nothing to its rounding.
        side = math.floor(self.test_size / self.crop + 1e-6)
        width, height = image.size
        shorter = min(width, height)
        size = (side, side) if self.squash else (side * width // shorter, side * height // shorter)
        resized = image.resize(size, Image.Resampling.BICUBIC)
        # A half is rounded to the even number, as by torchvision.
        left, top = (round((length - self.test_size) / 2) for length in size)
        return resized.crop((left, top, left + self.test_size, top + self.test_size))


# arXiv 2102.06171, table 1: pixels of training and of evaluation.
_F_SIZES = (
    (192, 256),
    (224, 320),
    (256, 352),
    (320, 416),
    (384, 512),
    (416, 544),
    (448, 576),
    (480, 608),
)
_MARGIN = 32
"""Pixels that the authors resize beyond the test size."""

# timm's own models: pixels of training and of evaluation, and the evaluation's crop.
_TIMM: dict[str, tuple[int, int, float]] = {
    "nfnet_l0": (224, 288, 1.0),
    "eca_nfnet_l0": (224, 288, 1.0),
    "eca_nfnet_l1": (256, 320, 1.0),
    "eca_nfnet_l2": (320, 384, 1.0),
    "eca_nfnet_l3": (352, 448, 1.0),
    "nf_regnet_b0": (192, 256, 0.9),
    "nf_regnet_b1": (256, 288, 0.9),
    "nf_regnet_b2": (240, 272, 0.9),
    "nf_regnet_b3": (288, 320, 0.9),
    "nf_regnet_b4": (320, 384, 0.9),
    "nf_regnet_b5": (384, 456, 0.9),
    "nf_resnet50": (256, 288, 0.94),
}


def preprocessing(name: str) -> Preprocessing:
    """Sizes and evaluation crop that a model was made for.

    Args:
        name: one of `list_models()`.

    Raises:
        ValueError: there is no model of this name.

    Source: arXiv 2102.06171, table 1 and the authors' code (`dm_` models and their twins); timm's
    `default_cfgs` (its own).
    """
    find_variant(name, {})
    family, _, size = name.partition("nfnet_f")
    if size:
        train, test = _F_SIZES[int(size[0])]
        if family == "dm_":
            return Preprocessing(train, test, test / (test + _MARGIN), squash=True)
        return Preprocessing(train, test, 0.9, squash=False)
    if name in _TIMM:
        return Preprocessing(*_TIMM[name], squash=False)
    if name.endswith("_digits"):
        return Preprocessing(8, 8, 1.0, squash=True)
    if name.endswith("_small"):
        return Preprocessing(28, 28, 1.0, squash=True)
    if name.startswith(("dm_nf_resnet", "preact_resnet")):
        return Preprocessing(224, 224, 224 / (224 + _MARGIN), squash=False)
    return Preprocessing(224, 224, 0.9, squash=False)


def eval_transform(name: str) -> Callable[[Image.Image], Tensor]:
    """A function from a PIL image to the tensor (3, H, W) that an ImageNet model evaluates.

    The image may be of any kind that `nfnet.images` reads.

    Args:
        name: one of `list_models()`.

    Raises:
        ValueError: there is no model of this name.
    """
    sizes = preprocessing(name)
    mean, std = (torch.tensor(s).view(-1, 1, 1) for s in (IMAGENET_MEAN, IMAGENET_STD))

    def transform(image: Image.Image) -> Tensor:
        return (to_pixels(sizes.crop_image(convert_image(image))).float() / 255 - mean) / std

    return transform


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 (C, H, W)."""
    pixels_HWC = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
    return pixels_HWC.permute(2, 0, 1)
