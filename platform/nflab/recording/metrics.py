"""Which metrics of a run are recorded."""

from collections.abc import Mapping
from typing import Any

METRICS = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_top1",
    "val_top5",
    "best_epoch",
    "best_val_top1",
    "test_loss",
    "test_top1",
    "test_top5",
    "learning_rate",
    "images_per_second",
    "world_size",
    "images_at_once",
    "replaced_images",
    "seconds",
    "data_wait_fraction",
    "checkpoint_seconds",
    "cost_usd",
    "clipped_fraction",
    "system",
)
"""What is recorded of a report."""


def to_record(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a report is recorded: METRICS, and what is below one of them."""
    return {k: float(v) for k, v in metrics.items() if k.split("/")[0] in METRICS}
