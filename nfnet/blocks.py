"""The parts of a network: stem, residual blocks, head."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nfnet.layers import (
    ACTIVATIONS,
    EfficientChannelAttention,
    GlobalBatchNorm2d,
    SameConv2d,
    SameMaxPool2d,
    ScaledStdConv2d,
    SqueezeExcite,
)
from nfnet.random import hash_keys, uniform
from nfnet.variants import STEMS, Variant

STOCHDEPTH = 0
"""What a sample's key is hashed with for stochastic depth: no two uses share random numbers."""

_DROPOUT = 1

# What timm adds to the variance of a kernel.
_TIMM_EPS = 1e-5


def activation(variant: Variant) -> tuple[Callable[[Tensor], Tensor], float]:
    """The variant's activation and its gamma, which is 1 where batch norm rescales anyway."""
    exact = variant.activation == "gelu" and variant.reference == "timm"
    act, gamma = ACTIVATIONS["gelu_exact" if exact else variant.activation]
    return act, 1.0 if variant.batch_norm else gamma


def convolution(variant: Variant, input_scale: float) -> Callable[..., SameConv2d]:
    """The variant's kind of convolution, for an input that is yet to be scaled."""
    if variant.batch_norm:
        return partial(SameConv2d, same_padding=variant.same_padding)
    return partial(
        ScaledStdConv2d,
        same_padding=variant.same_padding,
        input_scale=input_scale,
        eps=_TIMM_EPS if variant.reference == "timm" else None,
    )


