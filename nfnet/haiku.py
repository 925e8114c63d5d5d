"""Weights in the layout of the authors' JAX/Haiku code."""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nfnet.model import ResNet
from nfnet.variants import Variant
from nfnet.weights import load_weights

_CONVOLUTIONS = {
    "conv1": "conv0",
    "conv2": "conv1",
    "conv2b": "conv1b",
    "conv3": "conv2",
    "downsample.conv": "conv_shortcut",
    "attn_last.fc1": "squeeze_excite/~/linear",
    "attn_last.fc2": "squeeze_excite/~/linear_1",
}

# All that a pickle of NumPy arrays in dictionaries needs, under NumPy's old and new names.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


def load_haiku(model: ResNet, weights: Mapping[str, Mapping[str, ArrayLike]]) -> None:
    """Copy the authors' weights into a normalizer-free model; all of them or, on error, none.

    Args:
        model: a `dm_` model of the same depths and widths.
        weights: Haiku's parameters, {module: {parameter: array}}, with convolution kernels as
            (height, width, in, out), linear weights as (in, out) and gains as (out,).

    Raises:
        ValueError: the model is not one of the authors' kind, or an array is missing, unexpected
            or mis-shaped.
    """
    variant = model.variant
    if variant.batch_norm or not variant.skip_gain:
        raise ValueError(
            "the model has batch norm or is timm's own, expected a normalizer-free one of the "
            "authors, as their weights are; create a dm_ model instead."
        )
    given = {
        f"{module}::{parameter}": np.asarray(array, dtype=np.float32)
        for module, parameters in weights.items()
        for parameter, array in parameters.items()
    }
    _refuse_rounded_down(variant, given)
    ours = {_haiku_name(variant, name): (name, p) for name, p in model.named_parameters()}
    # Arrays of other names keep them, so that the complaint names what the file has.
    load_weights(
        model,
        {
            ours[name][0] if name in ours else name: _to_torch(array, ours.get(name))
            for name, array in given.items()
        },
        "the authors' weights",
    )


def _refuse_rounded_down(variant: Variant, given: Mapping[str, np.ndarray]) -> None:
    """Says it where weights are of the released code's narrower + variant; see `zoo.VARIANTS`."""
    for stage, width in enumerate(variant.widths):
        block = sum(variant.depths[:stage])
        name = f"NFNet/~/nf_block{f'_{block}' if block else ''}/~/conv0::w"
        group = variant.group_size or 1
        up = variant.inside_width(width, width, False)
        down = int(width * variant.bottleneck_ratio) // group * group
        if down != up and name in given and given[name].shape[-1] == down:
            raise ValueError(
                f"the authors' weights have {down} channels inside the blocks of stage {stage + 1},"
                f" expected {up}: the released code rounds {width * variant.bottleneck_ratio:g} "
                f"down to a multiple of {group}, while only rounded up the network has the "
                "published size; train it anew, or use a model without +."
            )


def unpickle_arrays(data: bytes) -> dict[str, dict[str, np.ndarray]]:
    """Read the pickle in which the authors released their weights; nothing else can be in it.

    Raises:
        ValueError: the pickle is damaged, or holds anything but arrays in dictionaries. Nothing
            of it is executed.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"it is no pickle of arrays ({error})") from None
    if not isinstance(tree, dict) or not tree:
        raise ValueError("it holds no parameters by module, as Haiku's do")
    for parameters in tree.values():
        if not isinstance(parameters, dict) or not all(
            isinstance(a, np.ndarray) and a.dtype.kind == "f" for a in parameters.values()
        ):
            raise ValueError("it holds something other than arrays of floating-point numbers")
    return tree


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no file of arrays needs; nothing was executed"
            )
        return super().find_class(module, name)


def _haiku_name(variant: Variant, name: str) -> str:
    """`module::parameter` in the authors' code for one of our parameters."""
    # Their two networks are two classes there.
    network, block = ("NFNet", "nf_block") if variant.second_conv else ("NF_ResNet", "nf_res_block")
    module, _, parameter = name.rpartition(".")
    if module == "head.fc" or ".attn_last." in module:
        parameter = {"weight": "w", "bias": "b"}[parameter]
    parameter = {"weight": "w", "skipinit_gain": "skip_gain"}.get(parameter, parameter)
    top, _, rest = module.partition(".")
    if top == "stages":
        stage, number, *inside = rest.split(".")
        # Haiku counts a class's instances through the whole network and leaves out the zero.
        index = sum(variant.depths[: int(stage)]) + int(number)
        path = block + (f"_{index}" if index else "")
        if inside:
            path += f"/~/{_CONVOLUTIONS['.'.join(inside)]}"
    elif top == "stem":
        path = "initial_conv" if rest == "conv" else f"stem_conv{int(rest[-1]) - 1}"
    else:
        path = "linear" if top == "head" else top
    return f"{network}/~/{path}::{parameter}"


def _to_torch(array: np.ndarray, ours: tuple[str, Tensor] | None) -> Tensor:
    """The array with the axes in PyTorch's order, and as many of them as our parameter has."""
    x = torch.from_numpy(array.copy())
    x = x.permute(3, 2, 0, 1) if x.ndim == 4 else x.t() if x.ndim == 2 else x
    if ours is not None and x.ndim in (1, 2) and ours[1].ndim == 4:
        x = x.view(-1, 1, 1, 1) if x.ndim == 1 else x[:, :, None, None]
    return x
