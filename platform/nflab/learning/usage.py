"""What a training takes of its machines: processors, memory, and the GPU's own figures."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch
import torch.distributed as dist

from nflab.learning.worker import Worker

_MEGABYTE = 1_000_000


class Usage:
    """This worker's use of its machine between two calls of `pop`, gathered from all workers."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._process = psutil.Process()
        self._begun, self._cpu_seconds = time.monotonic(), self._cpu()
        self._gpu: dict[str, list[float]] = {}
        self._asked: dict[str, Callable[[torch.device], float]] = {}
        if worker.device.type == "cuda":
            self._asked["gpu_utilization_percentage"] = torch.cuda.utilization
            self._asked["gpu_power_watts"] = lambda device: torch.cuda.power_draw(device) / 1000

    def sample(self) -> None:
        """Looks at the GPU; to be called now and then."""
        for name, ask in list(self._asked.items()):
            try:
                self._gpu.setdefault(name, []).append(ask(self._worker.device))
            except Exception:  # NVIDIA's library is not there, or this GPU does not tell
                del self._asked[name]

    def pop(self) -> dict[str, float]:
        """Every worker's figures as MLflow's pages show them; all workers are to call it.

        Returns:
            below `system/worker_RANK`: `cpu_cores` that were busy on average, `memory_megabytes`
            that only the process and those that read its images hold, and of a GPU
            `gpu_memory_megabytes`, its most, `gpu_utilization_percentage` and `gpu_power_watts`.
        """
        now, cpu_seconds = time.monotonic(), self._cpu()
        own = {
            "cpu_cores": max(0.0, cpu_seconds - self._cpu_seconds) / max(now - self._begun, 1e-9),
            "memory_megabytes": self._memory() / _MEGABYTE,
        }
        self._begun, self._cpu_seconds = now, cpu_seconds
        if self._worker.device.type == "cuda":
            own["gpu_memory_megabytes"] = torch.cuda.max_memory_allocated() / _MEGABYTE
            torch.cuda.reset_peak_memory_stats()
        own |= {name: statistics.mean(seen) for name, seen in self._gpu.items()}
        self._gpu = {}
        each: list[Any] = [own]
        if self._worker.world_size > 1:
            each = [None] * self._worker.world_size
            dist.all_gather_object(each, own)
        return {
            f"system/worker_{rank}/{name}": value
            for rank, found in enumerate(each)
            for name, value in found.items()
        }

    def _cpu(self) -> float:
        """Seconds."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    def _memory(self) -> float:
        """Bytes."""
        return self._sum(lambda process: process.memory_full_info().uss)

    def _sum(self, ask: Callable[[psutil.Process], float]) -> float:
        """Over this process and those below it."""
        total = 0.0
        for process in [self._process, *self._process.children(recursive=True)]:
            with suppress(psutil.Error):  # it ended meanwhile, or does not tell
                total += ask(process)
        return total
