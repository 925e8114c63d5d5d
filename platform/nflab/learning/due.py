"""When a checkpoint is due within an epoch."""

import time

import torch
import torch.distributed as dist

from nflab.learning.state import Saver
from nflab.learning.worker import Worker
from nflab.settings.config import Config

LOOK_SECONDS = 5.0
"""Between two looks, if a step takes no longer: a spot machine of AWS has two minutes."""

MOST_STEPS = 16
"""Between two looks."""


class Due:
    """Whether a checkpoint is due: by the first worker's clock, or because a worker is about to be
    ended."""

    def __init__(self, config: Config, worker: Worker, saver: Saver | None) -> None:
        """`saver`: the first worker's."""
        self._minutes = config.scale.checkpoint_minutes
        self._worker, self._saver = worker, saver
        self._ends = False
        self._left = self._since = 0
        self._looked = time.monotonic()

    def now(self) -> bool:
        """All workers are to ask after each step, and get one answer."""
        worker = self._worker
        self._since += 1
        if worker.checkpoints is None or self._since < self._left:
            return False
        worker.progressed()
        own = False
        if self._saver is not None and self._minutes is not None:
            own = time.monotonic() - self._saver.last >= 60 * self._minutes
        if not self._ends and (reason := worker.ends()):
            self._ends = own = True
            print(f"{reason}: a checkpoint is made", flush=True)
        seconds = (time.monotonic() - self._looked) / self._since
        told = torch.tensor([float(own), seconds], dtype=torch.float64, device=worker.device)
        if worker.world_size > 1:
            dist.all_reduce(told)
        due, seconds = told.tolist()
        # Of all workers together, so that all look again at one step.
        steps = LOOK_SECONDS * worker.world_size / max(seconds, 1e-9)
        self._left, self._since = max(1, min(MOST_STEPS, int(steps))), 0
        self._looked = time.monotonic()
        return due > 0
