"""The training loop of every run, on every number of workers.

It reads from top to bottom in the order in which things happen. What surrounds it (Ray Train, Ray
Tune or nothing) reaches it only as a `Worker`.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import nfnet
from nflab.checkpoints import Checkpoints
from nflab.config import Config, to_json
from nflab.data import Dataset, load_dataset
from nflab.data.batches import eval_batches, train_batches
from nflab.data.dataset import Split
from nflab.network import Network, autocast, memory_format, part_of_batch
from nflab.streams import Stream, keys

CHECK_EVERY = 16
"""Steps between two looks at whether the loss is still finite, on all workers alike."""


SMALL_IMAGE = 64
"""Pixels up to which images are small: every model begins with the stem for these."""


@dataclass(frozen=True)
class Worker:
    """One process's place among those that train a run together, and its line to the outside."""

    report: Callable[[dict[str, Any]], None]
    """Called by every worker after each epoch with the metrics."""
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Processes of the run on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoints: Checkpoints | None = None
    """Where rank 0 saves after each epoch, and what all continue from; None saves nothing."""


def train(config: Config, worker: Worker) -> None:
    """Trains one configuration and reports after each epoch.

    Metrics of an epoch: `epoch` (1-based), `train_loss`, `val_loss`, `val_top1` and `val_top5`
    (percent), `learning_rate` (of the last step), `images_per_second`, `samples_seen` (since the
    start), `clipped_fraction/<layer group>`, and `outcome`: "running", then "finished" with
    `test_loss`, `test_top1` and `test_top5`, or "diverged" as soon as a loss is not finite (its
    val_top1 is 0: a diverged network classifies nothing).

    A run that continues from a checkpoint first repeats the reports that led to it, since whoever
    was listening may have been lost before it wrote the last ones down.
    """
    dataset = load_dataset(config)
    torch.manual_seed(config.run.seed)
    model = nfnet.create_model(
        config.model.model,
        num_classes=len(dataset.class_names),
        drop_rate=config.model.drop_rate,
        stochdepth_rate=config.model.stochdepth_rate,
        in_channels=dataset.image_shape[0],
        # A large stem would leave nothing of a small image.
        **({"stem": "3x3"} if max(dataset.image_shape[1:]) <= SMALL_IMAGE else {}),
    )
    model = model.to(worker.device).to(memory_format=memory_format(config))
    optimizer = nfnet.SGD_AGC(
        nfnet.param_groups(model, config.optimizer.weight_decay, config.optimizer.clipping),
        lr=0.0,
        momentum=config.optimizer.momentum,
    )
    rho, decay = config.optimizer.sam_rho, config.optimizer.ema_decay
    sam = None if rho is None else nfnet.SAM(optimizer, rho)
    ema = None if decay is None else nfnet.EMA(model, decay)
    history: list[dict[str, Any]] = []
    if worker.checkpoints is not None:
        with worker.checkpoints.last() as folder:
            if folder is not None:
                history = _load(folder, model, optimizer, ema, worker.device)
    if history:
        print(f"continues after epoch {len(history)}")
    for past in history:
        worker.report(past)
    network = Network(config, model, worker.device, worker.world_size)

    batch_size = config.optimizer.batch_size
    steps_per_epoch = dataset.sizes["train"] // batch_size
    peak = config.optimizer.base_learning_rate * batch_size / 256
    clipped = ClippedFraction(model, optimizer)
    ahead = loaders(config, dataset, worker)

    for epoch in range(len(history), config.schedule.epochs):
        started = time.monotonic()
        model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        finite = True
        batches = train_batches(dataset, config, epoch, worker.rank, worker.world_size, ahead)
        for step, batch in enumerate(batches, start=epoch * steps_per_epoch):
            learning_rate = nfnet.warmup_cosine(
                step,
                config.schedule.epochs * steps_per_epoch,
                round(config.schedule.warmup_epochs * steps_per_epoch),
                peak,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            keys_N = keys(config.run.seed, Stream.MODEL, step, batch.places_N)
            optimizer.zero_grad()
            if sam is not None:
                fraction = config.optimizer.sam_fraction
                part, kept_N, size = part_of_batch(batch, batch_size, fraction)
                network.add_gradient(part, keys_N[kept_N], size)
                sam.ascend()
            loss_sum += network.add_gradient(batch, keys_N, batch_size)
            (sam or optimizer).step()
            if ema is not None:
                ema.update(model, step)
            clipped.update()
            last = step == (epoch + 1) * steps_per_epoch - 1
            if last or step % CHECK_EVERY == 0:
                train_loss = _sum_over_workers(loss_sum, worker)
                finite = math.isfinite(train_loss)
                if not finite:
                    break
        seconds = time.monotonic() - started

        metrics: dict[str, Any] = {
            "epoch": epoch + 1,
            "train_loss": train_loss / steps_per_epoch,
            "learning_rate": learning_rate,
            "images_per_second": (step + 1 - epoch * steps_per_epoch) * batch_size / seconds,
            "samples_seen": (step + 1) * batch_size,
            **clipped.pop(),
        }
        evaluated = model if ema is None else ema.model
        if finite:
            metrics |= evaluate(config, evaluated, dataset, "val", worker)
        # The last step of an epoch may be what broke the network.
        if not finite or not math.isfinite(metrics["val_loss"]):
            worker.report({**metrics, "outcome": "diverged", "val_top1": 0.0})
            return
        if epoch + 1 == config.schedule.epochs:
            metrics |= evaluate(config, evaluated, dataset, "test", worker)
            metrics["outcome"] = "finished"
        else:
            metrics["outcome"] = "running"
        history.append(metrics)
        if worker.rank == 0 and worker.checkpoints is not None:
            with tempfile.TemporaryDirectory() as temporary:
                _save(Path(temporary), config, history, model, optimizer, ema)
                worker.checkpoints.save(Path(temporary), epoch + 1)
        worker.report(metrics)


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


class ClippedFraction:
    """Share of the units of each layer group that AGC clipped, averaged over steps."""

    def __init__(self, model: nn.Module, optimizer: nfnet.SGD_AGC) -> None:
        self._optimizer = optimizer
        self._groups: dict[Tensor, str] = {
            p: nfnet.layer_group(name) for name, p in model.named_parameters()
        }
        self._steps = 0
        self._sums: list[Tensor] = []

    def update(self) -> None:
        """Adds the optimizer's last step."""
        fractions = list(self._optimizer.clipped_fraction.values())
        if not self._sums:
            self._sums = [torch.zeros_like(f) for f in fractions]
        if fractions:
            torch._foreach_add_(self._sums, fractions)
        self._steps += 1

    def pop(self) -> dict[str, float]:
        """`clipped_fraction/<layer group>` since the last call; empty without clipping."""
        units: dict[str, float] = {}
        clipped: dict[str, float] = {}
        for p, total in zip(self._optimizer.clipped_fraction, self._sums, strict=True):
            group, count = self._groups[p], nfnet.num_units(p)
            units[group] = units.get(group, 0) + count
            clipped[group] = clipped.get(group, 0) + count * float(total) / self._steps
        self._steps, self._sums = 0, []
        return {f"clipped_fraction/{group}": clipped[group] / units[group] for group in units}


def _sum_over_workers(value: Tensor, worker: Worker) -> float:
    total = value.clone()
    if worker.world_size > 1:
        dist.all_reduce(total)
    return float(total)


def _save(
    folder: Path,
    config: Config,
    history: list[dict[str, Any]],
    model: nn.Module,
    optimizer: nfnet.SGD_AGC,
    ema: nfnet.EMA | None,
) -> None:
    """`state.pt` to resume from, `weights.pt` as evaluated, and their configuration."""
    state = {
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
    }
    torch.save(state, folder / "state.pt")
    torch.save((model if ema is None else ema.model).state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text(to_json(config), encoding="utf-8")


def _load(
    folder: Path,
    model: nn.Module,
    optimizer: nfnet.SGD_AGC,
    ema: nfnet.EMA | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Restores what `_save` wrote; returns the metrics of each epoch so far."""
    state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
    history: list[dict[str, Any]] = state["history"]
    return history
