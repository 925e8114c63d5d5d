"""Normalizer-free networks and adaptive gradient clipping, for PyTorch.

    >>> import torch
    >>> import nfnet
    >>> model = nfnet.create_model("dm_nf_resnet_digits")
    >>> groups = nfnet.param_groups(model, weight_decay=1e-4, clipping=0.08)
    >>> optimizer = nfnet.SGD_AGC(groups, lr=0.1)
    >>> images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    >>> torch.nn.functional.cross_entropy(model(images), labels).backward()
    >>> optimizer.step()
    >>> float(optimizer.clipped_fraction[model.stem.conv.weight]) <= 1
    True

Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
Normalization", 2021 (arXiv 2102.06171).
"""

from nfnet.agc import adaptive_clip_grad_, num_units
from nfnet.create import create_model
from nfnet.ema import EMA
from nfnet.export import export_onnx, export_torch
from nfnet.flops import count_flops
from nfnet.haiku import load_haiku
from nfnet.images import IMAGE_ENDINGS, check_image, read_image
from nfnet.layers import ScaledStdConv2d, kernels_kept
from nfnet.model import ResNet, layer_group
from nfnet.optim import SGD_AGC, param_groups
from nfnet.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    eval_transform,
    preprocessing,
    to_pixels,
)
from nfnet.propagation import BlockSignal, signal_propagation
from nfnet.random import hash_keys, uniform
from nfnet.sam import SAM
from nfnet.schedule import warmup_cosine
from nfnet.variants import Variant
from nfnet.zoo import list_models

__all__ = [
    "EMA",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_ENDINGS",
    "SAM",
    "SGD_AGC",
    "BlockSignal",
    "Preprocessing",
    "ResNet",
    "ScaledStdConv2d",
    "Variant",
    "adaptive_clip_grad_",
    "check_image",
    "count_flops",
    "create_model",
    "eval_transform",
    "export_onnx",
    "export_torch",
    "hash_keys",
    "kernels_kept",
    "layer_group",
    "list_models",
    "load_haiku",
    "num_units",
    "param_groups",
    "preprocessing",
    "read_image",
    "signal_propagation",
    "to_pixels",
    "uniform",
    "warmup_cosine",
]
