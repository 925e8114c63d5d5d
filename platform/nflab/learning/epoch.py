"""What an epoch adds up while it goes on, which a checkpoint in its midst keeps."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import nfnet
from nflab.learning.diagnostics import Diagnostics
from nflab.learning.worker import Worker


class EpochSums:
    """Sums over the steps of one epoch.

    Attributes:
        loss: of this worker's images, 0-d, float64, on the device.
        replaced: images of this worker that cannot be read.
        seconds: that earlier processes have spent on the epoch.
        usd: what they cost, where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: nfnet.SGD_AGC,
        diagnostics: Diagnostics | None,
        worker: Worker,
    ) -> None:
        self._worker, self._diagnostics = worker, diagnostics
        self.clipped = ClippedFraction(model, optimizer)
        self.begin()

    def begin(self) -> None:
        """A new epoch."""
        self.loss = torch.zeros((), dtype=torch.float64, device=self._worker.device)
        self.replaced = 0
        self.seconds = self.usd = 0.0

    def state_dict(self, seconds: float, usd: float) -> dict[str, Any]:
        """What `load_state_dict` goes on from; all workers are to call it.

        Args:
            seconds: that this process has spent on the epoch.
            usd: what all workers have cost for it.
        """
        worker = self._worker
        each = torch.zeros(2, worker.world_size, dtype=torch.float64, device=worker.device)
        each[0, worker.rank], each[1, worker.rank] = self.loss, self.replaced
        if worker.world_size > 1:
            dist.all_reduce(each)
        return {
            "losses": each[0].tolist(),
            "replaced": each[1].tolist(),
            "seconds": self.seconds + seconds,
            "usd": self.usd + usd,
            "clipped": self.clipped.state_dict(),
            "diagnostics": None if self._diagnostics is None else self._diagnostics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with an epoch: exactly, on as many workers as before."""
        worker = self._worker
        losses, replaced = state["losses"], state["replaced"]
        if len(losses) != worker.world_size:  # the sum is what counts
            others = [0.0] * (worker.world_size - 1)
            losses, replaced = [sum(losses), *others], [sum(replaced), *others]
        self.loss += losses[worker.rank]
        self.replaced = int(replaced[worker.rank])
        self.seconds, self.usd = state["seconds"], state.get("usd", 0.0)
        self.clipped.load_state_dict(state["clipped"])
        if self._diagnostics is not None and state["diagnostics"] is not None:
            self._diagnostics.load_state_dict(state["diagnostics"])


class ClippedFraction:
    """Share of the units of each layer group that AGC clipped, averaged over steps."""

    def __init__(self, model: nn.Module, optimizer: nfnet.SGD_AGC) -> None:
        self._optimizer = optimizer
        self._groups: dict[Tensor, str] = {
            p: nfnet.layer_group(name) for name, p in model.named_parameters()
        }
        self._steps = 0
        self._sums: list[Tensor] = []

    def update(self) -> None:
        """Adds the optimizer's last step."""
        fractions = list(self._optimizer.clipped_fraction.values())
        if not self._sums:
            self._sums = [torch.zeros_like(f) for f in fractions]
        if fractions:
            torch._foreach_add_(self._sums, fractions)
        self._steps += 1

    def pop(self) -> dict[str, float]:
        """`clipped_fraction/<layer group>` since the last call; empty without clipping."""
        units: dict[str, float] = {}
        clipped: dict[str, float] = {}
        for p, total in zip(self._optimizer.clipped_fraction, self._sums, strict=True):
            group, count = self._groups[p], nfnet.num_units(p)
            units[group] = units.get(group, 0) + count
            clipped[group] = clipped.get(group, 0) + count * float(total) / self._steps
        self._steps, self._sums = 0, []
        return {f"clipped_fraction/{group}": clipped[group] / units[group] for group in units}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return {"steps": self._steps, "sums": [total.clone() for total in self._sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on."""
        self._steps, self._sums = state["steps"], state["sums"]
