"""From a dataset to the batches of one epoch: one worker's slice of each global batch.

Everything random is a function: the order of (seed, epoch); an image's crop and operations of
(seed, epoch, sample); its partner and their mixing of (seed, epoch, place in the global batch). So
the same images meet the same network however a batch is cut and wherever a run resumes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Items

from nflab.data.dataset import Dataset, DatasetError, Split, UnreadableImage
from nflab.data.mix import draw_mixing, mix, neighbours
from nflab.data.randaugment import rand_augment
from nflab.settings.config import Config
from nflab.settings.streams import Stream, keys


@dataclass(frozen=True)
class Batch:
    """One worker's slice of one global batch."""

    images_NCHW: Tensor
    """float32, standardised with the dataset's mean and deviation."""
    targets_NK: Tensor
    """Probability of each class: one-hot, mixed, then smoothed."""
    places_N: Tensor
    """Place of each image in the global batch."""
    replaced: int = 0
    """Places whose own image cannot be read."""


def cut(size: int, rank: int, world_size: int) -> slice:
    """The part of `size` items that worker `rank` takes; parts differ by one item at most."""
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def train_batches(
    dataset: Dataset, config: Config, epoch: int, rank: int, world_size: int, loaders: int = 0
) -> Iterator[Batch]:
    """One worker's slices of the global batches of an epoch, in order.

    The last images of the epoch's order, too few for a whole batch, wait for another epoch's order.

    Args:
        loaders: processes that make batches ahead of time; 0 makes them when they are asked for.
    """
    size, batch_size = dataset.sizes["train"], config.optimizer.batch_size

    def order(stream: Stream) -> Tensor:
        return keys(config.run.seed, stream, epoch, torch.arange(size)).argsort()

    fresh = _mixes(config) and config.augmentation.partners == "fresh"
    make = partial(
        _train_batch,
        dataset,
        config,
        epoch,
        order(Stream.ORDER),
        order(Stream.PARTNER_ORDER) if fresh else None,
        rank,
        world_size,
    )
    return _in_order(make, size // batch_size, loaders)


def _mixes(config: Config) -> bool:
    return config.augmentation.mixup or config.augmentation.cutmix


def _train_batch(
    dataset: Dataset,
    config: Config,
    epoch: int,
    order: Tensor,
    partner_order: Tensor | None,
    rank: int,
    world_size: int,
    step: int,
) -> Batch:
    """A worker's slice of one global batch: a function of the arguments alone."""
    seed, batch_size = config.run.seed, config.optimizer.batch_size
    augmentation, classes = config.augmentation, len(dataset.class_names)
    own = torch.arange(batch_size)[cut(batch_size, rank, world_size)]

    def crop(
        places_N: Tensor, order: Tensor = order, stream: Stream = Stream.CROP
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

    if not _mixes(config):
        images, labels, indices = crop(own)
        targets = F.one_hot(labels, classes).double()
    else:
        if partner_order is not None:
            images, labels, indices = crop(own)
            partners, partner_labels, _ = crop(own, partner_order, Stream.PARTNER_CROP)
        else:
            partner_N = neighbours(own, batch_size)
            read = torch.cat((own, partner_N)).unique()  # at either end may be another worker's
            all_images, all_labels, all_indices = crop(read)
            at_N, partner_at_N = (torch.searchsorted(read, places) for places in (own, partner_N))
            images, labels, indices = all_images[at_N], all_labels[at_N], all_indices[at_N]
            partners, partner_labels = all_images[partner_at_N], all_labels[partner_at_N]
        mix_keys = keys(seed, Stream.MIX, epoch, step * batch_size + own)
        mixing = draw_mixing(mix_keys, own, batch_size, augmentation.mixup, augmentation.cutmix)
        images, share_N = mix(images, partners, mixing)
        one_hot, partner_one_hot = (F.one_hot(of, classes) for of in (labels, partner_labels))
        targets = share_N[:, None] * one_hot + (1 - share_N[:, None]) * partner_one_hot
    images = rand_augment(
        images,
        keys(seed, Stream.AUGMENT, epoch, indices),
        augmentation.augmentation_layers,
        augmentation.augmentation_level,
    )
    smoothing = config.optimizer.label_smoothing
    targets = (1 - smoothing) * targets + smoothing / classes
    replaced = int((indices != order[step * batch_size + own]).sum())
    return Batch(standardise(images, dataset), targets.float(), own, replaced)


@functools.cache
def _tell(text: str) -> None:
    """Prints it, once."""
    print(text, flush=True)


def eval_batches(
    dataset: Dataset,
    split: Split,
    batch_size: int,
    rank: int,
    world_size: int,
    loaders: int = 0,
    skips: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One worker's share of a split, each image once: standardised images and labels (N,).

    Args:
        skips: leave out images that cannot be read.
    """
    own = torch.arange(dataset.sizes[split])[cut(dataset.sizes[split], rank, world_size)]
    pieces = own.split(batch_size) if len(own) else ()
    return _in_order(partial(_eval_batch, dataset, split, skips, pieces), len(pieces), loaders)


def _eval_batch(
    dataset: Dataset, split: Split, skips: bool, pieces: Sequence[Tensor], number: int
) -> tuple[Tensor, Tensor]:
    indices_N = pieces[number]
    while len(indices_N):
        try:
            images, labels = dataset.eval_images(split, indices_N)
            return standardise(images, dataset), labels
        except UnreadableImage as damaged:
            if not skips:
                raise
            _tell(f"{damaged}: the {split} split is evaluated without it")
            indices_N = indices_N[indices_N != damaged.index]
    return torch.empty(0, *dataset.image_shape), torch.empty(0, dtype=torch.long)


T = TypeVar("T")


class _Made(Items[T], Generic[T]):
    """Items of a `DataLoader` that a function makes from their numbers."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> T:
        return self._make(number)


def _in_order(make: Callable[[int], T], count: int, loaders: int) -> Iterator[T]:
    if loaders == 0 or count == 0:
        return map(make, range(count))
    loader: DataLoader[T] = DataLoader(
        _Made(make), batch_size=None, sampler=range(count), num_workers=min(loaders, count)
    )
    return iter(loader)


def standardise(images_NCHW: Tensor, dataset: Dataset) -> Tensor:
    """uint8 pixels as float32 with mean 0 and deviation 1 per channel over the training images."""
    mean, std = (s[:, None, None] for s in (dataset.mean, dataset.std))
    return (images_NCHW.float() / 255 - mean) / std
