"""The runs in MLflow that are no other's children, found by what they are and never by name."""

from collections.abc import Mapping

from mlflow.entities import Run, ViewType

from nflab.recording.tracker import PARENT, Tracker
from nflab.settings.errors import ConfigError
from nflab.storage.files import Away
from nflab.storage.run_folder import Identity, read_identity

FOLDER = "folder"
"""Tag of where a run keeps its checkpoints and logs."""


def find_root(tracker: Tracker, identity: Identity, folder: str) -> Run | None:
    """The run of an identity; None if MLflow never had one.

    Args:
        folder: where the identity was found.

    Raises:
        ConfigError: it was deleted, or the folder is a copy of that which it belongs to.
    """
    found = tracker.marked(identity.id)
    if not found:
        deleted = tracker.marked(identity.id, ViewType.DELETED_ONLY)
        # One that gave way to an owner of its name was never more than begun.
        deleted = [run for run in deleted if WITHDRAWN not in run.data.tags]
        if deleted:
            raise ConfigError(
                f"the run of {identity.name!r} was deleted in MLflow at {tracker.uri}: restore "
                f"it there (experiment {identity.experiment}, run {deleted[0].info.run_id}), or "
                "start anew under another --name"
            )
        return None
    home = found[0].data.tags.get(FOLDER, folder)
    if home != folder:
        try:
            known = read_identity(home, patience=0)
        except Away:
            raise
        except (ConfigError, OSError, ValueError):
            known = None
        if known is not None and known.id == identity.id:
            raise ConfigError(
                f"{folder} is a copy of {home}, which MLflow's run of {identity.name!r} belongs "
                "to: continue that one, or start anew under another --name"
            )
    return found[0]


def named(tracker: Tracker, name: str) -> list[Run]:
    """The runs of a name that are no others' children, the oldest first."""
    found = tracker.search(f"attributes.run_name = '{name}'")
    return [run for run in found if PARENT not in run.data.tags]


def refuse_taken(tracker: Tracker, name: str) -> None:
    """Refuses a name that a run of another folder has.

    Raises:
        ConfigError: likewise.
    """
    for run in named(tracker, name):
        where = run.data.tags.get(FOLDER)
        told = f", kept in {where}," if where else ""
        raise ConfigError(
            f"{name!r} exists in MLflow at {tracker.uri}{told} and belongs to another folder than "
            "this --storage has: choose another --name, or continue it in its own --storage"
        )


WITHDRAWN = "withdrawn"
"""Tag of a run that was begun while another process had its name."""


def begin_root(
    tracker: Tracker, identity: Identity, folder: str, tags: Mapping[str, str]
) -> tuple[str, bool]:
    """The id of the run of an identity, which is made if there is none, and whether it was.

    What a first try that failed in its midst has begun is completed.

    Raises:
        ConfigError: see `find_root`; or another folder's run has the name.
    """
    new = find_root(tracker, identity, folder) is None
    if new:
        refuse_taken(tracker, identity.name)
    return tracker.start(identity.name, {**tags, FOLDER: folder}, key=identity.id), new
