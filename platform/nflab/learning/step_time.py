"""How long a training step takes: forward, backward and the optimizer's pass, measured."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import nfnet

EFFICIENTNET = "efficientnet_"
"""What the names of torchvision's EfficientNets begin with."""


def train_size(name: str) -> int:
    """Pixels along each side of the images that a model is trained on by its authors.

    Raises:
        ValueError: there is no such model.
    """
    if name.startswith(EFFICIENTNET):
        # Its evaluation crop, which is its training size too (arXiv 1905.11946).
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return int(weights.transforms().crop_size[0])
    return nfnet.preprocessing(name).train_size


def step_seconds(name: str, batch_size: int, device: torch.device, bfloat16: bool) -> float:
    """Seconds of one step on random images of the model's own size, after one that warms up.

    NFNets and NF-ResNets are trained by `SGD_AGC`, others by PyTorch's SGD, both with Nesterov's
    momentum; no average is kept.

    Args:
        name: one of `nfnet.list_models()`, or torchvision's name of an EfficientNet.
        bfloat16: activations in bfloat16.

    Raises:
        ValueError: there is no such model.
    """
    size = train_size(name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(device)
    labels = torch.randint(1000, (batch_size,), generator=generator).to(device)
    model, update = _trained(name, device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        update()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _trained(name: str, device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
    """A model in training mode, and its optimizer's pass."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    if name.startswith(EFFICIENTNET):
        model = torchvision.models.get_model(name).to(device).train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=True
        )
    else:
        model = nfnet.create_model(name).to(device).train()
        # The batch-normalised twin is not clipped.
        clipping = None if model.variant.batch_norm else 0.01
        groups = nfnet.param_groups(model, weight_decay=2e-5, clipping=clipping)
        optimizer = nfnet.SGD_AGC(groups, lr=1e-4, momentum=0.9)
    return model, optimizer.step
