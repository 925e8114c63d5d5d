"""Training one configuration with Ray Train, on one to many workers."""

import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from nflab.checkpoints import Checkpoints
from nflab.cluster import Placement, price_here
from nflab.config import Config
from nflab.logs import kept_log
from nflab.loop import train
from nflab.worker import Worker


class WorkerFailed(Exception):
    """A worker's own error, with its traceback as text and the time at which it happened."""

    def __init__(self, rank: int, when: float, text: str) -> None:
        super().__init__(rank, when, text)
        self.rank, self.when, self.text = rank, when, text


Task = Callable[[Config, Worker], None]
"""What a worker does."""


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    config: Config
    placement: Placement
    folder: str
    task: Task


def fit(
    config: Config,
    placement: Placement,
    folder: str,
    callback: UserCallback,
    task: Task = train,
) -> None:
    """Trains `config` on the workers of `placement`, continuing from what `folder` holds.

    Args:
        folder: path or address of the run's checkpoints and logs.
        callback: told of every report, in Ray Train's controller process.
        task: what every worker does, instead of training.

    Raises:
        ray.train.TrainingFailedError: a worker raised an error, or was lost (see `first_error`).
    """
    # Of Ray Train's own state nothing is needed again.
    with tempfile.TemporaryDirectory(prefix="nflab-") as state:
        TorchTrainer(
            _train_worker,
            train_loop_config={"job": _Job(config, placement, folder, task)},
            torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=placement.num_workers,
                use_gpu=placement.gpus_per_worker > 0,
                resources_per_worker=placement.per_worker,
            ),
            run_config=RunConfig(
                # Ray Train would continue a run of a known name; the checkpoints do that here.
                name=f"train-{time.time_ns()}",
                storage_path=state,
                callbacks=[callback],  # type: ignore[list-item]
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()


def _train_worker(parameters: dict[str, _Job]) -> None:
    job, context = parameters["job"], ray.train.get_context()
    rank = context.get_world_rank()

    try:
        with kept_log(f"{job.folder}/logs", rank) as log:

            def report(metrics: dict[str, Any]) -> None:
                log.report(metrics)
                ray.train.report(metrics)

            worker = Worker(
                report=report,
                rank=rank,
                world_size=context.get_world_size(),
                local_world_size=context.get_local_world_size(),
                device=get_device(),
                usd_per_hour=price_here(job.placement),
                checkpoints=Checkpoints.of_run(job.folder),
            )
            job.task(job.config, worker)
    except Exception:
        raise WorkerFailed(rank, time.time(), traceback.format_exc()) from None


def first_error(failure: BaseException) -> WorkerFailed | None:
    """The error that a worker raised first; None if none did, as when a process was killed.

    The other workers of a run fail too, since they wait for the one that has gone.
    """
    found = []
    for error in getattr(failure, "worker_failures", {}).values():
        while error is not None:
            if isinstance(error, WorkerFailed):
                found.append(error)
                break
            error = getattr(error, "_base_exc", None) or error.__cause__
    return min(found, key=lambda error: error.when, default=None)
