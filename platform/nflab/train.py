"""Training one configuration with Ray Train, on one to many workers."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from nflab.cluster import Placement
from nflab.config import Config, flat, to_json
from nflab.loop import Worker, train
from nflab.progress import TrainingProgress, console
from nflab.session import open_session
from nflab.tracking import Outcome, Tracker


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    outcome: Outcome
    metrics: dict[str, float]
    """Last value of each metric, as MLflow recorded it."""
    run_id: str


def run_training(config: Config, experiment: str) -> TrainingResult:
    """Trains a validated configuration on the cluster, as a run of the MLflow experiment.

    Raises:
        ConfigError: the tracking store or the cluster cannot be used, or is too small.
    """
    session = open_session(config, experiment)
    tracker = session.tracker
    console().print(
        f"training {session.name}: {config.schedule.epochs} epochs, {session.placement}"
    )
    run_id = tracker.start(session.name, flat(config), session.tags)
    tracker.add_text(run_id, to_json(config), "config.json")
    outcome: Outcome = "failed"
    error = None
    try:
        with TrainingProgress(lambda: tracker.metrics(run_id), config.schedule.epochs):
            result = fit(
                config,
                session.placement,
                session.name,
                session.storage,
                [_Recorder(tracker, run_id)],
            )
        outcome = tracker.outcome(run_id)
        with result.checkpoint.as_directory() if result.checkpoint else nullcontext() as folder:
            if folder:
                tracker.add_file(run_id, Path(folder) / "weights.pt")
    except TrainingFailedError as failure:
        error = str(failure)
        raise
    finally:
        tracker.finish(run_id, outcome, {"error": error[:5000]} if error else None)
        ray.shutdown()
    return TrainingResult(outcome, tracker.metrics(run_id), run_id)


class _Recorder(UserCallback):
    """Writes every report to MLflow, from Ray Train's controller process."""

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self._tracker, self._run_id = tracker, run_id

    def after_report(
        self,
        run_context: Any,
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        self._tracker.log(self._run_id, metrics[0], metrics[0]["epoch"])
        # Ray's result forgets a last report without a checkpoint, as a diverged run's is.
        self._tracker.tag(self._run_id, "outcome", metrics[0]["outcome"])


def fit(
    config: Config, placement: Placement, name: str, storage: str, callbacks: list[UserCallback]
) -> ray.train.Result:
    """Trains `config` on the workers of `placement`; a run of that name continues where it was.

    Args:
        name: folder of the run in `storage`.
        callbacks: told of every report, in Ray Train's controller process.

    Returns:
        Ray's result: `metrics` of the last epoch and the `checkpoint` of its end.
    """
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"config": config},
        torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=placement.gpus_per_worker > 0,
            resources_per_worker=placement.per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            callbacks=callbacks,  # type: ignore[arg-type]
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    return trainer.fit()


def _train_worker(parameters: dict[str, Any]) -> None:
    context = ray.train.get_context()
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        worker = Worker(
            report=_report,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=get_device(),
            resume_from=Path(folder) if folder else None,
        )
        train(parameters["config"], worker)


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if folder else None)


def device_of(placement: Placement) -> torch.device:
    """Where a worker that runs in the current process computes."""
    return torch.device("cuda" if placement.gpus_per_worker else "cpu")
