"""What a search aims at: metrics of a trial's last epoch, and which way is better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Objective:
    """One aim.

    Attributes:
        direction: in which it is better, in Optuna's words.
        words: what it is, with its unit.
        measured: whether it depends on the machine, and not on the configuration alone.
    """

    direction: Literal["maximize", "minimize"]
    words: str
    measured: bool = False


OBJECTIVES: Mapping[str, Objective] = {
    "val_top1": Objective("maximize", "validation top-1 (%)"),
    "val_loss": Objective("minimize", "validation loss"),
    "seconds": Objective("minimize", "training time (s)", measured=True),
    "cost_usd": Objective("minimize", "training cost (USD)", measured=True),
    "images_per_second": Objective("maximize", "speed of the last epoch (images/s)", measured=True),
}
"""By the name of the metric."""

DEFAULT = ("val_top1",)
"""What a search aims at that names nothing else; first among others, too."""


def losses(result: Mapping[str, Any], objectives: Sequence[str]) -> tuple[float, ...]:
    """What is better the lower it is, of each aim of a result."""
    signs = (-1.0 if OBJECTIVES[name].direction == "maximize" else 1.0 for name in objectives)
    return tuple(sign * result[name] for sign, name in zip(signs, objectives, strict=True))
