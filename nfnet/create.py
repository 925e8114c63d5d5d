"""From a name to a model."""

import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from nfnet import pretrained as files
from nfnet.agc import at_least_float32
from nfnet.layers import SameConv2d, ScaledStdConv2d
from nfnet.model import ResNet
from nfnet.standardisation import norms
from nfnet.zoo import find_variant


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: bool | str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> ResNet:
    """Build a model by name, with freshly initialised or pre-trained weights.

    Pre-trained weights are adapted to the `num_classes`, `in_channels` and `stem` that are asked
    for where theirs are others, and a warning says so: the classifier and the stem begin anew; of
    other channels the first kernels are summed (for one channel) or repeated and scaled, as by
    timm, and their gains follow, so that grey images give what they gave. What is not asked for is
    as the weights have it.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits, 0 for the averaged features instead; None takes that of the
            pre-trained weights, or else the variant's own (1000, or 10 for digits). See also
            `ResNet.reset_classifier`.
        pretrained: where to take weights from: the path of a safetensors file, of a PyTorch file
            of tensors (timm's .pth, or what a training saved), of the folder of a checkpoint, or
            of the authors' released Haiku pickle; or True or "hub", which fetches timm's copy from
            the Hugging Face hub (extra `hub`). No code in a file is executed.
        overrides: `depths`, `widths`, `stem` ("7x7_pool", "deep", "3x3_stride2" or, for small
            images, "3x3"), `stem_width`, `group_size`, `in_channels`, `drop_rate`,
            `stochdepth_rate` or `reference` ("authors" or "timm"; see `Variant`), in place of the
            variant's own.

    Returns:
        The model, in training mode; its `adapted` says in words what of the weights was.

    Raises:
        ValueError: the name or an override is unknown, a value is out of its range, or the
            weights cannot be had or are those of another model.
        OSError: the weights' file cannot be read.
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    variant = find_variant(name, overrides)
    if pretrained is None or pretrained is False:
        return ResNet(variant)
    path = files.find_file("hub" if pretrained is True else os.fspath(pretrained), name)
    weights = files.read_weights(path)
    own = files.own_settings(variant, weights)
    model = ResNet(find_variant(name, overrides | own))
    source = f"the weights in {path}"
    files.load_into(model, weights, source)
    told = variant.stem.startswith("3x3") or variant.stem_channels[-1] == variant.widths[0]
    if own.get("stem") == "3x3" and not told:
        raise ValueError(
            f"{source} have a stem of 3x3 kernels, whose stride they do not tell; say "
            'stem="3x3" or stem="3x3_stride2".'
        )
    asked = find_variant(name, own | overrides)
    if asked == model.variant:
        return model
    adapted = ResNet(asked)
    _adapt(adapted, model, source)
    return adapted


def _adapt(model: ResNet, trained: ResNet, source: str) -> None:
    """Copies what fits from a model whose classifier, channels or stem are others."""
    state, told = trained.state_dict(), []
    new, old = model.variant, trained.variant
    if new.num_classes != old.num_classes:
        state = {key: value for key, value in state.items() if not key.startswith("head.fc.")}
        if new.num_classes:
            told.append(f"a new classifier of {new.num_classes} classes, not {old.num_classes}")
    if new.stem != old.stem:
        state = {key: value for key, value in state.items() if not key.startswith("stem.")}
        told.append(f"a new stem {new.stem}, not {old.stem}")
    elif new.in_channels != old.in_channels:
        name = f"stem.{trained.stem.convs[0]}"
        conv, ours = trained.get_submodule(name), model.get_submodule(name)
        assert isinstance(conv, SameConv2d)
        assert isinstance(ours, SameConv2d)
        state[f"{name}.weight"] = _of_channels(conv.weight, new.in_channels)
        if isinstance(conv, ScaledStdConv2d) and isinstance(ours, ScaledStdConv2d):
            # What is standardised has one norm, on any number of channels.
            with torch.no_grad():
                ours.weight.copy_(state[f"{name}.weight"])
                state[f"{name}.gain"] = conv.gain * _norms(ours) / _norms(conv)
        told.append(f"the first kernels for {new.in_channels} channels, not {old.in_channels}")
    ours_by_name = model.state_dict()
    begun = {key.rpartition(".")[0] for key in ours_by_name.keys() - state.keys()}
    gone = {key.rpartition(".")[0] for key in state.keys() - ours_by_name.keys()}
    shortcuts = [name for name in sorted(begun | gone) if "downsample" in name]
    told += [f"{'a new' if name in begun else 'without the'} {name}" for name in shortcuts]
    with torch.no_grad():
        for key, tensor in ours_by_name.items():
            if key in state:
                tensor.copy_(state[key])
    model.adapted = tuple(told)
    if told:
        warnings.warn(f"{source} are adapted: {'; '.join(told)}", stacklevel=3)


def _norms(conv: ScaledStdConv2d) -> Tensor:
    return norms(at_least_float32(conv.weight), conv.eps)


def _of_channels(kernel_OIHW: Tensor, channels: int) -> Tensor:
    """First kernels for another number of channels, as timm makes them."""
    if channels == 1:
        return kernel_OIHW.sum(1, keepdim=True)
    known = kernel_OIHW.shape[1]
    repeated = kernel_OIHW.repeat(1, math.ceil(channels / known), 1, 1)[:, :channels]
    return repeated * (known / channels)
