"""The network: stem, stages of residual blocks, head."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

# What a sample's key is hashed with, so that no two uses share their random numbers.
_STOCHDEPTH, _DROPOUT = 0, 1

# What timm adds to the variance of a kernel.
_TIMM_EPS = 1e-5


def _activation(variant: Variant) -> tuple[Callable[[Tensor], Tensor], float]:
    """The variant's activation and its gamma, which is 1 where batch norm rescales anyway."""
    exact = variant.activation == "gelu" and variant.reference == "timm"
    act, gamma = ACTIVATIONS["gelu_exact" if exact else variant.activation]
    return act, 1.0 if variant.batch_norm else gamma


def _convolution(variant: Variant, input_scale: float) -> Callable[..., SameConv2d]:
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
        self.act, gamma = _activation(variant)
        self.convs: list[str] = []
        in_channels, kernel_size = variant.in_channels, 7 if variant.stem == "7x7_pool" else 3
        for i, width in enumerate(variant.stem_channels):
            # The images have been through no activation.
            conv = _convolution(variant, gamma if i > 0 or variant.gamma_in_kernels else 1.0)
            self.convs.append("conv" if len(variant.stem_channels) == 1 else f"conv{i + 1}")
            stride = STEMS[variant.stem][i]
            self.add_module(self.convs[-1], conv(in_channels, width, kernel_size, stride))
            in_channels = width
        self.pool: nn.Module | None = None
        if variant.stem == "7x7_pool":
            self.pool = SameMaxPool2d(3, 2) if variant.same_padding else nn.MaxPool2d(3, 2, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Turn images into features."""
        for i, name in enumerate(self.convs):
            x_NCHW = self.get_submodule(name)(x_NCHW if i == 0 else self.act(x_NCHW))
        return x_NCHW if self.pool is None else self.pool(x_NCHW)


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
        self.act, gamma = _activation(variant)
        # Each activation feeds only convolutions, so gamma and beta go into their kernels.
        conv, first_conv = _convolution(variant, gamma), _convolution(variant, gamma * beta)
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
            out = self.attn_gain * self.attn(out)
        out = self.conv3(self.act(self.norm3(out)))
        scale: float | Tensor = self.alpha
        if self.attn_last is not None:
            out, scale = self.attn_last(out), scale * self.attn_gain
        if self.skipinit_gain is not None:
            scale = scale * self.skipinit_gain
        out = out * scale
        if keep_N is not None:
            # Not rescaled by 1 / (1 - rate): the authors' code.
            out = out * keep_N.to(out.dtype).view(-1, 1, 1, 1)
        return shortcut + out


def _attention(variant: Variant, channels: int) -> nn.Module | None:
    if variant.attention == "se":
        return SqueezeExcite(channels, variant.se_ratio)
    return EfficientChannelAttention(channels) if variant.attention == "eca" else None


class Head(nn.Module):
    """Global average, dropout and the linear classifier: (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.fc = nn.Linear(in_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x_NCHW: Tensor, keys_N: Tensor | None = None) -> Tensor:
        """Classify features; with `keys_N` some channels of each sample are dropped by its key."""
        x_NC = x_NCHW.mean((2, 3))
        if keys_N is not None and self.drop_rate > 0:
            channels_C = torch.arange(x_NC.shape[1], device=x_NC.device)
            draws_NC = uniform(hash_keys(keys_N[:, None], _DROPOUT, channels_C))
            keep_NC = (draws_NC >= self.drop_rate).to(x_NC.dtype)
            x_NC = x_NC * keep_NC / (1 - self.drop_rate)
        logits_NK: Tensor = self.fc(x_NC)
        return logits_NK


class ResNet(nn.Module):
    """A network of the family, normalizer-free or batch-normalised; `create_model` builds them.

    Args:
        variant: what the network is made of.

    Attributes:
        variant: likewise.
        grad_checkpointing: whether training keeps only the blocks' inputs and computes what is
            inside them once more on the way back: less memory, about a third more time.

    Source: arXiv 2102.06171 (NFNet); arXiv 2101.08692 (NF-ResNet); arXiv 1603.05027
    (pre-activation ResNet).
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.grad_checkpointing = False
        self.act, gamma = _activation(variant)
        self.stem = Stem(variant)
        self.stages = nn.ModuleList()
        channels, variance = variant.stem_channels[-1], 1.0
        for s, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            blocks = nn.ModuleList()
            for b in range(depth):
                stride = variant.stage_strides[s] if b == 0 else 1
                first = s == b == 0
                blocks.append(Block(variant, channels, width, stride, variance**-0.5, first))
                # A stage's first block normalises its shortcut too; every block adds alpha^2.
                variance = (1.0 if b == 0 else variance) + variant.alpha**2
                channels = width
            self.stages.append(blocks)

        self.final_conv: nn.Module | None = None
        if variant.final_ratio > 0:
            width = round(channels * variant.final_ratio)
            # The last block's output comes here as it is.
            conv = _convolution(variant, gamma if variant.gamma_in_kernels else 1.0)
            self.final_conv, channels = conv(channels, width, 1), width
        self.norm = GlobalBatchNorm2d(channels) if variant.batch_norm else nn.Identity()
        self.gamma = 1.0 if variant.gamma_in_kernels else gamma
        self.head = Head(channels, variant.num_classes, variant.drop_rate)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, freshly initialised classifier of that many classes on the features.

        It is frozen where the old one was.

        Raises:
            ValueError: `num_classes` is not a whole number of 1 or more.
        """
        self.variant = replace(self.variant, num_classes=num_classes)
        old = self.head.fc.weight
        head = Head(self.head.fc.in_features, num_classes, self.head.drop_rate)
        self.head = head.to(old.device, old.dtype).train(self.training)
        self.head.requires_grad_(old.requires_grad)

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
        """The features (N, C, H', W') that the head averages; arguments of `forward`."""
        self._check(x_NCHW, keys_N)
        keep_BN = self._keep(self._keys(x_NCHW, keys_N))
        x_NCHW = self.stem(x_NCHW)
        blocks = [block for stage in self.stages for block in stage.children()]
        for b, block in enumerate(blocks):
            keep_N = None if keep_BN is None else keep_BN[b]
            if self.grad_checkpointing and self.training:
                x_NCHW = checkpoint(block, x_NCHW, keep_N, use_reentrant=False)
            else:
                x_NCHW = block(x_NCHW, keep_N)
        if self.final_conv is not None:
            x_NCHW = self.final_conv(x_NCHW)
        x_NCHW = self.act(self.norm(x_NCHW))
        return x_NCHW if self.gamma == 1 else x_NCHW * self.gamma

    def _check(self, x_NCHW: Tensor, keys_N: Tensor | None) -> None:
        if x_NCHW.ndim != 4 or x_NCHW.shape[1] != self.variant.in_channels:
            raise ValueError(
                f"images have shape {tuple(x_NCHW.shape)}, expected (N, "
                f"{self.variant.in_channels}, H, W); transpose them or set in_channels."
            )
        height, width = x_NCHW.shape[-2:]
        if min(height, width) < self.variant.stride:
            raise ValueError(
                f"images have {height} x {width} pixels, fewer than the network's stride of "
                f'{self.variant.stride}; take larger images, or create it with stem="3x3".'
            )
        if keys_N is not None and (keys_N.shape, keys_N.dtype) != (x_NCHW.shape[:1], torch.int64):
            raise ValueError(
                f"keys are {keys_N.dtype} of shape {tuple(keys_N.shape)}, expected torch.int64 of "
                f"shape ({len(x_NCHW)},); make one per image with hash_keys."
            )
        if self.grad_checkpointing and self.training and self.variant.batch_norm:
            raise ValueError(
                "grad_checkpointing is on, but batch norm would take its statistics twice; "
                "turn it off for this model."
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


def layer_group(parameter_name: str) -> str:
    """The part of the network that a parameter belongs to, as the paper's ablations cut it.

    Args:
        parameter_name: a name from `model.named_parameters()`.

    Returns:
        "stem", "stage1" and so on, "final_conv", or "head" (with the baseline's last norm).

    Raises:
        ValueError: no model of this library has such a parameter.
    """
    parts = parameter_name.split(".")
    if parts[0] in ("stem", "final_conv"):
        return parts[0]
    if parts[0] == "stages" and len(parts) > 1 and parts[1].isdecimal():
        return f"stage{int(parts[1]) + 1}"
    if parts[0] in ("norm", "head"):
        return "head"
    raise ValueError(
        f"{parameter_name!r} is not in a stem, stage or head; "
        "pass a name from named_parameters() of an unwrapped model."
    )
