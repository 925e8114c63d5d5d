"""What a feed gives, a worker's whole slice at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nflab.data.batches import Batch, standardise
from nflab.data.dataset import Dataset, Split
from nflab.data.feed import Feed, Part
from nflab.settings.config import Config
from nflab.settings.leaves import replace


def train_batches(
    dataset: Dataset, config: Config, epoch: int, rank: int, world_size: int, loaders: int = 0
) -> Iterator[Batch]:
    """A worker's slices of an epoch's batches."""
    feed = Feed(dataset, config, [Part("train", epoch)], rank, world_size, loaders)
    for chunks in feed.train(epoch):
        parts = list(chunks)
        yield Batch(
            torch.cat([part.images_NCHW for part in parts]),
            torch.cat([part.targets_NK for part in parts]),
            torch.cat([part.places_N for part in parts]),
            sum(part.replaced for part in parts),
        )


def eval_batches(
    dataset: Dataset, split: Split, batch_size: int, rank: int, world_size: int, loaders: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """A worker's share of a split: standardised images and labels."""
    config = replace(Config(), batch_size=batch_size)
    feed = Feed(dataset, config, [Part(split)], rank, world_size, loaders)
    for images, labels in feed.evaluation(split):
        yield standardise(images, dataset.mean, dataset.std), labels
