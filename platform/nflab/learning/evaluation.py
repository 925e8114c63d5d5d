"""Accuracy of a network over a split, on any number of workers."""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nflab.data import Dataset, load_dataset
from nflab.data.batches import eval_batches
from nflab.data.dataset import Split
from nflab.learning.models import build_model, check_model
from nflab.learning.network import autocast, memory_format
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.errors import require


def check_pretrained(config: Config) -> None:
    """Refuses pre-trained weights that cannot be evaluated on the dataset as they are.

    Raises:
        ConfigError: there are none, or they are those of another model or number of classes.
    """
    require(
        config.model.pretrained is not None, "nothing to evaluate: give --pretrained FILE or hub"
    )
    check_model(config, new_head=False)


def evaluate_pretrained(config: Config, worker: Worker) -> None:
    """Reports loss, top-1 and top-5 of pre-trained weights on the test split, as they are."""
    dataset = load_dataset(config)
    model = build_model(config, dataset, new_head=False).to(worker.device)
    model = model.to(memory_format=memory_format(config))
    metrics = evaluate(config, model, dataset, "test", worker)
    worker.report({"epoch": 0, **metrics, "outcome": "finished"})


@torch.no_grad()
def evaluate(
    config: Config, model: nn.Module, dataset: Dataset, split: Split, worker: Worker
) -> dict[str, float]:
    """Mean cross-entropy (nats), top-1 and top-5 accuracy (percent) over a split.

    Each image counts once, on any number of workers.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
    slice_size = max(1, config.optimizer.batch_size // worker.world_size)
    batches = eval_batches(
        dataset,
        split,
        min(slice_size, config.scale.micro_batch_size or slice_size),
        worker.rank,
        worker.world_size,
        loaders(config, dataset, worker),
    )
    for images, labels in batches:
        with autocast(config, worker.device):
            logits_NK = model(images.to(worker.device, memory_format=memory_format(config)))
        logits_NK, labels = logits_NK.float(), labels.to(worker.device)
        sums[0] += F.cross_entropy(logits_NK, labels, reduction="sum")
        ranked_NK = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
        hits_NK = ranked_NK == labels[:, None]
        sums[1] += hits_NK[:, 0].sum()
        sums[2] += hits_NK.sum()
    model.train(was_training)
    if worker.world_size > 1:
        dist.all_reduce(sums)
    loss, top1, top5 = (sums / dataset.sizes[split]).tolist()
    return {f"{split}_loss": loss, f"{split}_top1": 100 * top1, f"{split}_top5": 100 * top5}


def loaders(config: Config, dataset: Dataset, worker: Worker) -> int:
    """Processes that read images for this worker."""
    if config.scale.loaders is not None:
        return config.scale.loaders
    if dataset.in_memory:
        return 0
    return max(1, len(os.sched_getaffinity(0)) // worker.local_world_size)
