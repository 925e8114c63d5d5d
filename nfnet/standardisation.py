"""Scaled weight standardisation (arXiv 2102.06171, equation 1), and its gradient in few passes."""

from typing import Any

import torch
from torch import Tensor

MIN_NORM = 1e-2
"""The authors' lower bound of a centred kernel's norm: the square root of their 1e-4."""

_AXES = (1, 2, 3)


def standardise(weight_OIHW: Tensor, factor_O111: Tensor, eps: float | None = None) -> Tensor:
    """A kernel with mean 0 over every output's fan-in and `factor` as its norm.

    `(w - mean) * factor / max(|w - mean|, 1e-2)`, and with `eps`
    `(w - mean) * factor / sqrt(|w - mean|^2 + eps * fan_in)`, as timm does.

    Args:
        weight_OIHW: in float32 or float64.
        factor_O111: of the same type.
    """
    kernel: Tensor = _Standardise.apply(weight_OIHW, factor_O111, eps)[0]
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

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, factor: Tensor, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
        mean = weight.mean(_AXES, keepdim=True)
        centred = weight - mean
        norm = _norms(centred, eps)
        return centred.mul_(factor / norm), mean, norm

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, float | None], output: tuple[Tensor, ...]
    ) -> None:
        weight, factor, ctx.eps = inputs
        _, mean, norm = output
        ctx.mark_non_differentiable(mean, norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, factor, mean, norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        weight, factor, mean, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a derivative of this one they are no constants
            mean = weight.mean(_AXES, keepdim=True)
            norm = _norms(weight - mean, ctx.eps)
        centred = weight - mean
        along = (grad * centred).sum(_AXES, keepdim=True) / norm  # of the kernel's direction
        if not ctx.needs_input_grad[0]:
            return None, along, None
        scale = factor / norm
        pull = scale * along / norm
        if ctx.eps is None:
            pull = torch.where(norm > MIN_NORM, pull, 0.0)  # a bound is a constant
        into = torch.addcmul(-scale * grad.mean(_AXES, keepdim=True), grad, scale)
        return torch.addcmul(into, centred, pull, value=-1), along, None
