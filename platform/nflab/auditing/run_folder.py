"""What stands on disk of one run, sweep or grid."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pyarrow import fs

from nflab.recording.outbox import REJECTED
from nflab.settings.errors import ConfigError
from nflab.storage.checkpoints import COMPLETE, NAME, Mark, name_of, read_mark
from nflab.storage.files import folders, open_uri, read_text
from nflab.storage.run_folder import Identity, own_folder, read_identity

_MARKS = {
    "run.json",
    "experiment",
    "config.json",
    ".lock",
    "study.db",
    "study.json",
    "trials",
    "cells",
    "checkpoints",
    "unsent",
    "ray",
}
"""A folder with one of these is a run's."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    mark: Mark
    complete: bool
    size: int
    """Bytes."""


class RunFolder:
    """The folder of one run, sweep or grid, listed once."""

    def __init__(self, storage: str, name: str) -> None:
        self.address, self.name = f"{storage}/{name}", name
        files, root = open_uri(self.address)
        listed = files.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        self._sizes = {
            str(PurePosixPath(file.path).relative_to(root)): file.size
            for file in listed
            if file.type == fs.FileType.File
        }
        self.exists = bool(listed) or files.get_file_info(root).type == fs.FileType.Directory

    @cached_property
    def identity(self) -> Identity | None:
        """Which run it holds; None if it is from before folders said so, or if what it says is
        broken (see `damage`)."""
        try:
            return read_identity(self.address)
        except ConfigError:
            return None

    @cached_property
    def damage(self) -> str | None:
        """Why it cannot be told which run it holds."""
        try:
            read_identity(self.address)
        except ConfigError as error:
            return str(error)
        return None

    @cached_property
    def config(self) -> str | None:
        """The configuration that it was started with, as JSON."""
        return self._text("config.json")

    @property
    def own(self) -> Path:
        """Where on this machine its driver keeps what is its own."""
        return own_folder(self.address)

    @property
    def unsent(self) -> int:
        """How many requests wait for MLflow."""
        file = self.own / "unsent" / "requests.jsonl"
        return len(file.read_bytes().splitlines()) if file.is_file() else 0

    @property
    def rejected(self) -> int:
        """How many requests MLflow will never take."""
        file = self.own / "unsent" / REJECTED
        return len(file.read_bytes().splitlines()) if file.is_file() else 0

    @cached_property
    def checkpoints(self) -> dict[str, list[Saved]]:
        """Place of a run below the folder ("" is itself) -> its checkpoints, by epoch."""
        found: dict[tuple[str, Mark], dict[str, int]] = {}
        for path, size in self._sizes.items():
            parts = re.fullmatch(rf"((?:trials|cells)/[^/]+/|)checkpoints/({NAME})/(.+)", path)
            if parts:
                place, name, file = parts.groups()
                found.setdefault((place.rstrip("/"), read_mark(name)), {})[file] = size
        saved: dict[str, list[Saved]] = {}
        for (place, mark), sizes in sorted(found.items()):
            one = Saved(mark, COMPLETE in sizes, sum(sizes.values()))
            saved.setdefault(place, []).append(one)
        return saved

    def config_of(self, place: str) -> str | None:
        """The configuration that the last checkpoint of a run was trained with, as JSON."""
        for saved in reversed(self.checkpoints.get(place, [])):
            name = name_of(saved.mark)
            text = self._text(f"{place}/checkpoints/{name}/config.json".strip("/"))
            if text is not None:
                return text
        return None

    def _text(self, name: str) -> str | None:
        return read_text(f"{self.address}/{name}") if name in self._sizes else None


def run_names(storage: str) -> list[str]:
    """Names of the folders of a storage that hold a run, in order.

    Raises:
        OSError: the storage cannot be read.
    """
    files, root = open_uri(storage)
    found = []
    for folder in folders(files, root):
        inside = files.get_file_info(fs.FileSelector(folder))
        if _MARKS & {entry.base_name for entry in inside}:
            found.append(folder.rpartition("/")[2])
    return found
