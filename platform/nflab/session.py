"""What every recorded run begins with: its name, its stores and its place on the cluster."""

import time
from dataclasses import dataclass
from typing import Generic

from nflab import cluster, locations
from nflab.cluster import Placement
from nflab.config import C, ConfigError, RunConfig, from_json, replace, to_json
from nflab.data import load_dataset
from nflab.files import open_uri, read_text, write_text
from nflab.interrupts import interrupts_deferred
from nflab.tracking import Tracker, code_tags


@dataclass(frozen=True)
class Session(Generic[C]):
    """Where a run or sweep happens and is recorded."""

    config: C
    """With the name, storage and tracking store that were chosen."""
    folder: str
    """Path or address of all that the run keeps."""
    tracker: Tracker
    placement: Placement
    tags: dict[str, str]
    """What every run of the session is tagged with."""

    @property
    def name(self) -> str:
        """Name in MLflow, and of the folder."""
        return str(self.config.run.name)


def open_session(config: C, experiment: str, resume: bool) -> Session[C]:
    """Opens the stores and connects to the cluster, for runs of one MLflow experiment.

    Args:
        resume: whether to continue the run called `config.run.name`; else the name must be new.

    Raises:
        ConfigError: the name exists, a store or the cluster cannot be used, or is too small.
    """
    name = config.run.name or f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    storage, uri = locations.storage(config.run), locations.tracking_uri(config.run)
    config = replace(config, name=name, storage=storage, tracking_uri=uri)
    folder = f"{storage}/{name}"
    _check_writable(storage)
    tracker = Tracker(uri, storage, experiment)
    exists = read_text(_config_file(folder)) is not None or tracker.find(name) is not None
    if exists and not resume:
        raise ConfigError(
            f"{name!r} exists: continue it with --resume {name}, or choose another --name"
        )
    with interrupts_deferred():
        placement = cluster.connect(config.scale)
    write_text(_config_file(folder), to_json(config))
    tags = {
        **code_tags(),
        "dataset_fingerprint": load_dataset(config.data.dataset).fingerprint,
        "world_size": str(placement.num_workers),
        "placement": str(placement),
    }
    return Session(config, folder, tracker, placement, tags)


def stored_config(kind: type[C], name: str, storage: str | None) -> C:
    """The configuration that the run called `name` was started with, kept where it is found.

    Raises:
        ConfigError: there is no such run in the storage.
    """
    where = locations.storage(RunConfig(storage=storage))
    text = read_text(_config_file(f"{where}/{name}"))
    if text is None:
        raise ConfigError(f"there is no run {name!r} to resume in {where}")
    return replace(from_json(kind, text), storage=where)


def _config_file(folder: str) -> str:
    return f"{folder}/config.json"


def _check_writable(storage: str) -> None:
    probe = f"{storage}/.writable-{time.time_ns()}"
    try:
        write_text(probe, "")
        files, path = open_uri(probe)
        files.delete_file(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot write to the storage {storage}: {reason}") from None
