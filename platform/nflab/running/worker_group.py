"""Training one configuration with Ray Train, on one to many workers."""

import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from nflab.cluster.connection import cores_here, price_here
from nflab.cluster.hardware import gpu_of
from nflab.cluster.placement import Placement
from nflab.cluster.preemption import notice
from nflab.cluster.trained import progress
from nflab.learning.loop import train
from nflab.learning.memory import OutOfMemory
from nflab.learning.worker import Worker
from nflab.running.losses import Losses
from nflab.running.resizing import SavesFirst, resized
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.storage.checkpoints import Checkpoints, in_words
from nflab.storage.files import Away
from nflab.storage.logs import kept_log

__all__ = ["Task", "TrainingFailedError", "first_error", "fit"]


class WorkerFailed(Exception):
    """A worker's error, with its traceback as text and the time at which it happened."""

    def __init__(
        self, rank: int, when: float, text: str, own: bool, full: OutOfMemory | None = None
    ) -> None:
        """`own`: the run would fail again, unlike one whose store or other workers are away, or
        whose memory is `full`."""
        super().__init__(rank, when, text, own, full)
        self.rank, self.when, self.text, self.own, self.full = rank, when, text, own, full


Task = Callable[[Config, Worker], None]
"""What a worker does."""


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    config: Config
    placement: Placement
    folder: str
    task: Task
    fingerprint: str | None


def fit(
    config: Config,
    placement: Placement,
    folder: str,
    callback: UserCallback,
    task: Task = train,
    fingerprint: str | None = None,
) -> None:
    """Trains `config` on the workers of `placement`, continuing from what `folder` holds.

    When a worker's process or machine is lost, all begin again at the last checkpoint, as soon as
    there are machines for them, as often as `Losses` allows; when its memory is full, with fewer
    images at once.

    Args:
        folder: path or address of the run's checkpoints and logs.
        callback: told of every report, in Ray Train's controller process; of those before the
            last checkpoint again when all begin again.
        task: what every worker does, instead of training.
        fingerprint: of the driver's copy of the dataset, which each worker's must have too.

    Raises:
        ray.train.TrainingFailedError: a worker raised an error, or was lost (see `first_error`).
    """
    losses = Losses(folder)
    while True:
        try:
            _fit_once(_Job(config, placement, folder, task, fingerprint), callback)
            return
        except WorkerGroupError as failure:
            # A driver that was told to end has no Ray any more.
            if first_error(failure) is not None or not ray.is_initialized():
                raise
            full = next((error.full for error in _errors(failure) if error.full), None)
            if full is not None:
                print(full, flush=True)
                config = replace(config, micro_batch_size=full.micro_batch_size)
                continue
            if not losses.bear_another():
                raise
            mark = losses.mark
            told = "its beginning" if mark is None else f"{in_words(mark)}, its last checkpoint"
            print(f"{_loss(failure)}: it goes on from {told}", flush=True)


def _fit_once(job: _Job, callback: UserCallback) -> None:
    placement = job.placement
    # Of Ray Train's own state nothing is needed again.
    with tempfile.TemporaryDirectory(prefix="nflab-") as state:
        TorchTrainer(
            _train_worker,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
            scaling_config=scaling(placement),
            run_config=RunConfig(
                # Ray Train would continue a run of a known name; the checkpoints do that here.
                name=f"train-{time.time_ns()}",
                storage_path=state,
                callbacks=[callback, SavesFirst(job.folder)],  # type: ignore[list-item]
                # It would try again whatever the error.
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()


def scaling(placement: Placement) -> ScalingConfig:
    """The workers that Ray Train is to start, and where."""
    least, most = placement.min_workers, placement.num_workers
    return ScalingConfig(  # type: ignore[call-arg]
        num_workers=most if least is None else (least, most),  # type: ignore[arg-type]
        use_gpu=placement.gpus_per_worker > 0,
        resources_per_worker=placement.per_worker,
        placement_strategy=placement.strategy,
        label_selector=placement.label_selector,
    )


def _train_worker(parameters: dict[str, _Job]) -> None:
    job, context = parameters["job"], ray.train.get_context()
    rank = context.get_world_rank()
    preempted, elastic = notice(), job.placement.min_workers is not None

    try:
        with kept_log(f"{job.folder}/logs", rank) as log:

            def report(metrics: dict[str, Any]) -> None:
                log.report(metrics)
                ray.train.report(metrics)

            worker = Worker(
                report=report,
                rank=rank,
                world_size=context.get_world_size(),
                cores=cores_here(job.placement),
                device=get_device(),
                gpu=gpu_of(get_device()),
                usd_per_hour=price_here(job.placement),
                checkpoints=Checkpoints.of_run(job.folder),
                ends=lambda: preempted() or (resized(job.folder) if elastic else None),
                progressed=progress(),
                fingerprint=job.fingerprint,
            )
            job.task(job.config, worker)
    except Exception as error:
        full = error if isinstance(error, OutOfMemory) else None
        own = full is None and not isinstance(error, Away) and not _lost_touch(error)
        raise WorkerFailed(rank, time.time(), traceback.format_exc(), own, full) from None


def _lost_touch(error: Exception) -> bool:
    """Whether an error tells no more than that other workers do not answer."""
    # Gloo's errors have no type of their own.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _loss(failure: BaseException) -> str:
    """What a run lost that did not fail by itself."""
    if any(f"{Away.__module__}.{Away.__name__}" in error.text for error in _errors(failure)):
        return "the run's storage did not answer"
    return "a process of the run was lost"


def first_error(failure: BaseException) -> WorkerFailed | None:
    """The error for which a run would fail again, the first of them; None if there is none, as when
    a process was killed.

    The other workers of a run fail too, since they wait for the one that has gone.
    """
    own = (error for error in _errors(failure) if error.own)
    return min(own, key=lambda error: error.when, default=None)


def _errors(failure: BaseException) -> list[WorkerFailed]:
    """What workers themselves raised."""
    found = []
    for error in getattr(failure, "worker_failures", {}).values():
        while error is not None:
            if isinstance(error, WorkerFailed):
                found.append(error)
                break
            error = getattr(error, "_base_exc", None) or error.__cause__
    return found
