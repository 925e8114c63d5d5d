"""Sharpness-aware minimisation around any optimizer."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from nfnet.agc import at_least_float32


class SAM:
    """Takes the gradient of a step not at the weights but where the loss nearby is highest.

    >>> loss(batch).backward()     # may be a part of the batch, in as many pieces as one likes
    >>> sam.ascend()               # w + rho * g / ||g||; gradients are cleared
    >>> loss(batch).backward()
    >>> sam.step()                 # back at w, the optimizer steps with the new gradient

    What stands in `p.grad` when `ascend` is called decides, so accumulated gradients and those
    that DDP has averaged over workers are right as they are.

    Args:
        optimizer: takes the steps.
        rho: how far to look, the norm of the weights' displacement.

    Raises:
        ValueError: `rho` is not positive.

    Source: arXiv 2010.01412, algorithm 1; arXiv 2102.06171, section 5, with rho 0.05 and the ascent
    on a part of the batch.
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.05) -> None:
        if not rho > 0:
            raise ValueError(f"rho is {rho}, expected a number above 0; the paper uses 0.05.")
        self.optimizer = optimizer
        self.rho = rho
        self._origin: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """Move the weights by rho along the gradient, and clear the gradients.

        Raises:
            RuntimeError: the weights are displaced already.
        """
        if self._origin:
            raise RuntimeError("ascend was called twice; call step() in between.")
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        if params:
            grads = [p.grad for p in params if p.grad is not None]
            # The origin is kept, not computed back: rounding would move the weights.
            self._origin = [(p, p.clone()) for p in params]
            # Squares of half precision would overflow, and their steps vanish.
            wide = [at_least_float32(g) for g in grads]
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(wide)))
            torch._foreach_add_(params, torch._foreach_mul(wide, self.rho / (total + 1e-12)))
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Return to the weights that `ascend` left, and let the optimizer step."""
        for p, origin in self._origin:
            p.copy_(origin)
        self._origin = []
        self.optimizer.step()
