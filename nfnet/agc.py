"""Adaptive gradient clipping (arXiv 2102.06171, section 4.1, equation 3)."""

from collections.abc import Iterable

import torch
from torch import Tensor

_MIN_GRAD_NORM = 1e-6


@torch.no_grad()
def adaptive_clip_grad_(
    params: Tensor | Iterable[Tensor],
    clipping: float,
    eps: float = 1e-3,
    ratios: dict[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """Clip every unit's gradient, in place, to `clipping` times the norm of its weights.

    `G_i <- clipping * max(||W_i||, eps) / ||G_i|| * G_i` where `||G_i||` is larger than
    `clipping * max(||W_i||, eps)`. A unit is one output (one index of the first axis) of a
    weight; a parameter with at most one axis longer than 1 (scalar, bias, gain) is one unit
    as a whole, as in the authors' code. Norms of half-precision tensors are taken in float32.

    Args:
        params: one parameter or several, all on one device; those without gradient are skipped.
        clipping: largest allowed ratio of gradient norm to weight norm (lambda in the paper).
        eps: lower bound of the weight norm, so that weights at zero can move.
        ratios: if given, takes for each such parameter the ratio of gradient norm to weight norm
            of its units (num_units,), as they were before clipping; a ratio is negative where the
            weight norm stood at `eps`.

    Returns:
        For each parameter with a gradient, in order, the share of its units that were clipped:
        0-d tensors on the parameters' device (reading them is left to the caller).

    Raises:
        ValueError: `clipping` is not positive.
    """
    if not clipping > 0:
        raise ValueError(
            f"clipping is {clipping}, expected a number above 0; "
            "skip the call (or pass clipping=None to SGD_AGC) to train without clipping."
        )
    given = [params] if isinstance(params, Tensor) else params
    weights = [p for p in given if p.grad is not None]
    share: dict[Tensor, Tensor] = {}

    whole = [p for p in weights if _is_one_unit(p)]
    if whole:
        grads = _grads(whole)
        grad_norm, weight_norm = torch.stack(_norms(grads)), torch.stack(_norms(whole))
        scale, is_clipped = _scale(grad_norm, weight_norm, clipping, eps)
        if ratios is not None:
            found = _ratios(grad_norm, weight_norm, eps)
            ratios.update(zip(whole, found.split(1), strict=True))
        torch._foreach_mul_(grads, scale.unbind())
        share.update(zip(whole, is_clipped.unbind(), strict=True))

    many = [p for p in weights if not _is_one_unit(p)]
    if many:
        grads = _grads(many)
        # The units of all parameters in one vector: few operations, however many parameters.
        grad_norm, weight_norm = torch.cat(_row_norms(grads)), torch.cat(_row_norms(many))
        scale, is_clipped = _scale(grad_norm, weight_norm, clipping, eps)
        sizes = [len(p) for p in many]
        if ratios is not None:
            found = _ratios(grad_norm, weight_norm, eps)
            ratios.update(zip(many, found.split(sizes), strict=True))
        rows = zip(torch.split(scale, sizes), many, strict=True)
        torch._foreach_mul_(grads, [s.view(-1, *[1] * (p.ndim - 1)) for s, p in rows])
        # The 1-norm of zeros and ones counts the ones.
        counts = torch._foreach_norm(torch.split(is_clipped, sizes), 1)
        share.update(zip(many, torch._foreach_div(counts, sizes), strict=True))
    return [share[p] for p in weights]


def num_units(p: Tensor) -> int:
    """How many units of a parameter `adaptive_clip_grad_` clips each by itself."""
    return 1 if _is_one_unit(p) else len(p)


def _is_one_unit(p: Tensor) -> bool:
    return sum(size > 1 for size in p.shape) <= 1


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor of half precision as float32; any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, 0-d."""
    return list(torch._foreach_norm([at_least_float32(x) for x in tensors]))


def _row_norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norms over all axes but the first, one vector per tensor."""
    return [
        torch.linalg.vector_norm(at_least_float32(x), dim=tuple(range(1, x.ndim))) for x in tensors
    ]


def _ratios(grad_norm: Tensor, weight_norm: Tensor, eps: float) -> Tensor:
    """What clipping compares with its threshold; negative where the weight norm stood at eps."""
    ratio = grad_norm / weight_norm.clamp_min(eps)
    # Adding 0 to a norm of -0.0 would lose the sign: a hair below zero keeps it.
    return torch.where(weight_norm > eps, ratio, -ratio.clamp_min(torch.finfo(ratio.dtype).tiny))


def _scale(
    grad_norm: Tensor, weight_norm: Tensor, clipping: float, eps: float
) -> tuple[Tensor, Tensor]:
    """What to multiply each unit's gradient by, and 1 where that clips it, else 0."""
    largest = weight_norm.clamp_min(eps) * clipping
    is_clipped = grad_norm > largest
    scale = torch.where(is_clipped, largest / grad_norm.clamp_min(_MIN_GRAD_NORM), 1.0)
    return scale, is_clipped.to(scale.dtype)
