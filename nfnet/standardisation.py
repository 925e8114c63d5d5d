"""Scaled weight standardisation (arXiv 2102.06171, equation 1), and its gradient in few passes."""

from typing import Any

import torch
from torch import Tensor

MIN_NORM = 1e-2
"""The authors' lower bound of a centred kernel's norm: the square root of their 1e-4."""

_AXES = (1, 2, 3)

_NEARLY_ZERO = 1e-10

_BATCH_NORM_KNOWN = ("cpu", "cuda")
"""Devices on which batch norm's way back takes the inverse standard deviation as it is given."""


def standardise(weight_OIHW: Tensor, factor_O111: Tensor, eps: float | None = None) -> Tensor:
    """A kernel with mean 0 over every output's fan-in and `factor` as its norm.

    `(w - mean) * factor / max(|w - mean|, 1e-2)`, and with `eps`
    `(w - mean) * factor / sqrt(|w - mean|^2 + eps * fan_in)`, as timm does.

    Args:
        weight_OIHW: in float32 or float64.
        factor_O111: of the same type.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    ):
        # A compiler fuses the operations itself, a trace is to be of torch's own, and torch.func
        # has rules for each.
        centred = weight_OIHW - weight_OIHW.mean(_AXES, keepdim=True)
        return centred * (factor_O111 / _norms(centred, eps))
    kernel: Tensor = _Standardise.apply(weight_OIHW, factor_O111, eps)
    return kernel


def norms(weight_OIHW: Tensor, eps: float | None = None) -> Tensor:
    """What `standardise` divides each centred output by, (O, 1, 1, 1)."""
    return _norms(weight_OIHW - weight_OIHW.mean(_AXES, keepdim=True), eps)


def _norms(centred: Tensor, eps: float | None) -> Tensor:
    norm = torch.linalg.vector_norm(centred, dim=_AXES, keepdim=True)
    if eps is None:
        return norm.clamp_min(MIN_NORM)
    return (norm.square() + eps * centred[0].numel()).sqrt()


class _Standardise(torch.autograd.Function):
    """Keeps two numbers of each output for the way back, where autograd would keep copies of the
    weights, and needs half of its passes over them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, eps: float | None) -> Tensor:
        mean = weight.mean(_AXES, keepdim=True)
        centred = weight - mean
        norm = _norms(centred, eps)
        ctx.eps = eps
        ctx.save_for_backward(weight, factor, mean, norm)
        return centred.mul_(factor / norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, factor, mean, norm = ctx.saved_tensors
        if torch.is_grad_enabled() or weight.device.type not in _BATCH_NORM_KNOWN:
            return *_differentiable_gradients(weight, factor, grad, ctx.eps), None
        # Batch norm's own way back, in two passes, is this one for rows as channels: the square
        # root of the variance is norm / sqrt(size). Where the bound stands instead, a constant,
        # nothing is to flow through the variance: as through one that is very large.
        size = weight[0].numel()
        inverse_std = size**0.5 / norm
        if ctx.eps is None:
            inverse_std = torch.where(norm > MIN_NORM, inverse_std, _NEARLY_ZERO)
        rows = _rows(weight)
        into, along, _ = torch.ops.aten.native_batch_norm_backward(
            _rows(grad, like=weight),
            rows,
            (factor / (norm * inverse_std)).flatten(),
            None,
            None,
            mean.flatten(),
            inverse_std.flatten(),
            True,
            0.0,
            [True, True, False],
        )
        return _unrows(into, weight), along.view_as(norm) / (norm * inverse_std), None


def _differentiable_gradients(
    weight: Tensor, factor: Tensor, grad: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Of the weights and the factor, by operations that have gradients of their own."""
    centred = weight - weight.mean(_AXES, keepdim=True)
    norm = _norms(centred, eps)
    along = (grad * centred).sum(_AXES, keepdim=True) / norm
    pull = along / norm
    if eps is None:
        pull = torch.where(norm > MIN_NORM, pull, 0.0)
    into = (grad - grad.mean(_AXES, keepdim=True) - centred * pull) * (factor / norm)
    return into, along


def _rows(x_OIHW: Tensor, like: Tensor | None = None) -> Tensor:
    """(1, O, fan-in), without a copy of a kernel in either layout of memory.

    Args:
        like: a kernel whose order within the rows it is to have.
    """
    if not (x_OIHW if like is None else like).is_contiguous():
        x_OIHW = x_OIHW.permute(0, 2, 3, 1)
    return x_OIHW.reshape(1, len(x_OIHW), -1)


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    if like.is_contiguous():
        return rows.view_as(like)
    height, width, channels = like.shape[2], like.shape[3], like.shape[1]
    return rows.view(len(like), height, width, channels).permute(0, 3, 1, 2)
