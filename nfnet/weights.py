"""Weights into a model: all of them or none, and what differs where they do not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_SHOWN = 8
"""Differences of a kind that are named."""


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model that has exactly these; on error, leave it as it is.

    Args:
        model: the model, whose parameters keep their type and device.
        weights: a tensor for each parameter and buffer.
        source: what to call the weights in a complaint.

    Raises:
        ValueError: a tensor is missing, unexpected or mis-shaped; the message lists which.
    """
    wanted = model.state_dict()
    # One number may have one dimension or none; see `ResNet.gains_as_vectors`.
    weights = {
        name: weight.view(wanted[name].shape)
        if weight.numel() == 1 and name in wanted and wanted[name].numel() == 1
        else weight
        for name, weight in weights.items()
    }
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    other_shape = [
        f"{name}: {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
    if any(found.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items() if names)
        lines = [f"{source} do not fit the model ({counts} of {len(wanted)} tensors):"]
        for kind, names in found.items():
            lines += [f"  {kind}: {name}" for name in names[:_SHOWN]]
            if len(names) > _SHOWN:
                lines.append(f"  {kind}: {len(names) - _SHOWN} more")
        lines.append("create the model that they were saved from, with its number of classes.")
        raise ValueError("\n".join(lines))
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])
