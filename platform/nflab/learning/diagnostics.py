"""What adaptive gradient clipping does to each layer, step by step, while a network trains."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import nfnet

COLUMNS = 256
"""About how many steps of a training are looked at, evenly spread, whatever its length."""

STRIDE = 4
"""At least so many steps lie from one look to the next, so that all looks together are cheap."""

QUANTILES = (0.1, 0.5, 0.9)
"""Of the ratios ||G|| / ||W|| over the units of a layer."""

NAMED = 4
"""Layers that a verdict names."""

LATE = 0.25
"""Part of the training, at its end, on which the verdict rests."""

Trace = list[dict[str, Any]]


class Diagnostics:
    """Takes down, at steps evenly spread over a training, the ratios that AGC compares with its
    threshold; between these steps it costs nothing."""

    def __init__(self, model: nn.Module, optimizer: nfnet.SGD_AGC, steps: int) -> None:
        """`steps`: of the whole training."""
        self._optimizer = optimizer
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._clipping = next(
            (g["clipping"] for g in optimizer.param_groups if g["clipping"] is not None), None
        )
        self._stride = max(STRIDE, -(-steps // COLUMNS))
        self._taken: list[tuple[int, dict[Tensor, Tensor]]] = []

    def before(self, step: int) -> None:
        """To be called before each step of the optimizer."""
        taken = self._clipping is not None and step % self._stride == 0
        self._optimizer.ratios = {} if taken else None
        if self._optimizer.ratios is not None:
            self._taken.append((step, self._optimizer.ratios))

    def state_dict(self) -> list[tuple[int, dict[str, Tensor]]]:
        """What was taken down since `pop`, by the parameters' names."""
        return [
            (step, {self._names[p]: ratio for p, ratio in ratios.items()})
            for step, ratios in self._taken
        ]

    def load_state_dict(self, state: list[tuple[int, dict[str, Tensor]]]) -> None:
        """Goes on."""
        named = {name: p for p, name in self._names.items()}
        self._taken = [
            (step, {named[name]: ratio for name, ratio in ratios.items()}) for step, ratios in state
        ]

    def pop(self) -> Trace:
        """A row for each layer and step since the last call: `step`, `layer`, `units`, `clipped`
        and `at_floor` (shares of its units whose gradient was clipped, and whose weight norm stood
        at AGC's lower bound), `q10`, `q50` and `q90` of the units' ratios."""
        taken = [(step, ratios) for step, ratios in self._taken if ratios]
        self._taken = []
        if not taken:
            return []
        layers: dict[str, list[Tensor]] = {}
        for p in taken[0][1]:
            layers.setdefault(self._names[p].rpartition(".")[0], []).append(p)
        rows = []
        for module, params in layers.items():
            # Of the head the bias alone is clipped.
            layer = module if len(params) > 1 else self._names[params[0]]
            signed_SU = torch.stack([torch.cat([r[p] for p in params]) for _, r in taken])
            signed = signed_SU.cpu().numpy()
            ratios = np.abs(signed)
            low, middle, high = np.quantile(ratios, QUANTILES, axis=1)
            clipped = (ratios > self._clipping).mean(axis=1)
            at_floor = (signed < 0).mean(axis=1)
            for n, (step, _) in enumerate(taken):
                rows.append(
                    {
                        "step": step,
                        "layer": layer,
                        "units": ratios.shape[1],
                        "clipped": float(clipped[n]),
                        "at_floor": float(at_floor[n]),
                        "q10": float(low[n]),
                        "q50": float(middle[n]),
                        "q90": float(high[n]),
                    }
                )
        return rows


def verdict(trace: pd.DataFrame, clipping: float) -> str:
    """What clipping did in a training, in a sentence.

    Args:
        trace: rows of `Diagnostics.pop`.
    """
    finite = np.isfinite(trace.q50).groupby(trace.step).transform("all")
    lost, looked = trace.step[~finite].nunique(), trace.step.nunique()
    if lost == looked:
        return f"gradients were finite at none of the {looked} steps looked at"
    if lost:
        return (
            f"{verdict(trace[finite], clipping)}; gradients were not finite at {lost} of "
            f"{looked} steps looked at, which are left out"
        )
    shares = trace.assign(count=trace.clipped * trace.units).groupby("step")
    clipped = shares["count"].sum() / shares.units.sum()
    is_late = clipped.index >= (1 - LATE) * clipped.index.max()
    late, early = float(clipped[is_late].mean()), clipped[~is_late]
    told = f"{late:.1%} of all units clipped in the last quarter of training"
    if len(early):
        told += f", {early.mean():.1%} before"
    looks = trace[trace.step.isin(clipped.index[is_late])].groupby("layer", sort=False)
    mostly = looks.clipped.mean()
    named = [str(layer) for layer in mostly.index[mostly > 0.5]]
    if named:
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        told += f"; mostly clipped: {', '.join(named[:NAMED])}{more}"
    if late > 0.5:
        return f"too tight: {told}; a larger clipping than {clipping:g} would let it learn more"
    if not clipped.max():
        return f"idle: a clipping of {clipping:g} clipped no unit at {len(clipped)} steps looked at"
    return f"active: {told}"
