"""The training loop of every run, on every number of workers.

It reads from top to bottom in the order in which things happen. What surrounds it (Ray Train, Ray
Tune or nothing) reaches it only as a `Worker`.
"""

import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import nfnet
from nflab.data import load_dataset
from nflab.data.batches import Batch, cut
from nflab.data.dataset import Split
from nflab.data.feed import Part, parts_of_training
from nflab.learning.computation import made_by
from nflab.learning.diagnostics import Diagnostics
from nflab.learning.evaluation import answered, evaluate, open_feed
from nflab.learning.models import (
    build_model,
    set_training,
    statistics_left_alone,
)
from nflab.learning.network import Network, memory_format, part_of_batch
from nflab.learning.state import load_state, save_state
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.outcomes import standing
from nflab.settings.streams import Stream, keys
from nflab.storage.files import patiently

CHECK_EVERY = 16
"""Steps between two looks at whether the loss is still finite, on all workers alike."""


def train(config: Config, worker: Worker) -> None:
    """Trains one configuration and reports after each epoch.

    Metrics of an epoch: `epoch` (1-based), `train_loss`, `val_loss`, `val_top1` and `val_top5`
    (percent), `learning_rate` (of the last step), `images_per_second`, `seconds`, `samples_seen`
    `data_wait_fraction` (of the epoch's time, in which this worker waited for images), and, where
    the machines have a price, `cost_usd` (since the start, with what earlier processes took),
    `clipped_fraction/<layer group>`, and `outcome`: "running", then "finished" with `test_loss`,
    `test_top1` and `test_top5`, or "diverged" as soon as a loss or a logit is not
    finite (its val_top1 is 0: a diverged network classifies nothing).

    With `diagnostics` each has `agc` too, what AGC did to each layer (see `Diagnostics.pop`).

    A run that starts from pre-trained weights, with a new classifier on them, first reports what
    they are worth as epoch 0.

    A run that continues from a checkpoint first repeats the reports that led to it, since whoever
    was listening may have been lost before it wrote the last ones down. The checkpoint must be of
    the same computation (see `require_same`). If other code or another version of torch made it,
    the first of these reports has a `remark`, a sentence that says so.

    Raises:
        OtherComputation: the last checkpoint is of another computation; nothing was trained.
        DatasetError: the dataset cannot be used, or is not the driver's; likewise.
    """
    dataset = load_dataset(config)
    worker.check(dataset)
    model = build_model(config, dataset, new_head=True).to(worker.device)
    model = model.to(memory_format=memory_format(config))
    optimizer = nfnet.SGD_AGC(
        nfnet.param_groups(
            model,
            config.optimizer.weight_decay,
            config.optimizer.clipping,
            config.optimizer.unclipped,
        ),
        lr=0.0,
        momentum=config.optimizer.momentum,
    )
    rho, decay = config.optimizer.sam_rho, config.optimizer.ema_decay
    sam = None if rho is None else nfnet.SAM(optimizer, rho)
    ema = None if decay is None else nfnet.EMA(model, decay)
    history: list[dict[str, Any]] = []
    metrics: dict[str, Any]
    remark: str | None = None
    maker: dict[str, Any] = {}
    if worker.checkpoints is not None:
        maker = made_by(config)
        with worker.checkpoints.last() as found:
            if found.folder is not None:
                history, remark = load_state(found.folder, maker, dataset, model, optimizer, ema)
            remark = "; ".join(filter(None, (found.damaged, remark))) or None
    evaluated = model if ema is None else ema.model

    begun_from_weights = not history and config.model.pretrained is not None
    feed = open_feed(
        config,
        dataset,
        worker,
        [Part("val"), Part("test")] * begun_from_weights
        + parts_of_training(history[-1]["epoch"] if history else 0, config.schedule.epochs),
    )

    def evaluated_on(split: Split) -> dict[str, float]:
        return evaluate(config, evaluated, dataset, split, worker, feed)

    def tested(metrics: dict[str, Any]) -> dict[str, Any]:
        """The last epoch's metrics, with those of the test split."""
        metrics = {**metrics, **evaluated_on("test")}
        if worker.rank == 0 and worker.checkpoints is not None:
            worker.checkpoints.purge({metrics["epoch"], _best(history)})
        return {**metrics, "outcome": "finished"} if answered(metrics) else _diverged(metrics)

    if history:
        if history[-1]["epoch"] == config.schedule.epochs:
            remark = found.damaged  # nothing is left to be trained by another
            if history[-1]["outcome"] == "running":
                history[-1] = tested(history[-1])
        print(remark or f"continues after epoch {history[-1]['epoch']}")
    elif begun_from_weights:
        before = {**evaluated_on("val"), **evaluated_on("test")}
        metrics = {"epoch": 0, **before, "samples_seen": 0, "outcome": "running"}
        if not answered(metrics):
            worker.report(_diverged(metrics))
            return
        history = [metrics]
    elif remark is not None:
        print(remark)

    def report(metrics: dict[str, Any]) -> None:
        nonlocal remark
        # Not in the history itself: told by the process that goes on, and by none after it.
        worker.report(metrics if remark is None else {**metrics, "remark": remark})
        remark = None

    for past in history:
        report(past)
    network = Network(config, dataset, model, worker.device, worker.world_size)

    batch_size = config.optimizer.batch_size
    own = cut(batch_size, worker.rank, worker.world_size)
    steps_per_epoch = dataset.sizes["train"] // batch_size
    peak = config.optimizer.base_learning_rate * batch_size / 256
    clipped = ClippedFraction(model, optimizer)
    diagnostics = None
    if config.run.diagnostics:
        diagnostics = Diagnostics(model, optimizer, config.schedule.epochs * steps_per_epoch)
    usd_per_hour = _price_of_all(worker)

    for epoch in range(history[-1]["epoch"] if history else 0, config.schedule.epochs):
        started = time.monotonic()
        set_training(model, config.model.frozen)
        loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        finite, replaced, waited = True, 0, feed.waited

        def counted(chunks: Iterator[Batch]) -> Iterator[Batch]:
            nonlocal replaced
            for chunk in chunks:
                replaced += chunk.replaced
                yield chunk

        for step, slices in enumerate(feed.train(epoch), start=epoch * steps_per_epoch):
            learning_rate = nfnet.warmup_cosine(
                step,
                config.schedule.epochs * steps_per_epoch,
                round(config.schedule.warmup_epochs * steps_per_epoch),
                peak,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            keys_of = partial(keys, config.run.seed, Stream.MODEL, step)
            optimizer.zero_grad()
            chunks: Iterable[Batch] = counted(slices)
            if sam is not None:
                chunks = list(chunks)
                fraction = config.optimizer.sam_fraction
                parts = [part_of_batch(chunk, batch_size, fraction) for chunk in chunks]
                count = sum(len(part.places_N) for part, _ in parts)
                with statistics_left_alone(model):  # the whole batch is yet to come
                    network.add_gradient((part for part, _ in parts), count, keys_of, parts[0][1])
                sam.ascend()
            loss_sum += network.add_gradient(chunks, own.stop - own.start, keys_of, batch_size)
            if diagnostics is not None:
                diagnostics.before(step)
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

        metrics = {
            "epoch": epoch + 1,
            "train_loss": train_loss / steps_per_epoch,
            "learning_rate": learning_rate,
            "images_per_second": (step + 1 - epoch * steps_per_epoch) * batch_size / seconds,
            "samples_seen": (step + 1) * batch_size,
            **clipped.pop(),
        }
        if config.data.bad_images == "skip":
            told = torch.tensor(replaced, dtype=torch.float64, device=worker.device)
            metrics["replaced_images"] = _sum_over_workers(told, worker)
        if diagnostics is not None:
            metrics["agc"] = diagnostics.pop()
        if finite:
            metrics |= evaluated_on("val")
        earlier = history[-1].get("seconds", 0.0) if history else 0.0
        seconds = time.monotonic() - started
        metrics["data_wait_fraction"] = (feed.waited - waited) / seconds
        metrics["seconds"] = earlier + seconds
        metrics |= _cost(history, seconds, usd_per_hour)
        # The last step of an epoch may be what broke the network.
        if not finite or not answered(metrics):
            report(_diverged(metrics))
            return
        metrics["outcome"] = "running"
        history.append(metrics)
        if worker.rank == 0 and worker.checkpoints is not None:
            with patiently(tempfile.gettempdir(), tempfile.TemporaryDirectory) as temporary:
                state = (config, maker, dataset, history, model, optimizer, ema)
                patiently(temporary, partial(save_state, Path(temporary), *state))
                worker.checkpoints.save(Path(temporary), epoch + 1, _best(history))
        # After all is saved: a test image that cannot be read costs no epoch.
        report(tested(metrics) if epoch + 1 == config.schedule.epochs else metrics)


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


def _best(history: list[dict[str, Any]]) -> int:
    """The epoch with the best validation top-1."""
    return int(min(standing(past["val_top1"], past["epoch"]) for past in history)[1])


def _diverged(metrics: dict[str, Any]) -> dict[str, Any]:
    """A report that ends a run; a network that answers with no numbers classifies nothing."""
    told = {k: v for k, v in metrics.items() if k not in ("val_top5", "test_top1", "test_top5")}
    return {**told, "outcome": "diverged", "val_top1": 0.0}


def _sum_over_workers(value: Tensor, worker: Worker) -> float:
    total = value.clone()
    if worker.world_size > 1:
        dist.all_reduce(total)
    return float(total)


def _price_of_all(worker: Worker) -> float | None:
    """What all workers together cost an hour, in USD; None if that of one is not known."""
    own = math.nan if worker.usd_per_hour is None else worker.usd_per_hour
    price = _sum_over_workers(torch.tensor(own, dtype=torch.float64, device=worker.device), worker)
    return None if math.isnan(price) else price


def _cost(
    history: list[dict[str, Any]], seconds: float, usd_per_hour: float | None
) -> dict[str, float]:
    """`cost_usd` after another epoch; nothing if it is not known and never was."""
    earlier = history[-1].get("cost_usd") if history else None
    if usd_per_hour is not None:
        return {"cost_usd": (earlier or 0.0) + seconds * usd_per_hour / 3600}
    return {} if earlier is None else {"cost_usd": earlier}
