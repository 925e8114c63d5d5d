"""The training loop of every run, on every number of workers.

It reads from top to bottom in the order in which things happen. What surrounds it (Ray Train, Ray
Tune or nothing) reaches it only as a `Worker`.
"""

import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

import nfnet
from nflab.data import load_dataset
from nflab.data.batches import Batch, cut
from nflab.data.dataset import Split
from nflab.data.feed import Part, parts_of_training
from nflab.learning.computation import made_by
from nflab.learning.diagnostics import Diagnostics
from nflab.learning.due import Due
from nflab.learning.epoch import EpochSums
from nflab.learning.evaluation import answered, evaluate, open_feed
from nflab.learning.memory import OutOfMemory, is_full
from nflab.learning.models import (
    build_model,
    set_training,
    statistics_left_alone,
)
from nflab.learning.network import Network, memory_format, part_of_batch, use_arithmetic
from nflab.learning.profile import Profile
from nflab.learning.state import Saver, Training, load_state
from nflab.learning.usage import Usage
from nflab.learning.worker import Worker, sum_over_workers
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.outcomes import standing
from nflab.settings.streams import Stream, keys
from nflab.storage.checkpoints import in_words

CHECK_EVERY = 16
"""Steps between two looks at whether the loss is still finite, on all workers alike."""


def train(config: Config, worker: Worker) -> None:
    """Trains one configuration and reports after each epoch.

    Metrics of an epoch: `epoch` (1-based), `train_loss`, `val_loss`, `val_top1` and `val_top5`
    (percent), `best_epoch` and `best_val_top1` (so far), `learning_rate` (of the last step),
    `images_per_second`, `seconds`, `samples_seen`, `world_size`, `images_at_once` (of a worker),
    `data_wait_fraction` (of the epoch's time, in which this worker waited for images),
    `checkpoint_seconds` (for which training stood still since the epoch before), and, where
    the machines have a price, `cost_usd` (since the start, with what earlier processes took),
    `clipped_fraction/<layer group>`, and `outcome`: "running", then "finished" with `test_loss`,
    `test_top1` and `test_top5`, or "diverged" as soon as a loss or a logit is not
    finite (its val_top1 is 0: a diverged network classifies nothing).

    Below `system` is what every worker took of its machine (see `Usage.pop`). With `diagnostics`
    each has `agc` too, what AGC did to each layer (see `Diagnostics.pop`), and with `profile` the
    first that a process reports has `profile` (see `Profile.pop`).

    A run that starts from pre-trained weights, with a new classifier on them, first reports what
    they are worth as epoch 0.

    A run that continues from a checkpoint first repeats the reports that led to it, since whoever
    was listening may have been lost before it wrote the last ones down. The checkpoint must be of
    the same computation (see `require_same`). If other code or another version of torch made it,
    the first of these reports has a `remark`, a sentence that says so.

    Raises:
        OutOfMemory: a GPU's memory would hold fewer images at once; a training with that
            `micro_batch_size` goes on from the last checkpoint.
        OtherComputation: the last checkpoint is of another computation; nothing was trained.
        DatasetError: the dataset cannot be used, or is not the driver's; likewise.
    """
    networks: list[Network] = []
    try:
        _train(config, worker, networks)
        return
    except RuntimeError as error:
        fewer = networks[0].fewer if networks and is_full(error) else None
        if fewer is None:
            raise
    raise OutOfMemory(fewer)  # when what the error held is free


