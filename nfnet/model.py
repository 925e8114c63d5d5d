"""The network: stem, stages of residual blocks, head."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfnet.layers import (
    ACTIVATIONS,
    GlobalBatchNorm2d,
    SameConv2d,
    SameMaxPool2d,
    ScaledStdConv2d,
)
from nfnet.random import hash_keys, uniform
from nfnet.variants import Variant, find_variant

# What a sample's key is hashed with, so that no two uses share their random numbers.
_STOCHDEPTH, _DROPOUT = 0, 1


class Block(nn.Module):
    """Pre-activation bottleneck block, `h' = shortcut(h) + alpha * gain * f(beta * act(h))`.

    The batch-normalised form has a norm before each activation and `h' = shortcut(h) + f(h)`.
    Where resolution or channels change, the shortcut is a 1x1 convolution of what f starts from.

    Args:
        variant: the network that the block is part of.
        in_channels: channels of h.
        out_channels: channels of h'.
        stride: 2 halves the resolution, 1 keeps it.
        beta: 1 over the expected standard deviation of h.

    Source: arXiv 2101.08692, section 3; arXiv 2102.06171, section 3.
    """

    def __init__(
        self, variant: Variant, in_channels: int, out_channels: int, stride: int, beta: float
    ) -> None:
        super().__init__()
        width = int(out_channels * variant.bottleneck_ratio)
        self.act, gamma = ACTIVATIONS[variant.activation]
        self.skipinit_gain: nn.Parameter | None
        norm: type[nn.Module]
        conv: Callable[..., nn.Module]
        first_conv: Callable[..., nn.Module]
        # Each activation feeds only convolutions, so gamma and beta go into their kernels.
        if variant.batch_norm:
            norm, conv, first_conv, self.alpha = GlobalBatchNorm2d, SameConv2d, SameConv2d, 1.0
            self.register_parameter("skipinit_gain", None)
        else:
            norm, self.alpha = nn.Identity, variant.alpha
            conv = partial(ScaledStdConv2d, input_scale=gamma)
            first_conv = partial(ScaledStdConv2d, input_scale=gamma * beta)
            self.skipinit_gain = nn.Parameter(torch.zeros(()))
        self.norm1 = norm(in_channels)
        self.conv1 = first_conv(in_channels, width, 1)
        self.norm2 = norm(width)
        self.conv2 = conv(width, width, 3, stride)
        self.norm3 = norm(width)
        self.conv3 = conv(width, out_channels, 1)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            shortcut = first_conv(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(OrderedDict(conv=shortcut))

    def forward(self, x_NCHW: Tensor, keep_N: Tensor | None = None) -> Tensor:
        """Transform the features; samples whose `keep_N` is 0 take the shortcut only."""
        out: Tensor = self.act(self.norm1(x_NCHW))
        shortcut = x_NCHW if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.norm2(out)))
        out = self.conv3(self.act(self.norm3(out)))
        if self.skipinit_gain is not None:
            out = out * (self.alpha * self.skipinit_gain)
        if keep_N is not None:
            # Not rescaled by 1 / (1 - rate): the authors' code.
            out = out * keep_N.to(out.dtype).view(-1, 1, 1, 1)
        return shortcut + out


class Head(nn.Module):
    """Global average, dropout and the linear classifier: (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.fc = nn.Linear(in_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x_NCHW: Tensor, keys_N: Tensor | None = None) -> Tensor:
        x_NC = x_NCHW.mean((2, 3))
        if keys_N is not None and self.drop_rate > 0:
            channels_C = torch.arange(x_NC.shape[1], device=x_NC.device)
            draws_NC = uniform(hash_keys(keys_N[:, None], _DROPOUT, channels_C))
            keep_NC = (draws_NC >= self.drop_rate).to(x_NC.dtype)
            x_NC = x_NC * keep_NC / (1 - self.drop_rate)
        logits_NK: Tensor = self.fc(x_NC)
        return logits_NK


class ResNet(nn.Module):
    """A normalizer-free ResNet or its batch-normalised twin; `create_model` builds them by name.

    Args:
        variant: what the network is made of.

    Source: arXiv 2101.08692 (NF-ResNet); arXiv 1603.05027 (pre-activation ResNet).
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.act, self.gamma = ACTIVATIONS[variant.activation]
        conv = SameConv2d if variant.batch_norm else ScaledStdConv2d
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        if variant.stem == "7x7_pool":
            stem["conv"] = conv(variant.in_channels, variant.stem_width, 7, stride=2)
            stem["pool"] = SameMaxPool2d(3, stride=2)
        else:
            stem["conv"] = conv(variant.in_channels, variant.stem_width, 3)
        self.stem = nn.Sequential(stem)

        self.stages = nn.ModuleList()
        channels, variance = variant.stem_width, 1.0
        for s, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            blocks = nn.ModuleList()
            for b in range(depth):
                stride = 2 if b == 0 and s > 0 else 1
                blocks.append(Block(variant, channels, width, stride, beta=variance**-0.5))
                # A stage's first block normalises its shortcut too; every block adds alpha^2.
                variance = (1.0 if b == 0 else variance) + variant.alpha**2
                channels = width
            self.stages.append(blocks)

        self.norm = GlobalBatchNorm2d(channels) if variant.batch_norm else nn.Identity()
        self.head = Head(channels, variant.num_classes, variant.drop_rate)

    def forward(self, x_NCHW: Tensor, keys_N: Tensor | None = None) -> Tensor:
        """Classify images.

        In training mode, dropout and stochastic depth are functions of each sample's key alone,
        so cutting a batch into parts, with their keys, changes nothing.

        Args:
            x_NCHW: images (N, in_channels, H, W).
            keys_N: int64 keys (N,), from `hash_keys`; None draws them from PyTorch's generator.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: the images or the keys have the wrong shape or type.
        """
        self._check(x_NCHW, keys_N)
        keys_N = self._keys(x_NCHW, keys_N)
        logits_NK: Tensor = self.head(self.forward_features(x_NCHW, keys_N), keys_N)
        return logits_NK

    def forward_features(self, x_NCHW: Tensor, keys_N: Tensor | None = None) -> Tensor:
        """The features (N, widths[-1], H', W') that the head averages; arguments of `forward`."""
        self._check(x_NCHW, keys_N)
        keep_BN = self._keep(self._keys(x_NCHW, keys_N))
        x_NCHW = self.stem(x_NCHW)
        blocks = [block for stage in self.stages for block in stage.children()]
        for b, block in enumerate(blocks):
            x_NCHW = block(x_NCHW, None if keep_BN is None else keep_BN[b])
        x_NCHW = self.act(self.norm(x_NCHW))
        return x_NCHW if self.variant.batch_norm else x_NCHW * self.gamma

    def _check(self, x_NCHW: Tensor, keys_N: Tensor | None) -> None:
        if x_NCHW.ndim != 4 or x_NCHW.shape[1] != self.variant.in_channels:
            raise ValueError(
                f"images have shape {tuple(x_NCHW.shape)}, expected (N, "
                f"{self.variant.in_channels}, H, W); transpose them or set in_channels."
            )
        if keys_N is not None and (keys_N.shape, keys_N.dtype) != (x_NCHW.shape[:1], torch.int64):
            raise ValueError(
                f"keys are {keys_N.dtype} of shape {tuple(keys_N.shape)}, expected torch.int64 of "
                f"shape ({len(x_NCHW)},); make one per image with hash_keys."
            )

    def _keys(self, x_NCHW: Tensor, keys_N: Tensor | None) -> Tensor | None:
        """The samples' keys where something random needs them, else None."""
        if not self.training or self.variant.drop_rate == self.variant.stochdepth_rate == 0:
            return None
        if keys_N is not None:
            return keys_N
        return torch.randint(2**63 - 1, (len(x_NCHW),), device=x_NCHW.device)

    def _keep(self, keys_N: Tensor | None) -> Tensor | None:
        """Which blocks (B, N) run on which samples; None if all on all."""
        if keys_N is None or self.variant.stochdepth_rate == 0:
            return None
        num_blocks = sum(self.variant.depths)
        blocks_B1 = torch.arange(num_blocks, device=keys_N.device)[:, None]
        rates_B1 = self.variant.stochdepth_rate * blocks_B1.double() / num_blocks
        return uniform(hash_keys(keys_N, _STOCHDEPTH, blocks_B1)) >= rates_B1


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> ResNet:
    """Build a model by name, with freshly initialised weights.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits; None takes the variant's own (1000, or 10 for digits).
        overrides: `depths`, `widths`, `stem` ("7x7_pool" or "3x3"), `stem_width`, `in_channels`,
            `drop_rate` or `stochdepth_rate`, in place of the variant's own.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: the name or an override is unknown, or a value is out of its range.
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return ResNet(find_variant(name, overrides))


def layer_group(parameter_name: str) -> str:
    """The part of the network that a parameter belongs to, as the paper's ablations cut it.

    Args:
        parameter_name: a name from `model.named_parameters()`.

    Returns:
        "stem", "stage1" and so on, or "head" (which includes the baseline's last norm).

    Raises:
        ValueError: no model of this library has such a parameter.
    """
    parts = parameter_name.split(".")
    if parts[0] == "stem":
        return "stem"
    if parts[0] == "stages" and len(parts) > 1 and parts[1].isdecimal():
        return f"stage{int(parts[1]) + 1}"
    if parts[0] in ("norm", "head"):
        return "head"
    raise ValueError(
        f"{parameter_name!r} is not in a stem, stage or head; "
        "pass a name from named_parameters() of an unwrapped model."
    )
