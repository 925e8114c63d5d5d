"""The exact batches of an experiment, in chunks.

Everything random is a function: the order of (seed, epoch); an image's crop and operations of
(seed, epoch, sample); its partner and their mixing of (seed, epoch, place in the global batch). So
the same images meet the same network however a batch is cut and wherever a run resumes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nflab.data.dataset import Dataset, DatasetError, Split, UnreadableImage
from nflab.data.mix import draw_mixing, mix, neighbours
from nflab.data.randaugment import rand_augment
from nflab.settings.config import Config
from nflab.settings.streams import Stream, keys


@dataclass(frozen=True)
class Batch:
    """Images of one global batch: a worker's slice of it, or a chunk of that."""

    images_NCHW: Tensor
    """uint8, cropped, mixed and augmented."""
    targets_NK: Tensor
    """Probability of each class: one-hot, mixed, then smoothed."""
    places_N: Tensor
    """Place of each image in the global batch."""
    replaced: int = 0
    """Places whose own image cannot be read."""

    def pin_memory(self) -> "Batch":
        """The same, where a GPU can fetch it by itself; a `DataLoader` calls this."""
        images, targets = self.images_NCHW.pin_memory(), self.targets_NK.pin_memory()
        return Batch(images, targets, self.places_N, self.replaced)


