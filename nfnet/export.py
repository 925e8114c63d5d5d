"""Models for other runtimes: ONNX and torch.export, checked against the original."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nfnet.model import ResNet

_TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit."""


def export_torch(model: ResNet, path: Path, image_size: int | tuple[int, int]) -> None:
    """Write a model as a `torch.export` program, for any number of images of one size.

    Args:
        model: a model from `create_model`; it is exported in evaluation mode.
        path: the file, whose name should end in .pt2; `torch.export.load(path).module()` runs it.
        image_size: pixels along each side, or (height, width).

    Raises:
        ValueError: the image is smaller than the network's stride.
        RuntimeError: the program's logits differ from the model's.
    """
    images = _images(model, image_size)
    with _Evaluating(model):
        torch.export.save(_program(model, images), path)
        _compare(model, images, torch.export.load(path).module()(images))


def export_onnx(model: ResNet, path: Path, image_size: int | tuple[int, int]) -> None:
    """Write a model as an ONNX file with input `images` (N, C, H, W) and output `logits` (N, K).

    Args:
        model, image_size: as in `export_torch`.
        path: the file, whose name should end in .onnx.

    Raises:
        ValueError: the image is smaller than the network's stride, or a package is missing.
        RuntimeError: ONNX Runtime's logits differ from the model's.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ONNX files need the package {error.name}; install `pip install 'nflab[onnx]'`."
        ) from None
    images = _images(model, image_size)
    with _Evaluating(model):
        torch.onnx.export(
            _program(model, images),
            f=path,
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        _compare(model, images, torch.from_numpy(np.asarray(logits)))


class _Evaluating:
    """Puts a model in evaluation mode on the CPU for a while."""

    def __init__(self, model: ResNet) -> None:
        self._model = model
        self._training = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        for module in self._training:  # not those that were frozen
            module.training = True


def _images(model: ResNet, image_size: int | tuple[int, int]) -> Tensor:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = (2, model.variant.in_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _program(model: ResNet, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))


def _compare(model: ResNet, images: Tensor, logits: Tensor) -> None:
    with torch.no_grad():
        expected = model(images)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"the exported model's logits differ from the original's by {difference:.1e} of the "
            f"largest, more than {_TOLERANCE:g}; do not use the file."
        )
