"""What the folder of a run says of it: which run it is, and what it was started with."""

import dataclasses
import json
import uuid
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from nflab.settings import locations
from nflab.settings.config import Config, RunConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import C, replace
from nflab.settings.serialization import from_json, to_json
from nflab.storage.files import PATIENCE_SECONDS, is_local, open_uri, read_text, write_text

IDENTITY, CONFIG = "run.json", "config.json"
"""Files of a run's folder."""

OLD_EXPERIMENT = "experiment"
"""File that named the experiment before folders said which run they hold."""


@dataclass(frozen=True)
class Identity:
    """Which run it is, wherever something of it is kept: made once, compared ever after."""

    id: str
    """32 hex digits, also the mark of its run in MLflow and of its study."""
    name: str
    experiment: str
    dataset: str | None = None
    """Fingerprint of what it is trained on; None of a grid, or if the run is older than this."""
    pretrained: str | None = None
    """Digest of the weights that it begins from; None if there are none, or likewise."""


def read_identity(folder: str, patience: float = PATIENCE_SECONDS) -> Identity | None:
    """Which run a folder holds; None if none, or one from before folders said so.

    Raises:
        ConfigError: what it says cannot be understood.
        OSError: the storage cannot be read.
    """
    where = f"{folder}/{IDENTITY}"
    text = read_text(where, patience)
    if text is None:
        return None
    try:
        return Identity(**json.loads(text))
    except (ValueError, TypeError):
        raise ConfigError(f"{where} is damaged: put a copy of it back") from None


def identify(folder: str, name: str, experiment: str) -> Identity | None:
    """Which run a folder holds, compared with what is asked for; None if it holds none yet.

    Raises:
        ConfigError: it holds another one: it was copied or renamed, or another script's.
    """
    found = read_identity(folder)
    known = _config_name(folder)
    script = read_text(f"{folder}/{OLD_EXPERIMENT}") if found is None else found.experiment
    if script is not None and script != experiment:
        raise ConfigError(
            f"{name!r} was started by experiments/{script}.py: continue it with that, "
            "or choose another --name"
        )
    _require_own(folder, name, found.name if found else None, IDENTITY)
    _require_own(folder, name, known, CONFIG)
    return found


def has_run(folder: str) -> bool:
    """Whether a folder holds a run, of any age."""
    return any(read_text(f"{folder}/{file}") is not None for file in (IDENTITY, CONFIG))


def new_identity(
    name: str, experiment: str, dataset: str | None = None, id: str | None = None
) -> Identity:
    """Of a run that has none yet; `id` if MLflow knows one for it."""
    return Identity(id or uuid.uuid4().hex, name, experiment, dataset)


def write_identity(folder: str, identity: Identity) -> None:
    """Writes down which run a folder holds."""
    write_text(f"{folder}/{IDENTITY}", json.dumps(dataclasses.asdict(identity), indent=2) + "\n")


def write_config(folder: str, config: Config) -> None:
    """Writes down what the run of a folder was started with."""
    write_text(f"{folder}/{CONFIG}", to_json(config))


def stored_config(kind: type[C], name: str, storage: str | None) -> C:
    """The configuration that the run called `name` was started with, kept where it is found.

    Raises:
        ConfigError: there is no such run in the storage.
    """
    locations.check_name(name)
    where = locations.storage(RunConfig(storage=storage))
    try:
        text = read_text(f"{where}/{name}/{CONFIG}", patience=0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the storage {where}: {error}") from None
    if text is None:
        raise ConfigError(f"there is no run {name!r} to resume in {where}")
    with suppress(json.JSONDecodeError):  # reading it says what is wrong
        known = {part.name for part in fields(Config)}
        if set(json.loads(text)) - known != {part.name for part in fields(kind)} - known:
            raise ConfigError(
                f"{name!r} is of another kind: resume it with the script that started it"
            )
    config = replace(from_json(kind, text), storage=where)
    _require_own(f"{where}/{name}", name, config.run.name, CONFIG)
    return config


def own_folder(folder: str) -> Path:
    """Where on this machine the driver of a run keeps what is its own: Optuna's study, say.

    Args:
        folder: path or address of all that the run keeps.
    """
    if is_local(folder):
        return Path(folder)
    return locations.of_drivers() / folder.rsplit("/", 1)[-1]


def check_writable(storage: str) -> None:
    """Writes a file there, and deletes it again.

    Raises:
        ConfigError: that cannot be done.
    """
    probe = f"{storage}/.writable-{uuid.uuid4().hex}"
    try:
        write_text(probe, "", patience=0)
        files, path = open_uri(probe)
        files.delete_file(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot write to the storage {storage}: {reason}") from None


def _require_own(folder: str, name: str, said: str | None, file: str) -> None:
    """Refuses a folder whose `file` says that it holds another run than `name`."""
    if said is not None and said != name:
        raise ConfigError(
            f"{folder} holds the run {said!r}, as its {file} says, not {name!r}: a folder that was "
            f"copied or renamed cannot be continued; continue {said!r}, or start anew under "
            "another --name"
        )


def _config_name(folder: str) -> str | None:
    """The name in the configuration that a folder holds; None if it holds none, or a broken one."""
    text = read_text(f"{folder}/{CONFIG}")
    try:
        return None if text is None else str(json.loads(text)["run"]["name"])
    except (ValueError, KeyError, TypeError):
        return None
