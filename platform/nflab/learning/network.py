"""A model as it is trained: on all workers, in pieces that fit, in the arithmetic asked for."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nflab.data import Dataset
from nflab.data.batches import Batch, regroup, standardise
from nflab.settings.config import Config


def memory_format(config: Config) -> torch.memory_format:
    """How images and kernels lie in memory."""
    return torch.channels_last if config.precision.channels_last else torch.contiguous_format


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Activations in bfloat16 if the configuration says so; parameters stay as they are."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision.precision == "bfloat16"
    )


class Network:
    """Computes gradients of global batches into the parameters of a model.

    Args:
        dataset: whose images it is given.
        model: the model, on its device.
        world_size: processes that compute each batch together.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        device: torch.device,
        world_size: int,
    ) -> None:
        self._config, self._device, self._world_size = config, device, world_size
        self._mean, self._std = dataset.mean.to(device), dataset.std.to(device)
        self._parallel = DistributedDataParallel(model) if world_size > 1 else None
        self._call: nn.Module = self._parallel or model
        if config.precision.compile:
            self._call = torch.compile(self._call)  # type: ignore[assignment]

    def add_gradient(
        self,
        chunks: Iterable[Batch],
        images: int,
        keys_of: Callable[[Tensor], Tensor],
        size: int,
    ) -> Tensor:
        """Adds this worker's images' part of a mean loss to the gradients, and all workers' parts.

        Args:
            chunks: a slice of a global batch; it may be empty.
            images: how many it has.
            keys_of: from places in the global batch to keys for dropout and stochastic depth.
            size: images of the global batch, over which the loss is averaged.

        Returns:
            This worker's part of the mean loss, 0-d, float64, on the device.
        """
        piece_size = self._config.scale.micro_batch_size or max(images, 1)
        count = max(1, math.ceil(images / piece_size))
        # Chunk by chunk, the next on its way while this one is computed.
        tensors = (
            (
                chunk.images_NCHW.to(self._device, non_blocking=True),
                chunk.targets_NK.to(self._device, non_blocking=True),
                chunk.places_N,
            )
            for chunk in chunks
        )
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, piece in enumerate(regroup(tensors, piece_size), start=1):
            images_NCHW, targets_NK, places_N = piece
            # Workers exchange gradients once, with the last piece.
            waits = self._parallel is not None and number < count
            with self._parallel.no_sync() if waits and self._parallel else nullcontext():
                with autocast(self._config, self._device):
                    logits_NK = self._call(
                        self._prepared(images_NCHW), keys_of(places_N).to(self._device)
                    )
                losses_N = F.cross_entropy(logits_NK.float(), targets_NK, reduction="none")
                loss = losses_N.sum() / size
                # DDP averages over workers; their parts are to be added.
                (loss * self._world_size).backward()
            total += loss.detach()
        return total

    def _prepared(self, images_NCHW: Tensor) -> Tensor:
        pixels = standardise(images_NCHW, self._mean, self._std)
        return pixels.to(memory_format=memory_format(self._config))


def part_of_batch(batch: Batch, batch_size: int, fraction: float) -> tuple[Batch, int]:
    """An evenly spread part of a global batch, the same however the batch is cut.

    Returns:
        What this worker's slice has of it, and how many images the whole part has, 1 at least.
    """
    size = max(1, int(batch_size * fraction))
    # Of the global batch, the places where a count from 0 to `size` goes up.
    kept_N = (batch.places_N + 1) * size // batch_size > batch.places_N * size // batch_size
    return Batch(batch.images_NCHW[kept_N], batch.targets_NK[kept_N], batch.places_N[kept_N]), size
