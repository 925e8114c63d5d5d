"""Convolutions, pooling, activations, channel attention and the baseline's batch norm."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nfnet.agc import at_least_float32
from nfnet.standardisation import standardise

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 1.7139588594436646),
    "gelu": (partial(F.gelu, approximate="tanh"), 1.7015043497085571),
    "gelu_exact": (F.gelu, 1.7015043497085571),
    "silu": (F.silu, 1.7881293296813965),
}
"""Name -> (function, gamma); gamma times the function keeps a unit normal at unit variance.

Source: arXiv 2101.08692, section 4.3 and appendix D.
"""


def pad_same(
    x_NCHW: Tensor, kernel: tuple[int, int], stride: tuple[int, int], value: float = 0.0
) -> tuple[Tensor, tuple[int, int]]:
    """Pad an image as TensorFlow's `SAME` does: the output has ceil(size / stride) pixels.

    An odd amount of padding puts its extra pixel at the bottom and at the right, which
    PyTorch's own `padding` cannot express; an even amount is left to the caller's operator,
    which pads without a copy.

    Args:
        x_NCHW: images.
        kernel: height and width of the window that will slide over them.
        stride: its vertical and horizontal stride.
        value: what to fill with where the image itself must be padded.

    Returns:
        The image (padded if need be), and the symmetric padding still to be applied.
    """
    vertical, horizontal = (
        max((-(-size // s) - 1) * s + k - size, 0)
        for size, k, s in zip(x_NCHW.shape[-2:], kernel, stride, strict=True)
    )
    if vertical % 2 == 0 and horizontal % 2 == 0:
        return x_NCHW, (vertical // 2, horizontal // 2)
    sides = (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
    return F.pad(x_NCHW, sides, value=value), (0, 0)


class SameMaxPool2d(nn.Module):
    """Max pooling with `SAME` padding, (N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = (stride, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Pool images."""
        x_NCHW, padding = pad_same(x_NCHW, self.kernel_size, self.stride, value=-math.inf)
        return F.max_pool2d(x_NCHW, self.kernel_size, self.stride, padding)


class SameConv2d(nn.Conv2d):
    """Convolution without bias and with He initialisation, as the baseline's.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: as in `nn.Conv2d`.
        same_padding: pad as `pad_same` does; else by half the kernel on all sides.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        same_padding: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=bias,
        )
        self.same_padding = same_padding

    def reset_parameters(self) -> None:
        """Draw the kernel from a normal of variance 2 / fan-in; a bias starts at 0."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """The kernel (O, I / groups, kh, kw) that the convolution applies."""
        return self.weight

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolve images with `kernel()`."""
        padding = self.padding
        if self.same_padding:
            (height, width), (vertical, horizontal) = self.kernel_size, self.stride
            x_NCHW, padding = pad_same(x_NCHW, (height, width), (vertical, horizontal))
        return F.conv2d(x_NCHW, self.kernel(), self.bias, self.stride, padding, groups=self.groups)


class ScaledStdConv2d(SameConv2d):
    """Convolution whose kernel has mean 0 and norm `gain` over every output's fan-in.

    `w_hat = (w - mean) * gain / sqrt(max(var * fan_in, 1e-4))`; since var * fan_in is the
    squared norm of w - mean, this is gain times a unit vector.
    Source: arXiv 2102.06171, equation 1, with the authors' code's lower bound.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, same_padding: as in `SameConv2d`.
        input_scale: a constant factor of the input. A convolution is linear, so it is
            applied to the kernel, which is far smaller than the images.
        eps: timm's way against a division by zero: added to the variance, in place of the
            lower bound. At a large fan-in the two differ by up to a percent.

    Attributes:
        kept: what `kernel` returns within `kernels_kept`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        same_padding: bool = True,
        input_scale: float = 1.0,
        eps: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            groups,
            bias=True,
            same_padding=same_padding,
        )
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))
        self.input_scale = input_scale
        self.eps = eps
        self.kept: Tensor | None = None

    def reset_parameters(self) -> None:
        """Draw the kernel from a normal of variance 1 / fan-in; the bias starts at 0."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """The standardised kernel w_hat (O, I / groups, kh, kw), times the input's scale.

        Of weights in half precision it is computed in float32, and rounded once.
        """
        if self.kept is not None:
            return self.kept
        factor = at_least_float32(self.gain) * self.input_scale
        w_hat = standardise(at_least_float32(self.weight), factor, self.eps)
        return w_hat.to(self.weight.dtype)

    def folded(self) -> SameConv2d:
        """A plain convolution with this one's `kernel()` as it is now, which computes the same."""
        plain = SameConv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size[0],
            self.stride[0],
            self.groups,
            bias=True,
            same_padding=self.same_padding,
        )
        assert self.bias is not None
        plain.weight, plain.bias = nn.Parameter(self.kernel().detach()), self.bias
        return plain.train(self.training)


