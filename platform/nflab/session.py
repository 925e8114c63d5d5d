"""What every recorded run begins with: its name, its stores and its place on the cluster."""

import time
from dataclasses import dataclass

from nflab import cluster, locations
from nflab.cluster import Placement
from nflab.config import Config
from nflab.data import load_dataset
from nflab.tracking import Tracker, code_tags


@dataclass(frozen=True)
class Session:
    """Where a run or sweep happens and is recorded."""

    name: str
    """Name in MLflow, and of the folder in `storage`."""
    storage: str
    """Folder or URI of checkpoints and results."""
    tracker: Tracker
    placement: Placement
    tags: dict[str, str]
    """What every run of the session is tagged with."""


def open_session(config: Config, experiment: str) -> Session:
    """Opens the tracking store and connects to the cluster, for runs of one MLflow experiment.

    Raises:
        ConfigError: the tracking store or the cluster cannot be used, or is too small.
    """
    storage = locations.storage(config.run)
    tracker = Tracker(locations.tracking_uri(config.run), storage, experiment)
    placement = cluster.place(config.scale, cluster.connect())
    return Session(
        name=config.run.name or f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}",
        storage=storage,
        tracker=tracker,
        placement=placement,
        tags={
            **code_tags(),
            "dataset_fingerprint": load_dataset(config.data.dataset).fingerprint,
            "world_size": str(placement.num_workers),
            "placement": str(placement),
        },
    )
