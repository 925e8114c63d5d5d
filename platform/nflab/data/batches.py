"""From a dataset to the batches of one epoch: one worker's slice of each global batch.

Everything random is a function: the order of (seed, epoch); an image's crop and operations of
(seed, epoch, sample); its mixing of (seed, epoch, place in the global batch). So the same images
meet the same network however a batch is cut and wherever a run resumes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nflab.config import Config
from nflab.data.dataset import Dataset, Split
from nflab.data.mix import draw_mixing, mix
from nflab.data.randaugment import rand_augment
from nflab.streams import Stream, keys


@dataclass(frozen=True)
class Batch:
    """One worker's slice of one global batch."""

    images_NCHW: Tensor
    """float32, standardised with the dataset's mean and deviation."""
    targets_NK: Tensor
    """Probability of each class: one-hot, mixed, then smoothed."""
    places_N: Tensor
    """Place of each image in the global batch."""


def cut(size: int, rank: int, world_size: int) -> slice:
    """The part of `size` items that worker `rank` takes; parts differ by one item at most."""
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def train_batches(
    dataset: Dataset, config: Config, epoch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """One worker's slices of the global batches of an epoch, in order.

    The last images of the epoch's order, too few for a whole batch, wait for another epoch's order.
    """
    seed, batch_size = config.run.seed, config.optimizer.batch_size
    level, size = config.augmentation.augmentation_level, dataset.sizes["train"]
    mixup, cutmix = config.augmentation.mixup, config.augmentation.cutmix
    order = keys(seed, Stream.ORDER, epoch, torch.arange(size)).argsort()
    own = torch.arange(batch_size)[cut(batch_size, rank, world_size)]

    def crop(indices_N: Tensor) -> tuple[Tensor, Tensor]:
        return dataset.train_images(indices_N, keys(seed, Stream.CROP, epoch, indices_N))

    for step in range(size // batch_size):
        members = order[step * batch_size : (step + 1) * batch_size]
        images, labels = crop(members[own])
        targets = F.one_hot(labels, dataset.num_classes).double()
        if mixup or cutmix:
            mix_keys = keys(seed, Stream.MIX, epoch, step * batch_size + own)
            mixing = draw_mixing(mix_keys, own, batch_size, mixup, cutmix)
            partners, partner_labels = crop(members[mixing.partner_N])
            images, share_N = mix(images, partners, mixing)
            share = share_N[:, None]
            targets = share * targets + (1 - share) * F.one_hot(partner_labels, dataset.num_classes)
        images = rand_augment(images, keys(seed, Stream.AUGMENT, epoch, members[own]), level)
        smoothing = config.optimizer.label_smoothing
        targets = (1 - smoothing) * targets + smoothing / dataset.num_classes
        yield Batch(standardise(images, dataset), targets.float(), own)


def eval_batches(
    dataset: Dataset, split: Split, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One worker's share of a split, each image once: standardised images and labels (N,)."""
    for indices in torch.arange(dataset.sizes[split])[
        cut(dataset.sizes[split], rank, world_size)
    ].split(batch_size):
        images, labels = dataset.eval_images(split, indices)
        yield standardise(images, dataset), labels


def standardise(images_NCHW: Tensor, dataset: Dataset) -> Tensor:
    """uint8 pixels as float32 with mean 0 and deviation 1 per channel over the training images."""
    mean, std = (s[:, None, None] for s in (dataset.mean, dataset.std))
    return (images_NCHW.float() / 255 - mean) / std
