"""How the size of the signal changes from block to block: signal propagation plots."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfnet.blocks import Block
from nfnet.model import ResNet


@dataclass(frozen=True)
class BlockSignal:
    """Statistics of one block over a batch, averaged over channels."""

    name: str
    """The block's name in the model, such as stages.1.0."""
    squared_mean: float
    """Square of each channel's mean, of the block's input."""
    variance: float
    """Variance of each channel, of the block's input."""
    residual_variance: float
    """Variance of each channel where the residual branch ends, before alpha and the skip gain."""
    expected_variance: float | None
    """Variance of the input that the block divides by; None with batch norm, which measures it."""


@torch.no_grad()
def signal_propagation(
    model: ResNet, images_NCHW: Tensor, skip_gain: float | None = 1.0
) -> list[BlockSignal]:
    """Measure the signal at every block of a model, in evaluation mode unless it has batch norm.

    Args:
        model: a model from `create_model`, freshly initialised to compare with theory.
        images_NCHW: a batch; the paper takes unit normal noise.
        skip_gain: value of every skip gain (or, of timm's models, gain of the last convolution)
            during the measurement, since at their initial 0 no residual branch adds anything;
            None leaves them as they are.

    Returns:
        One entry for each block, in order.

    Raises:
        ValueError: the images have the wrong shape.

    Source: arXiv 2101.08692, section 2.1 and figure 1.
    """
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, Block)]
    inputs: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    was_training = model.training
    gains = [_skip_gain(block) for _, block in blocks]
    before = [gain.clone() if gain is not None else None for gain in gains]
    with ExitStack() as stack:
        for name, block in blocks:
            stack.enter_context(block.register_forward_pre_hook(partial(_keep_input, inputs, name)))
            keep = partial(_keep_residual, residuals, name, block)
            stack.enter_context(block.conv3.register_forward_hook(keep))
        try:
            # Batch norm's initial running statistics are not those of any signal.
            model.train(model.variant.batch_norm)
            for gain in gains:
                if gain is not None and skip_gain is not None:
                    gain.fill_(skip_gain)
            model(images_NCHW)
        finally:
            model.train(was_training)
            for gain, value in zip(gains, before, strict=True):
                if gain is not None and value is not None:
                    gain.copy_(value)
    return [
        BlockSignal(
            name=name,
            squared_mean=inputs[name].mean((0, 2, 3)).square().mean().item(),
            variance=_variance(inputs[name]),
            residual_variance=_variance(residuals[name]),
            expected_variance=None if model.variant.batch_norm else block.beta**-2,
        )
        for name, block in blocks
    ]


def _skip_gain(block: Block) -> Tensor | None:
    if block.skipinit_gain is not None:
        return block.skipinit_gain
    gain = getattr(block.conv3, "gain", None)
    return gain if isinstance(gain, Tensor) else None


def _variance(x_NCHW: Tensor) -> float:
    return x_NCHW.float().var((0, 2, 3)).mean().item()


def _keep_input(kept: dict[str, Tensor], name: str, module: nn.Module, args: Any) -> None:
    kept[name] = args[0].float()


def _keep_residual(
    kept: dict[str, Tensor], name: str, block: Block, module: nn.Module, args: Any, output: Tensor
) -> None:
    gate = 1.0 if block.attn_last is None else block.attn_gain * block.attn_last(output)
    kept[name] = (output * gate).float()
