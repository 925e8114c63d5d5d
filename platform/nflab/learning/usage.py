"""What a training takes of its machines: processors, memory, and the GPU's own figures."""

import statistics
import time
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
        self._gpu: list[tuple[float, float]] = []
        self._asks_gpu = worker.device.type == "cuda"

    def sample(self) -> None:
        """Looks at the GPU; to be called now and then."""
        if self._asks_gpu:
            try:
                device = self._worker.device
                self._gpu.append((torch.cuda.utilization(device), torch.cuda.power_draw(device)))
            except (ImportError, RuntimeError):  # NVIDIA's library for that is not there
                self._asks_gpu = False

    def pop(self) -> dict[str, float]:
        """Every worker's figures as MLflow's pages show them; all workers are to call it.

        Returns:
            below `system/worker_RANK`: `cpu_cores` that were busy on average, `memory_megabytes`
            of the process and those that read its images, and of a GPU
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
        if self._gpu:
            own["gpu_utilization_percentage"] = statistics.mean(one for one, _ in self._gpu)
            own["gpu_power_watts"] = statistics.mean(one for _, one in self._gpu) / 1000
            self._gpu = []
        each: list[Any] = [own]
        if self._worker.world_size > 1:
            each = [None] * self._worker.world_size
            dist.all_gather_object(each, own)
        return {
            f"system/worker_{rank}/{name}": value
            for rank, found in enumerate(each)
            for name, value in found.items()
        }

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def _cpu(self) -> float:
        total = 0.0
        for process in self._family():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:  # it ended meanwhile
                continue
            total += times.user + times.system
        return total

    def _memory(self) -> float:
        total = 0.0
        for process in self._family():
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total