@dataclass(frozen=True)
class Crops:
    """Images of one global batch as they were cropped, to be mixed and augmented."""

    images_NCHW: Tensor
    """uint8."""
    labels_N: Tensor
    indices_N: Tensor
    """In the split."""
    partners_NCHW: Tensor | None
    """Images that they are mixed with, if they are."""
    partner_labels_N: Tensor | None
    places_N: Tensor
    """Place of each image in the global batch."""
    epoch: int
    step: int
    """Of the epoch."""
    replaced: int
    """Places whose own image cannot be read."""

    def pin_memory(self) -> "Crops":
        """The same, where a GPU can fetch it by itself; a `DataLoader` calls this."""
        return self._with(lambda images: images.pin_memory())

    def to(self, device: torch.device) -> "Crops":
        """The same with the images on a device."""
        return self._with(lambda images: images.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Crops":
        partners = None if self.partners_NCHW is None else change(self.partners_NCHW)
        return replace(self, images_NCHW=change(self.images_NCHW), partners_NCHW=partners)


def cut(size: int, rank: int, world_size: int) -> slice:
    """The part of `size` items that worker `rank` takes; parts differ by one item at most."""
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def regroup(chunks: Iterable[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The same items in groups of `size`, of which the last may be smaller; one at least.

    Args:
        chunks: tensors whose first dimension counts the items, as many in each of a chunk.
    """
    held: list[tuple[Tensor, ...]] = []
    count, yielded = 0, False
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk[0])
        while count >= size:
            whole = _joined(held)
            yield tuple(tensor[:size] for tensor in whole)
            yielded = True
            held, count = [tuple(tensor[size:] for tensor in whole)], count - size
    if count or not yielded:
        yield _joined(held)


def _joined(chunks: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*chunks, strict=True))) if len(chunks) > 1 else chunks[0]


@dataclass(frozen=True)
class Order:
    """The orders of one epoch, functions of the configuration and the epoch alone."""

    config: Config
    epoch: int
    size: int
    """Images of the split."""

    @functools.cached_property
    def own(self) -> Tensor:
        """Image at each place of the epoch."""
        return self._draw(Stream.ORDER)

    @functools.cached_property
    def partners(self) -> Tensor | None:
        """Image that is mixed with the one at each place, if such are read for that alone."""
        fresh = mixes(self.config) and self.config.augmentation.partners == "fresh"
        return self._draw(Stream.PARTNER_ORDER) if fresh else None

    def _draw(self, stream: Stream) -> Tensor:
        seed = self.config.run.seed
        return keys(seed, stream, self.epoch, torch.arange(self.size)).argsort()


@functools.lru_cache(maxsize=2)
def order_of(config: Config, epoch: int, size: int) -> Order:
    """The orders of an epoch, which whoever reads many chunks of it draws once."""
    return Order(config, epoch, size)


def mixes(config: Config) -> bool:
    """Whether images are mixed with others."""
    return config.augmentation.mixup or config.augmentation.cutmix


def read_crops(dataset: Dataset, config: Config, epoch: int, step: int, places_N: Tensor) -> Crops:
    """The images at some places of a global batch: a function of the arguments alone.

    Raises:
        UnreadableImage: one cannot be read, and such are not skipped.
    """
    seed, batch_size = config.run.seed, config.optimizer.batch_size
    orders = order_of(config, epoch, dataset.sizes["train"])

    def crop(
        places_N: Tensor, order: Tensor = orders.own, stream: Stream = Stream.CROP
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and indices of what an order has at places of this batch."""
        at_N = step * batch_size + places_N
        for _ in range(len(order) + 1):
            indices_N = order[at_N % len(order)]
            try:
                keys_N = keys(seed, stream, epoch, indices_N)
                return *dataset.train_images(indices_N, keys_N), indices_N
            except UnreadableImage as damaged:
                if config.data.bad_images == "fail":
                    raise
                _tell(f"{damaged}: the next one takes its place")
                at_N = torch.where(indices_N == damaged.index, at_N + 1, at_N)
        raise DatasetError("no image can be read")

    partners = partner_labels = None
    if mixes(config) and orders.partners is None:
        partner_N = neighbours(places_N, batch_size)
        read = torch.cat((places_N, partner_N)).unique()  # at an end it may be of another chunk
        all_images, all_labels, all_indices = crop(read)
        at_N, partner_at_N = (torch.searchsorted(read, at) for at in (places_N, partner_N))
        images, labels, indices = all_images[at_N], all_labels[at_N], all_indices[at_N]
        partners, partner_labels = all_images[partner_at_N], all_labels[partner_at_N]
    else:
        images, labels, indices = crop(places_N)
        if orders.partners is not None:
            partners, partner_labels, _ = crop(places_N, orders.partners, Stream.PARTNER_CROP)
    replaced = int((indices != orders.own[step * batch_size + places_N]).sum())
    return Crops(images, labels, indices, partners, partner_labels, places_N, epoch, step, replaced)


def augmented(crops: Crops, config: Config, classes: int) -> Batch:
    """Mixes and augments images, where they are: the same on a CPU and on a GPU, but for pixels of
    rotated and sheared images that lie between two others."""
    seed, augmentation = config.run.seed, config.augmentation
    images, targets = crops.images_NCHW, F.one_hot(crops.labels_N, classes).double()
    if crops.partners_NCHW is not None and crops.partner_labels_N is not None:
        batch_size, places_N = config.optimizer.batch_size, crops.places_N
        mix_keys = keys(seed, Stream.MIX, crops.epoch, crops.step * batch_size + places_N)
        mixing = draw_mixing(
            mix_keys, places_N, batch_size, augmentation.mixup, augmentation.cutmix
        )
        images, share_N = mix(images, crops.partners_NCHW, mixing)
        partner_targets = F.one_hot(crops.partner_labels_N, classes)
        targets = share_N[:, None] * targets + (1 - share_N[:, None]) * partner_targets
    images = rand_augment(
        images,
        keys(seed, Stream.AUGMENT, crops.epoch, crops.indices_N),
        augmentation.augmentation_layers,
        augmentation.augmentation_level,
    )
    smoothing = config.optimizer.label_smoothing
    targets = (1 - smoothing) * targets + smoothing / classes
    return Batch(images, targets.float(), crops.places_N, crops.replaced)


def eval_chunk(
    dataset: Dataset, split: Split, indices_N: Tensor, skips: bool
) -> tuple[Tensor, Tensor]:
    """Images of a split as they are evaluated, uint8, and labels (N,).

    Args:
        skips: leave out images that cannot be read.

    Raises:
        UnreadableImage: one cannot be read, and such are not left out.
    """
    while len(indices_N):
        try:
            return dataset.eval_images(split, indices_N)
        except UnreadableImage as damaged:
            if not skips:
                raise
            _tell(f"{damaged}: the {split} split is evaluated without it")
            indices_N = indices_N[indices_N != damaged.index]
    empty = torch.empty(0, *dataset.image_shape, dtype=torch.uint8)
    return empty, torch.empty(0, dtype=torch.long)


@functools.cache
def _tell(text: str) -> None:
    """Prints it, once."""
    print(text, flush=True)


def standardise(images_NCHW: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """uint8 pixels as float32 with mean 0 and deviation 1 per channel over the training images."""
    mean, std = (s[:, None, None] for s in (mean_C, std_C))
    return (images_NCHW.float() / 255 - mean) / std
