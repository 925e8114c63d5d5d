"""When a checkpoint is due within an epoch."""

import time

import torch

from nflab.learning.state import Saver
from nflab.learning.worker import Worker, sum_over_workers
from nflab.settings.config import Config


class Due:
    """Whether a checkpoint is due: by the first worker's clock, or because a worker's machine is
    about to be taken away."""

    def __init__(self, config: Config, worker: Worker, saver: Saver | None) -> None:
        """`saver`: the first worker's."""
        self._minutes = config.scale.checkpoint_minutes
        self._worker, self._saver = worker, saver
        self._preempted = False

    def now(self) -> bool:
        """All workers are to ask, and get one answer."""
        worker = self._worker
        if worker.checkpoints is None:
            return False
        own = False
        if self._saver is not None and self._minutes is not None:
            own = time.monotonic() - self._saver.last >= 60 * self._minutes
        if not self._preempted and worker.is_preempted():
            self._preempted = own = True
            print("this machine is about to be taken away: a checkpoint is made", flush=True)
        told = torch.tensor(float(own), dtype=torch.float64, device=worker.device)
        return sum_over_workers(told, worker) > 0