def _train(config: Config, worker: Worker, networks: list[Network]) -> None:
    """Trains; `networks` gets the network."""
    use_arithmetic(config)
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
    midst: dict[str, Any] | None = None
    remark: str | None = None
    saver: Saver | None = None
    if worker.checkpoints is not None:
        training = Training(config, made_by(config), dataset, model, optimizer, ema)
        with worker.checkpoints.last() as found:
            if found.folder is not None:
                history, midst, remark = load_state(found.folder, training)
            remark = "; ".join(filter(None, (found.damaged, remark))) or None
        saver = Saver(training, worker.checkpoints) if worker.rank == 0 else None
    evaluated = model if ema is None else ema.model
    first_epoch = history[-1]["epoch"] if history else 0
    first_step = 0 if midst is None else midst["step"]

    network = Network(config, dataset, model, worker.device, worker.world_size)
    networks.append(network)
    if network.adapts:
        set_training(model, config.model.frozen)
        network.fit_into_memory(copies=2 if sam is None else 3)
    in_pieces = replace(config, micro_batch_size=network.micro_batch_size)
    begun_from_weights = not (history or midst) and config.model.pretrained is not None
    feed = open_feed(
        config,
        dataset,
        worker,
        [Part("val"), Part("test")] * begun_from_weights
        + parts_of_training(first_epoch, config.schedule.epochs, first_step),
    )

    def evaluated_on(split: Split) -> dict[str, float]:
        return evaluate(in_pieces, evaluated, dataset, split, worker, feed)

    def tested(metrics: dict[str, Any]) -> dict[str, Any]:
        """The last epoch's metrics, with those of the test split."""
        metrics = {**metrics, **evaluated_on("test")}
        if worker.rank == 0 and worker.checkpoints is not None:
            worker.checkpoints.purge({metrics["epoch"], _best(history)})
        return {**metrics, "outcome": "finished"} if answered(metrics) else _diverged(metrics)

    if history or midst:
        if first_epoch == config.schedule.epochs:
            remark = found.damaged  # nothing is left to be trained by another
            if history[-1]["outcome"] == "running":
                history[-1] = tested(history[-1])
        print(remark or f"continues after {in_words((first_epoch, first_step))}")
    elif begun_from_weights:
        before = {**evaluated_on("val"), **evaluated_on("test")}
        metrics = {"epoch": 0, **before, "samples_seen": 0, "outcome": "running"}
        if not answered(metrics):
            worker.report(_diverged(metrics))
            return
        history = [metrics]
    elif remark is not None:
        print(remark)

    gpu = worker.gpu
    profile = Profile(config.run.profile if worker.rank == 0 else 0, worker.device)

    def report(metrics: dict[str, Any]) -> None:
        nonlocal remark, gpu
        # Not in the history itself: told by the process that goes on, and by none after it.
        once = {"remark": remark, "gpu": gpu}
        told = {key: value for key, value in once.items() if value is not None}
        worker.report({**metrics, **profile.pop(), **told})
        remark = gpu = None

    for past in history:
        report(past)

    batch_size = config.optimizer.batch_size
    own = cut(batch_size, worker.rank, worker.world_size)
    steps_per_epoch = dataset.sizes["train"] // batch_size
    peak = config.optimizer.base_learning_rate * batch_size / 256
    diagnostics = None
    if config.run.diagnostics:
        diagnostics = Diagnostics(model, optimizer, config.schedule.epochs * steps_per_epoch)
    usage = Usage(worker)
    sums = EpochSums(model, optimizer, diagnostics, worker)
    due = Due(config, worker, saver)
    usd_per_hour = _price_of_all(worker)

    def counted(chunks: Iterator[Batch]) -> Iterator[Batch]:
        for chunk in chunks:
            sums.replaced += chunk.replaced
            yield chunk

    for epoch in range(first_epoch, config.schedule.epochs):
        started = time.monotonic()
        set_training(model, config.model.frozen)
        sums.begin()
        finite, waited = True, feed.waited
        begin = 0
        if midst is not None:
            begin = midst["step"]
            sums.load_state_dict(midst["sums"])
            midst = None
        before_epoch = epoch * steps_per_epoch
        for step, slices in enumerate(feed.train(epoch, begin), start=before_epoch + begin):
            learning_rate = nfnet.warmup_cosine(
                step,
                config.schedule.epochs * steps_per_epoch,
                round(config.schedule.warmup_epochs * steps_per_epoch),
                peak,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            keys_of = partial(keys, config.run.seed, Stream.MODEL, step)
            profile.before_step()
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
            sums.loss += network.add_gradient(chunks, own.stop - own.start, keys_of, batch_size)
            if diagnostics is not None:
                diagnostics.before(step)
            (sam or optimizer).step()
            if ema is not None:
                ema.update(model, step)
            sums.clipped.update()
            done = step + 1 - before_epoch
            if done == steps_per_epoch or step % CHECK_EVERY == 0:
                usage.sample()
                train_loss = sum_over_workers(sums.loss, worker)
                finite = math.isfinite(train_loss)
                if not finite:
                    break
            if due.now() and done < steps_per_epoch:
                seconds = time.monotonic() - started
                so_far = sums.state_dict(seconds, seconds * (usd_per_hour or 0.0) / 3600)
                if saver is not None:
                    best = _best(history) if history else None
                    saver.save_midst(history, best, {"step": done, "sums": so_far})
        seconds = time.monotonic() - started
        profile.finish()

        metrics = {
            "epoch": epoch + 1,
            "train_loss": train_loss / steps_per_epoch,
            "learning_rate": learning_rate,
            "images_per_second": (done - begin) * batch_size / seconds,
            "samples_seen": (step + 1) * batch_size,
            "world_size": worker.world_size,
            "images_at_once": network.micro_batch_size,
            **sums.clipped.pop(),
            **usage.pop(),
        }
        if config.data.bad_images == "skip":
            told = torch.tensor(sums.replaced, dtype=torch.float64, device=worker.device)
            metrics["replaced_images"] = sum_over_workers(told, worker)
        if diagnostics is not None:
            metrics["agc"] = diagnostics.pop()
        if finite:
            metrics |= evaluated_on("val")
        earlier = history[-1].get("seconds", 0.0) if history else 0.0
        seconds = time.monotonic() - started
        metrics["data_wait_fraction"] = (feed.waited - waited) / seconds
        metrics["checkpoint_seconds"] = 0.0 if saver is None else saver.waited
        metrics["seconds"] = earlier + sums.seconds + seconds
        metrics |= _cost(history, sums.usd, seconds, usd_per_hour)
        # The last step of an epoch may be what broke the network.
        if not finite or not answered(metrics):
            if saver is not None:
                saver.finish()  # its checkpoints may be deleted now
            report(_diverged(metrics))
            return
        metrics["outcome"] = "running"
        history.append(metrics)
        metrics["best_epoch"] = _best(history)
        metrics["best_val_top1"] = max(past["val_top1"] for past in history)
        if saver is not None:
            saver.waited = 0.0
            saver.save(history, _best(history))
        # After all is saved: a test image that cannot be read costs no epoch.
        report(tested(metrics) if epoch + 1 == config.schedule.epochs else metrics)


def _best(history: list[dict[str, Any]]) -> int:
    """The epoch with the best validation top-1."""
    return int(min(standing(past["val_top1"], past["epoch"]) for past in history)[1])


def _diverged(metrics: dict[str, Any]) -> dict[str, Any]:
    """A report that ends a run; a network that answers with no numbers classifies nothing."""
    told = {k: v for k, v in metrics.items() if k not in ("val_top5", "test_top1", "test_top5")}
    return {**told, "outcome": "diverged", "val_top1": 0.0}


def _price_of_all(worker: Worker) -> float | None:
    """What all workers together cost an hour, in USD; None if that of one is not known."""
    own = math.nan if worker.usd_per_hour is None else worker.usd_per_hour
    price = sum_over_workers(torch.tensor(own, dtype=torch.float64, device=worker.device), worker)
    return None if math.isnan(price) else price


def _cost(
    history: list[dict[str, Any]], begun_usd: float, seconds: float, usd_per_hour: float | None
) -> dict[str, float]:
    """`cost_usd` after another epoch; nothing if it is not known and never was.

    Args:
        begun_usd: what earlier processes have spent on the epoch.
        seconds: that this one has.
    """
    earlier = (history[-1].get("cost_usd", 0.0) if history else 0.0) + begun_usd
    if usd_per_hour is not None:
        return {"cost_usd": earlier + seconds * usd_per_hour / 3600}
    return {"cost_usd": earlier} if earlier else {}
