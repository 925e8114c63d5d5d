"""What a trial's process does: it trains one proposal.

Each is a new process, so it imports nothing that only the sweep's own process needs.
"""

import gc
import os
import traceback
from collections.abc import Callable
from typing import Any

import ray.tune
import torch
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from nflab.cluster.connection import cores_here, price_here
from nflab.cluster.hardware import gpu_of
from nflab.cluster.placement import ON_HEAD, Placement
from nflab.cluster.preemption import notice
from nflab.cluster.trained import progress
from nflab.learning.loop import train
from nflab.learning.memory import OutOfMemory
from nflab.learning.worker import Worker
from nflab.running.worker_group import first_error, fit
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import PATIENCE_SECONDS, is_away
from nflab.storage.logs import kept_log


def trainable(base: Config, placement: Placement) -> Callable[[dict[str, Any]], None]:
    """The Tune function that trains one proposal, with the resources it asks for.

    One worker trains in the trial's own process: Ray Train would start two more, which takes
    longer than a small run. More workers are a Ray Train run of their own.
    """

    def in_this_process(proposal: dict[str, Any]) -> None:
        folder = proposal["folder"]
        if notice()():  # Tune gives it another trial all the same; a new process begins elsewhere
            os._exit(0)
        # Else the next trial fails that takes over a process whose cut trial still copies its log.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(round(2 * PATIENCE_SECONDS))
        try:
            with kept_log(f"{folder}/logs", rank=0) as log:

                def report(metrics: dict[str, Any]) -> None:
                    log.report(metrics)
                    ray.tune.report(metrics)

                device = _device(placement)
                worker = Worker(
                    report=report,
                    device=device,
                    gpu=gpu_of(device),
                    cores=cores_here(placement),
                    usd_per_hour=price_here(placement),
                    checkpoints=Checkpoints.of_run(folder),
                    ends=notice(),
                    progressed=progress(),
                    fingerprint=proposal["fingerprint"],
                )
                _train(replace(base, **proposal["settings"]), worker)
        except Exception as error:
            if is_away(error):
                raise  # no error of the run: Tune starts the trial again
            ray.tune.report(_failed(traceback.format_exc()))

    def with_own_workers(proposal: dict[str, Any]) -> None:
        config = replace(base, **proposal["settings"])
        try:
            folder, fingerprint = proposal["folder"], proposal["fingerprint"]
            fit(config, placement, folder, TuneReportCallback(), fingerprint=fingerprint)
        except TrainingFailedError as failure:
            error = first_error(failure)
            ray.tune.report(_failed(error.text if error else str(failure)))

    if placement.num_workers == 1:
        return ray.tune.with_resources(in_this_process, placement.per_worker)
    # This process only waits: what trains asks for itself.
    return ray.tune.with_resources(with_own_workers, ON_HEAD)


def _train(config: Config, worker: Worker) -> None:
    """Trains, with fewer images at once when memory runs out."""
    while True:
        try:
            train(config, worker)
            return
        except OutOfMemory as full:
            print(full)
            config = replace(config, micro_batch_size=full.micro_batch_size)
        gc.collect()  # what the error held
        torch.cuda.empty_cache()


def _device(placement: Placement) -> torch.device:
    """The GPU that this process was given, if it can be used."""
    if not placement.gpus_per_worker:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    print("a GPU is reserved, but PyTorch finds none here: training on the CPU")
    return torch.device("cpu")


def _failed(error: str) -> dict[str, Any]:
    """The report of a run that raised an error: told once, for Tune would try it again."""
    return {"outcome": "failed", "error": error}
