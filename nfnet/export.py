"""Models for other runtimes: ONNX and torch.export, checked against the original.

The standardisation of the kernels is folded into plain ones: it need not be done for each batch.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nfnet.layers import ScaledStdConv2d
from nfnet.model import ResNet

_TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit."""


def export_torch(model: ResNet, path: Path, image_size: int | tuple[int, int]) -> None:
    """Write a model as a `torch.export` program, for any number of images of one size.

    Args:
        model: a model from `create_model`; exported as it evaluates, and left as it is.
        path: the file, whose name should end in .pt2; `torch.export.load(path).module()` runs it.
        image_size: pixels along each side, or (height, width).

    Raises:
        ValueError: the image is smaller than the network's stride.
        RuntimeError: the program's logits differ from the model's.
    """
    program, images, expected = _program(model, image_size)
    torch.export.save(program, path)
    _compare(torch.export.load(path).module()(images), expected)


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
    program, images, expected = _program(model, image_size)
    torch.onnx.export(
        program,
        f=path,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    _compare(torch.from_numpy(np.asarray(logits)), expected)


def _program(
    model: ResNet, image_size: int | tuple[int, int]
) -> tuple[torch.export.ExportedProgram, Tensor, Tensor]:
    """The program of a model with folded kernels, images, and the model's own logits of them."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = (2, model.variant.in_channels, height, width)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        expected = model(images)
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledStdConv2d):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.folded())
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    return program, images, expected


def _compare(logits: Tensor, expected: Tensor) -> None:
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise RuntimeError(
            f"the exported model's logits differ from the original's by {difference:.1e} of the "
            f"largest, more than {_TOLERANCE:g}; do not use the file."
        )
