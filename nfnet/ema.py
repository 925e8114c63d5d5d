"""Exponential moving average of a model's weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nfnet.agc import at_least_float32


class EMA:
    """Keeps a slowly following copy of a model, to evaluate instead of it.

    `shadow = d * shadow + (1 - d) * model` with `d = min(decay, (1 + step) / (10 + step))`,
    for parameters and floating-point buffers; other buffers are copied.

    Args:
        model: the model; its state at this moment is where the average starts.
        decay: d in the long run.

    Attributes:
        model: the averaged copy, in evaluation mode, its parameters without gradient; in float32
            where the model is in half precision, in which a step so small would be rounded away.

    Raises:
        ValueError: `decay` is not in [0, 1).

    Source: arXiv 2102.06171, section 5; the early steps' smaller decay is the authors' code's.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay is {decay}, expected a number in [0, 1); the paper uses 0.99999."
            )
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for tensor in _tensors(self.model):
            tensor.data = at_least_float32(tensor.data)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the model. Call it after each optimizer step.

        Args:
            model: the model being trained.
            step: index of the optimizer step just taken, from 0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows: list[Tensor] = []
        sources: list[Tensor] = []
        for shadow, source in zip(_tensors(self.model), _tensors(model), strict=True):
            if shadow.is_floating_point():
                shadows.append(shadow)
                sources.append(source.to(shadow.dtype))
            else:
                shadow.copy_(source)
        torch._foreach_lerp_(shadows, sources, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's parameters and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.model.load_state_dict(state_dict)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
