"""A model as it is trained: on all workers, in pieces that fit, in the arithmetic asked for."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nfnet
from nflab.data import Dataset
from nflab.data.batches import Batch, regroup, standardise
from nflab.learning.memory import is_full
from nflab.settings.config import Config


def memory_format(config: Config) -> torch.memory_format:
    """How images and kernels lie in memory."""
    return torch.channels_last if config.precision.channels_last else torch.contiguous_format


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Activations in bfloat16 if the configuration says so; parameters stay as they are."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision.precision == "bfloat16"
    )


def use_arithmetic(config: Config) -> None:
    """Lets PyTorch use only algorithms that repeat to the bit, or all; and on a GPU round the
    products of float32 to TF32, or not, which it does in convolutions unless told."""
    repeats = config.scale.deterministic
    if repeats:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(repeats)
    torch.backends.cudnn.deterministic = repeats
    _allow_tf32(config.precision.precision == "tf32")


@contextmanager
def in_float32() -> Iterator[None]:
    """Computes in float32 itself."""
    allowed = torch.backends.cudnn.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        _allow_tf32(allowed)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


class Network:
    """Computes gradients of global batches into the parameters of a model.

    Attributes:
        micro_batch_size: images that are computed at once.

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
        self._model, self._image_shape = model, dataset.image_shape
        slice_size = math.ceil(config.optimizer.batch_size / world_size)
        self.micro_batch_size = min(slice_size, config.scale.micro_batch_size or slice_size)
        self._mean, self._std = dataset.mean.to(device), dataset.std.to(device)
        self._parallel: DistributedDataParallel | None = None
        if world_size > 1:
            # Buffers are the same on all: batch norm's are of the whole batch.
            self._parallel = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._call: nn.Module = self._parallel or model
        if config.precision.compile:
            self._call = torch.compile(self._call)  # type: ignore[assignment]

    @property
    def adapts(self) -> bool:
        """Whether it may compute fewer images at once: on a GPU, but for batch norm, which has to
        see them all."""
        if self._device.type != "cuda":
            return False
        return not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in self._model.modules())

    @property
    def fewer(self) -> int | None:
        """Images that it may compute at once when memory runs out; None if nothing would help."""
        helps = self.adapts and self.micro_batch_size > 1
        return math.ceil(self.micro_batch_size / 2) if helps else None

    def fit_into_memory(self, copies: int) -> None:
        """Cuts a worker's slice of a batch in 1, 2, 4, ... pieces, the first that all workers'
        memory holds; nothing else changes.

        Args:
            copies: of all parameters, for which memory is needed beside.

        Raises:
            torch.OutOfMemoryError: not even one image fits.
        """
        slice_size, pieces = self.micro_batch_size, 1
        # Of three pieces or more the kernels' gradients are gathered beside the weights'.
        while not self._fits(copies + (pieces > 2)):
            pieces *= 2
            self.micro_batch_size = math.ceil(slice_size / pieces)
        if pieces > 1:
            print(f"a slice of {slice_size} images is computed in {pieces} pieces, for memory")

    def _fits(self, copies: int) -> bool:
        """Whether all workers' memory holds a piece; its gradients are thrown away."""
        size, full = self.micro_batch_size, None
        count = copies * sum(p.numel() for p in self._model.parameters())
        sync = self._parallel.no_sync() if self._parallel else nullcontext()
        try:
            with sync, autocast(self._config, self._device):
                beside = torch.empty(count, device=self._device)
                images = torch.zeros(size, *self._image_shape, dtype=torch.uint8).to(self._device)
                keys_N = torch.zeros(size, dtype=torch.int64, device=self._device)
                self._call(self._prepared(images), keys_N).float().logsumexp(1).sum().backward()
                del beside
        except RuntimeError as error:
            if not is_full(error) or (size == 1 and self._world_size == 1):
                raise
            full = error.with_traceback(None)
        self._model.zero_grad()
        if full is not None and self._device.type == "cuda":
            torch.cuda.empty_cache()
        told = torch.tensor(float(full is not None), device=self._device)
        if self._world_size > 1:
            dist.all_reduce(told)
        if told > 0 and size == 1:
            raise full or torch.OutOfMemoryError("another worker's memory holds no image")
        return not bool(told)

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
        piece_size = self.micro_batch_size
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
        with ExitStack() as before_last:
            if count > 1 and self._parallel is not None:
                # Workers exchange gradients once, with the last piece.
                before_last.enter_context(self._parallel.no_sync())
            if count > 2 and not self._config.precision.compile:  # the last has kernels of its own
                before_last.enter_context(nfnet.kernels_kept(self._model))
            for number, piece in enumerate(regroup(tensors, piece_size), start=1):
                images_NCHW, targets_NK, places_N = piece
                if number == count:
                    before_last.close()
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
