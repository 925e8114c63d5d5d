"""Which runs are being run: each holds a lock in its folder as long as its process lives."""

import fcntl
from pathlib import Path
from typing import IO

from nflab.settings import locations
from nflab.settings.errors import ConfigError
from nflab.storage.files import is_local


def own_folder(folder: str) -> Path:
    """Where on this machine the driver of a run keeps what is its own: Optuna's study, say.

    Args:
        folder: path or address of all that the run keeps.
    """
    if is_local(folder):
        return Path(folder)
    return locations.of_drivers() / folder.rsplit("/", 1)[-1]


def lock_file(folder: str) -> Path:
    """The file that is locked while a run goes on."""
    return own_folder(folder) / ".lock"


def lock_run(folder: str) -> IO[str]:
    """Marks a run as being run by this process, as long as the file is open.

    Raises:
        ConfigError: another process runs it.
    """
    file = lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(f"another process is running {folder}: wait for it, or end it") from None
    return lock


def is_being_run(folder: str) -> bool:
    """Whether a process of this machine runs it."""
    if not lock_file(folder).is_file():
        return False
    try:
        lock_run(folder).close()
    except ConfigError:
        return True
    return False
