"""A trained network that answers images: what a checkpoint's folder holds, put to use."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nfnet
from nflab.settings.locations import WEIGHTS

DESCRIPTION = "model.json"
"""File beside the weights that says what it takes to use them."""


def write_description(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    class_names: Sequence[str],
    preprocessing: nfnet.Preprocessing,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Writes beside the weights what it takes to use them.

    Args:
        name, settings: of `nfnet.create_model`.
        class_names: in the order of the logits.
        preprocessing: how an image is resized and cropped.
        mean, std: statistics of the pixels (C,), of values scaled to 0..1.
    """
    description = {
        "name": name,
        "settings": settings,
        "class_names": list(class_names),
        "preprocessing": asdict(preprocessing),
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


class ImageClassifier:
    """A network with its weights, its preprocessing and its classes.

    Args:
        folder: of a checkpoint, with `weights.pt` and `model.json`.

    Attributes:
        model: the network, in evaluation mode.
        class_names: in the order of the logits.
        image_shape: (channels, height, width) that the network evaluates.
    """

    def __init__(self, folder: Path) -> None:
        text = (folder / DESCRIPTION).read_text(encoding="utf-8")
        description: dict[str, Any] = json.loads(text)
        self.class_names: list[str] = description["class_names"]
        self._preprocessing = nfnet.Preprocessing(**description["preprocessing"])
        self._mean, self._std = description["mean"], description["std"]
        side = self._preprocessing.test_size
        self.image_shape = (len(self._mean), side, side)
        self.model = nfnet.create_model(
            description["name"],
            pretrained=str(folder / WEIGHTS),
            **description["settings"],
        ).eval()
        if self.model.adapted:
            raise ValueError(
                f"the weights in {folder} are not what {DESCRIPTION} says: it needs "
                f"{' and '.join(self.model.adapted)}"
            )

    @torch.no_grad()
    def probabilities(self, images: Sequence[bytes]) -> Tensor:
        """Probability of each class (N, K) for images as the bytes of their files.

        Raises:
            ValueError: something is no image.
        """
        x_NCHW = torch.stack([self._read(image) for image in images])
        probabilities: Tensor = self.model(x_NCHW).softmax(dim=1)
        return probabilities

    def _read(self, data: bytes) -> Tensor:
        try:
            image = nfnet.read_image(io.BytesIO(data), channels=len(self._mean))
        except ValueError as error:
            raise ValueError(
                f"an input is no image ({error}); send the bytes of a file such as JPEG or PNG."
            ) from None
        pixels_CHW = nfnet.to_pixels(self._preprocessing.crop_image(image)).float() / 255
        mean, std = (torch.tensor(s).view(-1, 1, 1) for s in (self._mean, self._std))
        return (pixels_CHW - mean) / std
