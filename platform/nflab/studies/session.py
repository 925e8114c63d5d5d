"""What every recorded run begins with: its name, its stores and its place on the cluster."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic

from nflab.cluster import connection
from nflab.cluster.placement import Placement
from nflab.data import load_dataset
from nflab.recording.notes import experiment_tags
from nflab.recording.provenance import code_tags
from nflab.recording.tracker import Tracker
from nflab.settings import locations
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import C, flat, replace
from nflab.settings.serialization import to_json
from nflab.storage.files import open_uri, read_text, write_text
from nflab.storage.lock import lock_run, own_folder
from nflab.storage.run_folder import config_file, experiment_file
from nflab.terminal.interrupts import interrupts_deferred


@dataclass(frozen=True)
class Session(Generic[C]):
    """Where a run or sweep happens and is recorded."""

    config: C
    """With the name, storage and tracking store that were chosen."""
    folder: str
    """Path or address of all that the run keeps."""
    tracker: Tracker
    placement: Placement
    class_names: tuple[str, ...]
    """Of the dataset, in the order of the labels."""
    tags: dict[str, str]
    """What every run of the session is tagged with."""
    lock: IO[str] | None
    """Held while the run goes on, so that no other process goes on with it too."""

    @property
    def local_folder(self) -> Path:
        """Where on this machine the driver keeps what is its own: Optuna's study, say."""
        folder = own_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def outbox_folder(self) -> Path:
        """Where requests wait that MLflow has not taken."""
        return self.local_folder / "unsent"

    @property
    def name(self) -> str:
        """Name in MLflow, and of the folder."""
        return str(self.config.run.name)


def open_session(config: C, experiment: str, resume: bool) -> Session[C]:
    """Opens the stores and connects to the cluster, for runs of one MLflow experiment.

    Args:
        resume: whether to continue the run called `config.run.name`; else the name must be new.

    Raises:
        ConfigError: the name exists, a store or the cluster cannot be used, or is too small, or a
            budget is given and the machines have no price.
    """
    name = config.run.name or f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    storage, uri = locations.storage(config.run), locations.tracking_uri(config.run)
    config = replace(
        config,
        name=name,
        storage=storage,
        tracking_uri=uri,
        # Workers run in folders of their own.
        dataset=locations.absolute(config.data.dataset),
        pretrained=locations.absolute(config.model.pretrained),
    )
    folder = f"{storage}/{name}"
    _check_writable(storage)
    tracker = Tracker(uri, storage, experiment)
    tracker.introduce(experiment_tags(experiment, tracker.experiment_id))
    lock = lock_run(folder)
    script = read_text(experiment_file(folder))
    if script not in (None, experiment):
        raise ConfigError(
            f"{name!r} was started by experiments/{script}.py: continue it with that, "
            "or choose another --name"
        )
    exists = read_text(config_file(folder)) is not None or tracker.find(name) is not None
    if exists and not resume:
        raise ConfigError(
            f"{name!r} exists: continue it with --resume {name}, or choose another --name"
        )
    with interrupts_deferred():
        priced = flat(config).get("max_cost") is not None
        placement = connection.connect(config.scale, priced)
    dataset = load_dataset(config)
    tags = {
        **code_tags(),
        "mlflow.source.name": f"experiments/{experiment}.py",
        "mlflow.source.type": "LOCAL",
        "dataset_fingerprint": dataset.fingerprint,
        "world_size": str(placement.num_workers),
        "placement": str(placement),
        **({"machines": placement.machines} if placement.machines else {}),
    }
    write_text(experiment_file(folder), experiment)
    write_text(config_file(folder), to_json(config))
    return Session(config, folder, tracker, placement, dataset.class_names, tags, lock)


def _check_writable(storage: str) -> None:
    probe = f"{storage}/.writable-{time.time_ns()}"
    try:
        write_text(probe, "", patience=0)
        files, path = open_uri(probe)
        files.delete_file(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot write to the storage {storage}: {reason}") from None