class Stem(nn.Module):
    """The first convolutions, an activation between each two, and pooling if there is any."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.act, gamma = activation(variant)
        self.convs: list[str] = []
        self.tap = variant.stem_tap
        in_channels, kernel_size = variant.in_channels, 7 if variant.stem == "7x7_pool" else 3
        for i, width in enumerate(variant.stem_channels):
            # The images have been through no activation.
            conv = convolution(variant, gamma if i > 0 or variant.gamma_in_kernels else 1.0)
            self.convs.append("conv" if len(variant.stem_channels) == 1 else f"conv{i + 1}")
            stride = STEMS[variant.stem][i]
            self.add_module(self.convs[-1], conv(in_channels, width, kernel_size, stride))
            in_channels = width
        self.pool: nn.Module | None = None
        if variant.stem == "7x7_pool":
            self.pool = SameMaxPool2d(3, 2) if variant.same_padding else nn.MaxPool2d(3, 2, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Turn images into features."""
        return self.tapped(x_NCHW)[0]

    def tapped(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and what the convolution `variant.stem_tap` gives on the way."""
        tap = x_NCHW
        for i, name in enumerate(self.convs):
            x_NCHW = self.get_submodule(name)(x_NCHW if i == 0 else self.act(x_NCHW))
            if i == self.tap:
                tap = x_NCHW
        return (x_NCHW if self.pool is None else self.pool(x_NCHW)), tap


class Block(nn.Module):
    """Pre-activation bottleneck block, `h' = shortcut(h) + alpha * gain * f(beta * act(h))`.

    The batch-normalised form has a norm before each activation and `h' = shortcut(h) + f(h)`.
    Where resolution or channels change, the shortcut is a 1x1 convolution of what f starts from,
    after an average pool if the variant has one.

    Args:
        variant: the network that the block is part of.
        in_channels: channels of h.
        out_channels: channels of h'.
        stride: 2 halves the resolution, 1 keeps it.
        beta: 1 over the expected standard deviation of h.
        first: whether it is the network's first block.

    Source: arXiv 2101.08692, section 3; arXiv 2102.06171, section 3.
    """

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        out_channels: int,
        stride: int,
        beta: float,
        first: bool,
    ) -> None:
        super().__init__()
        width = variant.inside_width(in_channels, out_channels, first)
        groups = width // (variant.group_size or width)
        self.act, gamma = activation(variant)
        # Each activation feeds only convolutions, so gamma and beta go into their kernels.
        conv, first_conv = convolution(variant, gamma), convolution(variant, gamma * beta)
        norm = GlobalBatchNorm2d if variant.batch_norm else nn.Identity
        self.alpha, self.beta = 1.0 if variant.batch_norm else variant.alpha, beta
        self.norm1 = norm(in_channels)
        self.conv1 = first_conv(in_channels, width, 1)
        self.norm2 = norm(width)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.norm2b = norm(width) if variant.second_conv else None
        self.conv2b = conv(width, width, 3, 1, groups) if variant.second_conv else None
        self.norm3 = norm(width)
        self.conv3 = conv(width, out_channels, 1)
        attention = _attention(variant, width if variant.inverted else out_channels)
        self.attn = attention if variant.inverted else None
        self.attn_last = None if variant.inverted else attention
        # A gate is 1/2 on average.
        self.attn_gain = 1.0 if variant.batch_norm else 2.0
        self.skipinit_gain: nn.Parameter | None = None
        if variant.skip_gain and not variant.batch_norm:
            self.skipinit_gain = nn.Parameter(torch.zeros(()))
        elif isinstance(self.conv3, ScaledStdConv2d):
            nn.init.zeros_(self.conv3.gain)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            shortcut: OrderedDict[str, nn.Module] = OrderedDict()
            if variant.pooled_shortcut and stride > 1:
                # Pixels beyond the edge of an odd size are left out of the average.
                shortcut["pool"] = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
                stride = 1
            shortcut["conv"] = first_conv(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(shortcut)

    def forward(self, x_NCHW: Tensor, keep_N: Tensor | None = None) -> Tensor:
        """Transform the features; samples whose `keep_N` is 0 take the shortcut only."""
        out: Tensor = self.act(self.norm1(x_NCHW))
        shortcut = x_NCHW if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.norm2(out)))
        if self.conv2b is not None and self.norm2b is not None:
            out = self.conv2b(self.act(self.norm2b(out)))
        if self.attn is not None:
            out = out * (self.attn_gain * self.attn(out))
        out = self.conv3(self.act(self.norm3(out)))
        factor = self._factor(out, keep_N)
        if isinstance(factor, float):
            return torch.add(shortcut, out, alpha=factor)
        # One pass over the features, whatever they are multiplied by.
        return torch.addcmul(shortcut, out, factor.to(out.dtype))

    def _factor(self, out_NCHW: Tensor, keep_N: Tensor | None) -> float | Tensor:
        """What the block's own part is multiplied by, for each sample and channel if need be."""
        factor: float | Tensor = self.alpha
        if self.attn_last is not None:
            factor = self.attn_last(out_NCHW) * (self.alpha * self.attn_gain)
        if self.skipinit_gain is not None:
            factor = factor * self.skipinit_gain
        if keep_N is not None:
            # Not rescaled by 1 / (1 - rate): the authors' code.
            factor = factor * keep_N.to(out_NCHW.dtype).view(-1, 1, 1, 1)
        return factor


def _attention(variant: Variant, channels: int) -> SqueezeExcite | EfficientChannelAttention | None:
    if variant.attention == "se":
        return SqueezeExcite(channels, variant.se_ratio)
    return EfficientChannelAttention(channels) if variant.attention == "eca" else None


class Head(nn.Module):
    """Global average, dropout and the linear classifier: (N, C, H, W) -> (N, num_classes); without
    classes there is no classifier, and the averages (N, C) are the answer."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(in_features, num_classes)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def forward(
        self, x_NCHW: Tensor, keys_N: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """Classify features; with `keys_N` some channels of each sample are dropped by its key, and
        with `pre_logits` the averages are the answer."""
        x_NC = x_NCHW.mean((2, 3))
        if keys_N is not None and self.drop_rate > 0:
            channels_C = torch.arange(x_NC.shape[1], device=x_NC.device)
            draws_NC = uniform(hash_keys(keys_N[:, None], _DROPOUT, channels_C))
            keep_NC = (draws_NC >= self.drop_rate).to(x_NC.dtype)
            x_NC = x_NC * keep_NC / (1 - self.drop_rate)
        logits_NK: Tensor = x_NC if pre_logits else self.fc(x_NC)
        return logits_NK
