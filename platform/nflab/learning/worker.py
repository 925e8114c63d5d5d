"""One process among those that train or evaluate together."""

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nflab.data import Dataset, DatasetError
from nflab.storage.checkpoints import Checkpoints


@dataclass(frozen=True)
class Worker:
    """One process's place among those that train a run together, and its line to the outside."""

    report: Callable[[dict[str, Any]], None]
    """Called by every worker after each epoch with the metrics."""
    rank: int = 0
    world_size: int = 1
    cores: int | None = None
    """CPU cores for this process and those that read its images; None: all that it may use."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gpu: str | None = None
    """What kind of GPU that is, in words; None if it is none, or is not known."""
    usd_per_hour: float | None = None
    """What this process costs, where that is known."""
    checkpoints: Checkpoints | None = None
    """Where rank 0 saves after each epoch, and what all continue from; None saves nothing."""
    ends: Callable[[], str | None] = lambda: None
    """Why this process is about to be ended, its machine taken away, say; None if it is not."""
    progressed: Callable[[], None] = lambda: None
    """Called as steps are done and images are evaluated, within long epochs too."""
    fingerprint: str | None = None
    """Of the driver's copy of the dataset; None if there is no other."""

    def check(self, dataset: Dataset) -> None:
        """Refuses a dataset that is not what the driver has.

        Raises:
            DatasetError: a part of it differs.
        """
        if self.fingerprint not in (None, dataset.fingerprint):
            raise DatasetError(
                f"the dataset on {platform.node()} is not the driver's: its fingerprint is "
                f"{dataset.fingerprint} here and {self.fingerprint} there; make them the same"
            )


def sum_over_workers(value: Tensor, worker: Worker) -> float:
    """The sum of what all workers of a run give, 0-d each; all are to call it."""
    total = value.clone()
    if worker.world_size > 1:
        dist.all_reduce(total)
    return float(total)