@contextmanager
def kernels_kept(model: nn.Module) -> Iterator[None]:
    """Standardises each kernel of a model once for all that is computed within.

    For a batch whose gradient is computed piece by piece: the weights and gains get theirs at
    the end, from the sum of the kernels' (standardising is linear in the gradient). If an error
    ends it they get none.
    """
    convs = [conv for conv in model.modules() if isinstance(conv, ScaledStdConv2d)]
    before, kernels = [conv.kept for conv in convs], [conv.kernel() for conv in convs]
    leaves = [kernel.detach().requires_grad_(kernel.requires_grad) for kernel in kernels]
    for conv, leaf in zip(convs, leaves, strict=True):
        conv.kept = leaf
    try:
        yield
    finally:
        for conv, kept in zip(convs, before, strict=True):
            conv.kept = kept
    used = [n for n, leaf in enumerate(leaves) if leaf.grad is not None]
    if used:
        torch.autograd.backward([kernels[n] for n in used], [leaves[n].grad for n in used])


class SqueezeExcite(nn.Module):
    """Draws a gate in (0, 1) for each channel, by two linear layers from all averages.

    Args:
        channels: channels C of the features (N, C, H, W).
        ratio: hidden channels over C, rounded to a multiple of 8.

    Source: arXiv 1709.01507; arXiv 2102.06171, appendix E. The linear layers are 1x1
    convolutions so that timm's weights fit.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = max(8, int(channels * ratio + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        for fc in (self.fc1, self.fc2):
            # Haiku's default for linear layers, which the authors left as it was.
            std = fc.in_channels**-0.5
            nn.init.trunc_normal_(fc.weight, std=std, a=-2 * std, b=2 * std)
            assert fc.bias is not None
            nn.init.zeros_(fc.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The gates (N, C, 1, 1) of features."""
        hidden_NC11 = F.relu(self.fc1(x_NCHW.mean((2, 3), keepdim=True)))
        gate_NC11: Tensor = self.fc2(hidden_NC11).sigmoid()
        return gate_NC11


class EfficientChannelAttention(nn.Module):
    """Draws a gate in (0, 1) for each channel, by a convolution along the channels' averages.

    Args:
        channels: channels C of the features (N, C, H, W); the kernel grows with log2 C.

    Source: arXiv 1910.03151, section 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        size = max(3, size if size % 2 else size + 1)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The gates (N, C, 1, 1) of features."""
        gate_N1C: Tensor = self.conv(x_NCHW.mean((2, 3))[:, None]).sigmoid()
        return gate_N1C[:, 0, :, None, None]


class _GlobalSum(torch.autograd.Function):
    """Sum over all processes; since each one's output holds every input, so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _GlobalSum.forward(ctx, grad)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the global batch.

    Where `torch.distributed` runs with more than one process, every process contributes its
    part of the batch (parts may differ in size, or be empty), and gradients flow back through
    the shared statistics, so results do not depend on how the batch is cut. All processes
    must call the layer together.

    Args:
        num_features: channels C of the (N, C, H, W) input.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalise features by the global batch's statistics, or the running ones."""
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(x_NCHW)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None

        # Distances from the running mean, which all processes share: a sum of squares of raw
        # values would lose digits where the mean is far from zero.
        shift_C = self.running_mean.clone()
        dtype = torch.promote_types(x_NCHW.dtype, shift_C.dtype)
        x_shifted = x_NCHW.to(dtype) - shift_C.view(-1, 1, 1)
        count = x_shifted.new_full((1,), x_NCHW.numel() // x_NCHW.shape[1])
        sums = (x_shifted.sum((0, 2, 3)), x_shifted.square().sum((0, 2, 3)), count)
        total: Tensor = _GlobalSum.apply(torch.cat(sums))
        count = total[-1].detach()
        # The global mean's distance from the running mean, and the mean squared distance.
        delta_C, square_C = (total[:-1] / count).chunk(2)
        var_C = (square_C - delta_C.square()).clamp_min(0.0)

        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_((shift_C + delta_C).to(shift_C.dtype), self.momentum)
            unbiased = var_C * (count / (count - 1).clamp_min(1))
            self.running_var.lerp_(unbiased.to(shift_C.dtype), self.momentum)

        scale_C = self.weight * torch.rsqrt(var_C + self.eps)
        offset_C = self.bias - delta_C * scale_C
        y = torch.addcmul(offset_C.view(-1, 1, 1), x_shifted, scale_C.view(-1, 1, 1))
        return y.to(x_NCHW.dtype)
