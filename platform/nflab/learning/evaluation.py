"""Accuracy of a network over a split, on any number of workers."""

import math
import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import nfnet
from nflab.data import Dataset, load_dataset
from nflab.data.batches import regroup, standardise
from nflab.data.dataset import Split
from nflab.data.feed import Feed, Part
from nflab.learning.memory import is_full
from nflab.learning.models import build_model, check_model
from nflab.learning.network import in_float32, memory_format
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
    """Reports loss, top-1 and top-5 of pre-trained weights on the test split, as they are; outcome
    "diverged" if their logits are not finite."""
    dataset = load_dataset(config)
    worker.check(dataset)
    model = build_model(config, dataset, new_head=False).to(worker.device)
    model = model.to(memory_format=memory_format(config))
    feed = open_feed(config, dataset, worker, [Part("test")])
    metrics = evaluate(config, model, dataset, "test", worker, feed)
    outcome = "finished" if answered(metrics) else "diverged"
    worker.report({"epoch": 0, **metrics, "outcome": outcome})


@torch.no_grad()
@in_float32()
def evaluate(
    config: Config, model: nn.Module, dataset: Dataset, split: Split, worker: Worker, feed: Feed
) -> dict[str, float]:
    """Mean cross-entropy (nats), top-1 and top-5 accuracy (percent) over a split, the feed's next
    part.

    Each image counts once, on any number of workers; one that cannot be read, if such are skipped,
    not at all. Computed in float32 whatever the precision of
    the training, as by the authors: with 8 bits of mantissa classes tie.

    Returns:
        `SPLIT_loss`, `SPLIT_top1` and `SPLIT_top5`. Of a network that does not answer every image
        with finite logits no accuracy is told, and the loss is NaN (see `answered`).
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=worker.device)
    slice_size = max(1, config.optimizer.batch_size // worker.world_size)
    at_once = slice_size = min(slice_size, config.scale.micro_batch_size or slice_size)
    mean, std = dataset.mean.to(worker.device), dataset.std.to(worker.device)
    chunks = (
        tuple(tensor.to(worker.device, non_blocking=True) for tensor in chunk)
        for chunk in feed.evaluation(split)
    )
    with nfnet.kernels_kept(model):
        for images, labels in regroup(chunks, slice_size):
            worker.progressed()
            if len(labels) == 0:
                continue
            pixels = standardise(images, mean, std).to(memory_format=memory_format(config))
            logits_NK, at_once = _as_fits(model, pixels, at_once)
            sums[0] += F.cross_entropy(logits_NK, labels, reduction="sum")
            ranked_NK = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
            hits_NK = ranked_NK == labels[:, None]
            sums[1] += hits_NK[:, 0].sum()
            sums[2] += hits_NK.sum()
            sums[3] += (~logits_NK.isfinite()).sum()
            sums[4] += len(labels)
    for module in training:  # not those that were frozen
        module.training = True
    if worker.world_size > 1:
        dist.all_reduce(sums)
    loss, top1, top5, unanswered = (sums[:4] / sums[4]).tolist()
    if unanswered or not math.isfinite(loss):
        return {f"{split}_loss": math.nan}
    return {f"{split}_loss": loss, f"{split}_top1": 100 * top1, f"{split}_top5": 100 * top5}


def _as_fits(model: nn.Module, images_NCHW: Tensor, at_once: int) -> tuple[Tensor, int]:
    """Logits of images, so many computed at once, or half of them, and so on, if memory is full;
    and how many it holds."""
    while True:
        try:
            return torch.cat([model(part) for part in images_NCHW.split(at_once)]), at_once
        except RuntimeError as error:
            if at_once == 1 or not is_full(error):
                raise
        at_once = math.ceil(at_once / 2)  # when what the error held is free
        print(f"memory ran out: {at_once} images are evaluated at once", flush=True)


def answered(metrics: Mapping[str, float]) -> bool:
    """Whether all that `evaluate` returned, of any splits, is of a network that answers with
    numbers."""
    losses = [value for name, value in metrics.items() if name in ("val_loss", "test_loss")]
    return all(math.isfinite(loss) for loss in losses)


def open_feed(config: Config, dataset: Dataset, worker: Worker, parts: Sequence[Part]) -> Feed:
    """What gives a worker the images of all parts of a run, in their order."""
    loaders = config.scale.loaders
    if loaders is None:
        # A Mac does not tell which of its cores a process may use.
        here = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        loaders = 0 if dataset.in_memory else worker.cores or here
    on_gpu, where = worker.device.type == "cuda", config.scale.augment_on
    on_device = where == "device" or (where == "auto" and on_gpu)
    return Feed(
        dataset,
        config,
        parts,
        worker.rank,
        worker.world_size,
        loaders,
        pinned=on_gpu,
        augments_on=worker.device if on_device else None,
    )
