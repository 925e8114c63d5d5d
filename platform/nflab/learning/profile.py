"""A trace of a training's first steps, by PyTorch's profiler."""

import gzip
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_WARM_UP = 3
"""Steps that are left out: in the first of a process memory and algorithms are sought."""

PROFILED = 100
"""Steps at most: a trace is held in memory."""

_TOLD = 3


class Profile:
    """Watches some steps of one worker.

    Args:
        steps: how many; 0 for none.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._seen, self._traced, self._told = steps, 0, 0, False
        self._on_gpu = device.type == "cuda"
        self._profile: profile | None = None
        self._found: dict[str, Any] = {}

    def before_step(self) -> None:
        """To be called before each step."""
        if self._steps and self._seen >= _WARM_UP and not self._told:
            if self._profile is None:
                activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_gpu]
                self._profile = profile(activities=activities, profile_memory=True)
                self._profile.start()
            elif self._traced == self._steps:
                self.finish()
        self._seen += 1
        self._traced += self._profile is not None

    def pop(self) -> dict[str, Any]:
        """Of steps that are through: `profile`, the largest costs in words, and `profile_trace`, as
        gzipped JSON, which Perfetto and Chrome show; empty if nothing is new."""
        found, self._found = self._found, {}
        return found

    def finish(self) -> None:
        """To be called after an epoch, which may have fewer steps."""
        if self._profile is None:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            trace = gzip.compress(file.read_bytes())
        # Side by side, for Ray Tune flattens what is nested.
        self._found = {"profile": self._said(self._profile), "profile_trace": trace}
        self._profile, self._told = None, True

    def _said(self, found: profile) -> str:
        spent = {
            event.key: event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
            for event in found.key_averages()
        }
        total = max(sum(spent.values()), 1e-9)
        largest = sorted(spent, key=lambda name: -spent[name])[:_TOLD]
        costs = ", ".join(f"{100 * spent[name] / total:.0f} % {name}" for name in largest)
        where = "the GPU's" if self._on_gpu else "the CPU's"
        return f"Of {where} time in {self._traced} steps: {costs}."
