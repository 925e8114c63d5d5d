"""The network: stem, stages of residual blocks, head."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nfnet.blocks import STOCHDEPTH, Block, Head, Stem, activation, convolution
from nfnet.layers import GlobalBatchNorm2d
from nfnet.random import hash_keys, uniform
from nfnet.variants import STEMS, Variant


class ResNet(nn.Module):
    """A network of the family, normalizer-free or batch-normalised; `create_model` builds them.

    Args:
        variant: what the network is made of.

    Attributes:
        variant: likewise.
        num_features: channels C of the features that the head averages.
        adapted: in words, what of pre-trained weights `create_model` put in place anew.
        grad_checkpointing: whether training keeps only the blocks' inputs and computes what is
            inside them once more on the way back: less memory, about a third more time.

    Source: arXiv 2102.06171 (NFNet); arXiv 2101.08692 (NF-ResNet); arXiv 1603.05027
    (pre-activation ResNet).
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.grad_checkpointing = False
        self.adapted: tuple[str, ...] = ()
        self.act, gamma = activation(variant)
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
            conv = convolution(variant, gamma if variant.gamma_in_kernels else 1.0)
            self.final_conv, channels = conv(channels, width, 1), width
        self.norm = GlobalBatchNorm2d(channels) if variant.batch_norm else nn.Identity()
        self.gamma = 1.0 if variant.gamma_in_kernels else gamma
        self.num_features = channels
        self.head = Head(channels, variant.num_classes, variant.drop_rate)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, freshly initialised classifier of that many classes on the features; 0 for
        none.

        It is frozen where the old one was.

        Raises:
            ValueError: `num_classes` is not a whole number of 0 or more.
        """
        self.variant = replace(self.variant, num_classes=num_classes)
        like = next(self.stem.parameters())
        frozen = any(not p.requires_grad for p in self.head.parameters())
        head = Head(self.num_features, num_classes, self.head.drop_rate)
        self.head = head.to(like.device, like.dtype).train(self.training)
        self.head.requires_grad_(not frozen)

    def gains_as_vectors(self) -> None:
        """Give each skip gain one dimension, as `fully_shard` asks of what it shards.

        They have none, as in the authors' and timm's weights; `create_model` reads both.
        """
        for block in self.modules():
            if isinstance(block, Block) and block.skipinit_gain is not None:
                gain = block.skipinit_gain
                block.skipinit_gain = nn.Parameter(gain.detach().view(1), gain.requires_grad)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each of `forward_intermediates`: `num_chs`, its channels, `reduction`, pixels of the
        image along each side of one of its own, and `module`, which gives it; as timm names them.
        """
        variant, tap = self.variant, self.variant.stem_tap
        reduction = math.prod(STEMS[variant.stem][: tap + 1])
        name = f"stem.{self.stem.convs[tap]}"
        found = [{"num_chs": variant.stem_channels[tap], "reduction": reduction, "module": name}]
        reduction = math.prod(STEMS[variant.stem])
        for s, (width, stride) in enumerate(
            zip(variant.widths, variant.stage_strides, strict=True)
        ):
            reduction *= stride
            found.append({"num_chs": width, "reduction": reduction, "module": f"stages.{s}"})
        if self.final_conv is not None:
            found[-1] |= {"num_chs": self.num_features, "module": "final_conv"}
        return found

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
        return self._forward(x_NCHW, keys_N, ())[0]

    def forward_head(
        self, x_NCHW: Tensor, pre_logits: bool = False, keys_N: Tensor | None = None
    ) -> Tensor:
        """Classify features of `forward_features`.

        Args:
            pre_logits: return their averages (N, C), which the classifier starts from.
            keys_N: of `forward`, for dropout; None drops nothing.
        """
        logits: Tensor = self.head(x_NCHW, keys_N, pre_logits)
        return logits

    def forward_intermediates(
        self,
        x_NCHW: Tensor,
        indices: int | Sequence[int] | None = None,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of several resolutions, as `feature_info` describes them: of the stem, then
        of each stage; the last before the final activation.

        Args:
            indices: which, as places in `feature_info`, or how many of the last; None for all.
            intermediates_only: return them alone, not the features of `forward_features` too.

        Raises:
            ValueError: there is no such place.
        """
        count = len(self.variant.depths) + 1
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if len(indices) == 0 or not all(-count <= place < count for place in indices):
            raise ValueError(f"indices are {indices}, expected places of {count} features.")
        asked = [place % count for place in indices]
        features, found = self._forward(x_NCHW, None, asked)
        taken = [found[place] for place in sorted(asked)]
        return taken if intermediates_only else (features, taken)

    def _forward(
        self, x_NCHW: Tensor, keys_N: Tensor | None, asked: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The features, and those on the way that are asked for."""
        self._check(x_NCHW, keys_N)
        keep_BN = self._keep(self._keys(x_NCHW, keys_N))
        found: dict[int, Tensor] = {}
        x_NCHW, tap = self.stem.tapped(x_NCHW)
        if 0 in asked:
            found[0] = tap
        del tap
        b = 0
        for s, stage in enumerate(self.stages, 1):
            for block in stage.children():
                keep_N = None if keep_BN is None else keep_BN[b]
                if self.grad_checkpointing and self.training:
                    x_NCHW = checkpoint(block, x_NCHW, keep_N, use_reentrant=False)
                else:
                    x_NCHW = block(x_NCHW, keep_N)
                b += 1
            if s == len(self.stages) and self.final_conv is not None:
                x_NCHW = self.final_conv(x_NCHW)
            if s in asked:
                found[s] = x_NCHW
        x_NCHW = self.act(self.norm(x_NCHW))
        return (x_NCHW if self.gamma == 1 else x_NCHW * self.gamma), found

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
        return uniform(hash_keys(keys_N, STOCHDEPTH, blocks_B1)) >= rates_B1


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
