"""What a user of timm would write: its models, its clipping, torch's optimizer, its average."""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

import nfnet

SGDS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
"""torch.optim.SGD's three ways."""

WEIGHT_DECAY, CLIPPING, DECAY = 2e-5, 0.01, 0.9999


def timms_pass(model: nn.Module, way: str) -> Callable[[], None]:
    """timm's clipping of all but the classifier, torch's Nesterov SGD, timm's moving average."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [
            {"params": others, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
        ],
        lr=1e-4,
        momentum=0.9,
        nesterov=True,
        **SGDS[way],
    )
    average = ModelEmaV3(model, decay=DECAY)
    clipped = [p for name, p in model.named_parameters() if "head" not in name]

    def step() -> None:
        adaptive_clip_grad(clipped, CLIPPING)
        optimizer.step()
        average.update(model)

    return step


def our_pass(model: nn.Module) -> Callable[[], None]:
    """The same by this library."""
    groups = nfnet.param_groups(model, WEIGHT_DECAY, CLIPPING)
    optimizer, average = nfnet.SGD_AGC(groups, lr=1e-4, momentum=0.9), nfnet.EMA(model, DECAY)

    def step() -> None:
        optimizer.step()
        average.update(model, 100_000)

    return step


def give_gradients(model: nn.Module) -> None:
    """Gradients of which AGC clips some."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, device=p.device)
        p.grad = noise * (0.01 * p.detach().norm() / p.numel() ** 0.5 + 1e-6)


def training_step(
    model: nn.Module,
    update: Callable[[], None],
    images: Tensor,
    labels: Tensor,
    pieces: int = 1,
    bfloat16: bool = False,
) -> Callable[[], None]:
    """Forward, backward and an update; of several pieces their gradients add up, with kernels kept
    for all but the last as `nflab` does."""

    def gradient(part: slice) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images[part])
        (F.cross_entropy(logits.float(), labels[part], reduction="sum") / len(images)).backward()

    def step() -> None:
        model.zero_grad()
        size = len(images) // pieces
        parts = [slice(n * size, (n + 1) * size) for n in range(pieces)]
        if pieces > 2:
            with nfnet.kernels_kept(model):
                for part in parts[:-1]:
                    gradient(part)
            parts = parts[-1:]
        for part in parts:
            gradient(part)
        update()

    return step


def a_batch(model: nn.Module, count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images and labels, in the layout of the model's kernels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(1000, (count,), generator=generator)
    first = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return images.to(device, memory_format=layout), labels.to(device)


def timms(name: str) -> nn.Module:
    """timm's model of a name, in training mode."""
    model: nn.Module = timm.create_model(name).train()
    return model
