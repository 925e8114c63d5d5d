"""Weights in the layout of the authors' JAX/Haiku code."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nfnet.model import ResNet

_MODULES = {
    "conv1": "conv0",
    "conv2": "conv1",
    "conv3": "conv2",
    "downsample.conv": "conv_shortcut",
}


def load_haiku(model: ResNet, weights: Mapping[str, Mapping[str, ArrayLike]]) -> None:
    """Copy the authors' weights into a normalizer-free model; all of them or, on error, none.

    Args:
        model: a normalizer-free model of the same depths and widths.
        weights: Haiku's parameters, {module: {parameter: array}}, with convolution kernels as
            (height, width, in, out), linear weights as (in, out) and gains as (out,).

    Raises:
        ValueError: the model has batch norm, or an array is missing, unexpected or mis-shaped.
    """
    if model.variant.batch_norm:
        raise ValueError(
            "the model has batch norm, expected a normalizer-free one, as the authors' weights "
            "are; create a dm_nf_resnet instead."
        )
    given = {
        f"{module}::{parameter}": array
        for module, parameters in weights.items()
        for parameter, array in parameters.items()
    }
    wanted = {_haiku_name(model, name): p for name, p in model.named_parameters()}
    for problem, names in (("lack", wanted.keys() - given), ("have", given.keys() - wanted)):
        if names:
            raise ValueError(
                f"the weights {problem} {', '.join(sorted(names)[:3])} ({len(names)} such in "
                "all), unlike the model; create it with the depths and stem of the weights."
            )
    arrays = {
        name: _to_torch(np.asarray(given[name], dtype=np.float32), p) for name, p in wanted.items()
    }
    for name, p in wanted.items():
        if arrays[name].shape != p.shape:
            raise ValueError(
                f"{name} has shape {np.shape(given[name])}, which gives {tuple(arrays[name].shape)}"
                f" here, expected {tuple(p.shape)}; create the model with the weights' widths."
            )
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(arrays[name])


def _haiku_name(model: ResNet, name: str) -> str:
    """`module::parameter` in the authors' code for one of our parameters."""
    module, _, parameter = name.rpartition(".")
    if module == "head.fc":
        return f"NF_ResNet/~/linear::{'w' if parameter == 'weight' else 'b'}"
    parameter = {"weight": "w", "skipinit_gain": "skip_gain"}.get(parameter, parameter)
    if module == "stem.conv":
        return f"NF_ResNet/~/initial_conv::{parameter}"
    _, stage, block, *inside = module.split(".")
    # Haiku counts a class's instances through the whole network and leaves out the zero.
    index = sum(model.variant.depths[: int(stage)]) + int(block)
    path = "NF_ResNet/~/nf_res_block" + (f"_{index}" if index else "")
    if inside:
        path += f"/~/{_MODULES['.'.join(inside)]}"
    return f"{path}::{parameter}"


def _to_torch(array: np.ndarray, p: Tensor) -> Tensor:
    """The array with the axes in PyTorch's order; gains get the axes they broadcast over."""
    x = torch.from_numpy(array.copy())
    if x.ndim == 1 and p.ndim == 4:
        return x.view(-1, 1, 1, 1)
    return x.permute(3, 2, 0, 1) if x.ndim == 4 else x.t() if x.ndim == 2 else x
