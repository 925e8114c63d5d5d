"""What the folder of a run says of it."""

import json
from contextlib import suppress
from dataclasses import fields

from nflab.settings import locations
from nflab.settings.config import Config, RunConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import C, replace
from nflab.settings.serialization import from_json
from nflab.storage.files import read_text


def stored_config(kind: type[C], name: str, storage: str | None) -> C:
    """The configuration that the run called `name` was started with, kept where it is found.

    Raises:
        ConfigError: there is no such run in the storage.
    """
    where = locations.storage(RunConfig(storage=storage))
    try:
        text = read_text(config_file(f"{where}/{name}"), patience=0)
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
    return replace(from_json(kind, text), storage=where)


def config_file(folder: str) -> str:
    return f"{folder}/config.json"


def experiment_file(folder: str) -> str:
    return f"{folder}/experiment"
