"""What every recorded run begins with: its identity, its stores and its place on the cluster."""

import dataclasses
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from nflab.cluster import connection
from nflab.cluster.placement import Placement
from nflab.data import Dataset, load_dataset
from nflab.data.dataset import changes, is_called
from nflab.learning.computation import computed
from nflab.recording.notes import experiment_tags
from nflab.recording.provenance import driver, software_tags
from nflab.recording.roots import FOLDER, find_root, named, refuse_taken
from nflab.recording.tracker import Tracker
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import C, replace
from nflab.settings.recipes import scales_of
from nflab.settings.studies import GridOfConfigs, SweepConfig, needs_prices
from nflab.storage.files import read_text, write_text
from nflab.storage.ownership import FolderBoard, Ownership
from nflab.storage.run_folder import (
    Identity,
    check_writable,
    has_run,
    identify,
    new_identity,
    own_folder,
    write_config,
    write_identity,
)
from nflab.terminal.interrupts import interrupts_deferred
from nflab.terminal.wording import say

CONTENTS = "dataset.json"
"""File in a run's folder that says what is in its dataset (see `Dataset.contents`)."""


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
    identity: Identity
    ownership: Ownership
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
        return self.identity.name


def open_session(config: C, experiment: str, resume: bool) -> Session[C]:
    """Opens the stores and connects to the cluster, for runs of one MLflow experiment.

    Args:
        resume: whether to continue the run called `config.run.name`; else the name must be new.

    Raises:
        ConfigError: the name exists, or what is kept under it is another run, or is being run; a
            store or the cluster cannot be used, or is too small; or a budget is given and the
            machines have no price.
    """
    name = config.run.name or f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    locations.check_name(name)
    storage, uri = locations.storage(config.run), locations.tracking_uri(config.run)
    # Workers run in folders of their own.
    config = replace(locations.located(config), name=name, storage=storage, tracking_uri=uri)
    folder = f"{storage}/{name}"
    check_writable(storage)
    tracker = Tracker(uri, storage, experiment)
    columns: list[tuple[str, ...]] = []
    if isinstance(config, SweepConfig):
        columns = [tuple(scales_of(config)), config.search.objectives]
    tracker.introduce(experiment_tags(experiment, tracker.experiment_id, *columns))
    ownership = Ownership()
    try:
        _refuse_known(folder, name, resume)
        own = str(own_folder(folder))
        for place in dict.fromkeys((folder, own)):  # what waits for MLflow is in its driver's own
            ownership.take(FolderBoard(place), folder, say)
        _refuse_known(folder, name, resume)
        identity = _identity(tracker, folder, name, experiment)
        with interrupts_deferred():
            placement = connection.connect(config.scale, needs_prices(config))
        dataset = load_dataset(config)
        if dataset.left_out:
            say(f"{config.data.dataset}: left out are {dataset.left_out}")
        identity = _of_same_contents(
            identity or new_identity(name, experiment), config, dataset, folder
        )
        tags = {
            **software_tags(),
            "mlflow.source.name": f"experiments/{experiment}.py",
            "mlflow.source.type": "LOCAL",
            "dataset_fingerprint": dataset.fingerprint,
            "world_size": str(config.scale.num_workers),
            "placement": str(placement),
            "driver": driver(),
            **({"machines": placement.machines} if placement.machines else {}),
        }
        # A folder with a configuration alone is begun again.
        write_config(folder, config)
        write_identity(folder, identity)
        if identity.dataset is not None:
            write_text(f"{folder}/{CONTENTS}", json.dumps(dataset.contents, indent=0))
    except BaseException:
        ownership.release()
        connection.disconnect()
        raise
    return Session(
        config, folder, tracker, placement, dataset.class_names, tags, identity, ownership
    )


def _refuse_known(folder: str, name: str, resume: bool) -> None:
    if not resume and has_run(folder):
        raise ConfigError(
            f"{name!r} exists: continue it with --resume {name}, or choose another --name"
        )


def _of_same_contents(
    identity: Identity, config: Config, dataset: Dataset, folder: str
) -> Identity:
    """The identity with what its run is trained on and begins from, compared with what it was begun
    with. A grid has neither: each of its cells has its own.

    Raises:
        ConfigError: something has changed.
    """
    if isinstance(config, GridOfConfigs):
        return identity
    begun = f"is not what {identity.name!r} was begun with"
    put_back = "put it back as it was, or start anew under another --name"
    made_of = computed(config)
    if not (identity.dataset is None or is_called(dataset, identity.dataset)):
        how = f"its fingerprint is {dataset.fingerprint} and was {identity.dataset}"
        with suppress(ValueError, TypeError, AttributeError):
            before = json.loads(read_text(f"{folder}/{CONTENTS}") or "{}")
            how = changes(before, dataset.contents) if before else how
        raise ConfigError(f"{config.data.dataset} {begun}: {how}; {put_back}")
    if identity.pretrained not in (None, made_of["pretrained"]):
        raise ConfigError(
            f"{config.model.pretrained} {begun}: its digest is {made_of['pretrained']} and was "
            f"{identity.pretrained}; {put_back}"
        )
    return dataclasses.replace(
        identity, dataset=made_of["dataset"], pretrained=made_of["pretrained"]
    )


def _identity(tracker: Tracker, folder: str, name: str, experiment: str) -> Identity | None:
    """Which run is asked for, as the folder and MLflow say alike; None if it is a new one.

    Raises:
        ConfigError: they do not, or MLflow's run was deleted.
    """
    identity = identify(folder, name, experiment)
    if identity is not None:
        if find_root(tracker, identity, folder) is None:
            refuse_taken(tracker, name)
        return identity
    if not has_run(folder):
        refuse_taken(tracker, name)
        return None
    # From before runs said which they are: then the name alone did.
    storage = folder.rpartition("/")[0]
    before = [
        run
        for run in named(tracker, name)
        if FOLDER not in run.data.tags and run.data.params.get("storage", storage) == storage
    ]
    if not before:
        return None
    mark = before[0].data.tags.get("record")
    old = new_identity(name, experiment, before[0].data.tags.get("dataset_fingerprint"), mark)
    if mark is None:
        tracker.tag(before[0].info.run_id, "record", old.id)
    return old
