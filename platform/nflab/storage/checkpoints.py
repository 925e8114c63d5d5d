"""The checkpoints of one run, in a folder or in object storage: the last two and the best.

One is made after each epoch, and in long epochs between (see `Mark`).

While a run goes on it has three at most (four in the moment of saving): the last may turn out to be
damaged when it is read again. A training that has finished has the last and the best; of a sweep or
grid only the best run, or those that no other beats in several aims, and those that failed, keep
theirs when they end.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from nflab.settings.outcomes import Standing, front
from nflab.storage.files import PATIENCE_SECONDS, folders, open_uri, patiently

COMPLETE = "complete"
"""File that is written last into a checkpoint: size in bytes and SHA-256 of each of the others."""

CHUNK_BYTES = 8 << 20
"""Read and written at once."""

NAME = r"epoch-\d{6}(?:-\d{8})?"
"""Of a checkpoint's folder."""

Mark = tuple[int, int]
"""How far a checkpoint's run had come: whole epochs, and steps of the next one."""

NO_RIVALS = "none"
"""Tag `rivals` of a cell whose checkpoints are kept whatever other cells give; else the tag names
the list of cells of which the best one's are kept."""


class Checkpoints:
    """Checkpoints of one run below an address; a run that starts again continues from the last."""

    def __init__(self, uri: str) -> None:
        """`uri`: an absolute path, or an address such as s3://bucket/run, of all its processes."""
        self._uri = uri

    @classmethod
    def of_run(cls, folder: str) -> "Checkpoints":
        """Those of the run that keeps all it has in `folder`."""
        return cls(f"{folder}/checkpoints")

    def save(self, folder: Path, epoch: int, best: int | None = None, step: int = 0) -> None:
        """Copies `folder` as the checkpoint of `epoch`, or of a step of the epoch after it; then
        forgets all but it, the one before it and that of the epoch `best`.

        A process killed at any moment, and a machine that loses its power, leaves either this
        checkpoint or the one before it.

        Raises:
            OSError: it cannot be written.
        """

        def copy() -> None:
            files, root = open_uri(self._uri)
            target = f"{root}/{name_of((epoch, step))}"
            files.create_dir(target, recursive=True)
            _delete_file(files, f"{target}/{COMPLETE}")
            written = {}
            # Not fs.copy_files: it is silent about an upload that fails when its file is closed.
            for path in sorted(folder.iterdir()):
                with (
                    path.open("rb") as file,
                    files.open_output_stream(f"{target}/{path.name}") as stream,
                ):
                    written[path.name] = _copy(file, stream)
                _to_disk(files, f"{target}/{path.name}")
            with files.open_output_stream(f"{target}/{COMPLETE}") as marker:
                marker.write(json.dumps(written, indent=2).encode())
            for path_on_disk in (f"{target}/{COMPLETE}", target, root):
                _to_disk(files, path_on_disk)

        patiently(self._uri, copy)
        before = [mark for mark in self._marks() if mark < (epoch, step)][-1:]
        self.purge({(epoch, step), epoch if best is None else best, *before})

    def purge(self, kept: Collection[int | Mark] = ()) -> None:
        """Forgets all of them but those `kept`, named by their epochs or marks.

        Raises:
            OSError: they cannot be deleted.
        """

        def delete() -> None:
            files, root = open_uri(self._uri)
            marks = ((one, 0) if isinstance(one, int) else one for one in kept)
            spared = {f"{root}/{name_of(mark)}" for mark in marks}
            for path in _folders(files, root):
                if path not in spared:
                    _delete_file(files, f"{path}/{COMPLETE}")  # first: half of one is none
                    files.delete_dir(path)

        patiently(self._uri, delete)

    def last_mark(self, patience: float = PATIENCE_SECONDS) -> Mark | None:
        """How far the last checkpoint's run had come; None if there is none.

        Args:
            patience: seconds for which a store that is away is waited for.

        Raises:
            OSError: it cannot be read.
        """
        return max(self._marks(patience), default=None)

    def _marks(self, patience: float = PATIENCE_SECONDS) -> list[Mark]:
        """Those of the checkpoints that were written whole, in order."""

        def look() -> list[Mark]:
            files, root = open_uri(self._uri)
            return [
                read_mark(path.rpartition("/")[2])
                for path in _folders(files, root)
                if files.get_file_info(f"{path}/{COMPLETE}").type == fs.FileType.File
            ]

        return patiently(self._uri, look, patience)

    @contextmanager
    def last(self) -> Iterator["Last"]:
        """A local copy of the last checkpoint that holds what was written, while in use.

        Raises:
            OSError: it cannot be read.
        """
        damaged: list[str] = []
        with tempfile.TemporaryDirectory() as temporary:
            for mark in reversed(self._marks()):
                folder = Path(temporary) / name_of(mark)
                wrong = self._fetch(mark, folder)
                if not wrong:
                    yield Last(folder, " and ".join(damaged) or None)
                    return
                damaged.append(
                    f"the checkpoint of {in_words(mark)} is left aside, for {' and '.join(wrong)} "
                    f"{'is' if len(wrong) == 1 else 'are'} not what was written"
                )
            yield Last(None, " and ".join(damaged) or None)

    def _fetch(self, mark: Mark, folder: Path) -> list[str]:
        """Copies a checkpoint into a folder; returns the names of files that are not as written."""

        def copy() -> list[str]:
            files, root = open_uri(self._uri)
            path = f"{root}/{name_of(mark)}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            found = {}
            for info in files.get_file_info(fs.FileSelector(path)):
                with (
                    files.open_input_stream(info.path) as file,
                    (folder / info.base_name).open("wb") as to,
                ):
                    found[info.base_name] = _copy(file, to)
            text = (folder / COMPLETE).read_bytes()
            if not text:  # of a checkpoint from before it said what is in it
                return []
            try:
                written = json.loads(text)
                return [name for name, what in written.items() if found.get(name) != what]
            except (ValueError, AttributeError):
                return [COMPLETE]

        return patiently(self._uri, copy)


@dataclass(frozen=True)
class Last:
    """What a run can go on from."""

    folder: Path | None
    """Local; None if there is no checkpoint."""
    damaged: str | None
    """A sentence on later ones that do not hold what was written."""


def _copy(source: Any, target: Any) -> dict[str, Any]:
    """Copies a stream; returns what COMPLETE says of a file."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _to_disk(files: fs.FileSystem, path: str) -> None:
    """Waits until a file, or the names in a folder, would outlive a loss of power."""
    if not isinstance(files, fs.LocalFileSystem):
        return  # a store of objects has done so when it answers
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_file(files: fs.FileSystem, path: str) -> None:
    if files.get_file_info(path).type == fs.FileType.File:
        files.delete_file(path)


def _folders(files: fs.FileSystem, root: str) -> list[str]:
    """The folders of all checkpoints, oldest first, complete or not."""
    return [path for path in folders(files, root) if re.fullmatch(NAME, path.rpartition("/")[2])]


def name_of(mark: Mark) -> str:
    """Of a checkpoint's folder."""
    epoch, step = mark
    return f"epoch-{epoch:06d}" + (f"-{step:08d}" if step else "")


def read_mark(name: str) -> Mark:
    """How far a checkpoint's run had come, by the name of its folder."""
    _, epoch, *step = name.split("-")
    return int(epoch), int(step[0]) if step else 0


def in_words(mark: Mark) -> str:
    """As a person reads it: "epoch 3" or "epoch 3 and 120 steps"."""
    epoch, step = mark
    return f"epoch {epoch}" + (f" and {step} steps" if step else "")


class Winners:
    """Keeps the checkpoints of those runs that no other beats, and forgets those of the others: of
    one aim, all but the best one's."""

    def __init__(self) -> None:
        self._unbeaten: dict[Standing, Checkpoints] = {}

    def ended(self, result: Standing | None, checkpoints: Checkpoints) -> None:
        """A run has ended.

        Args:
            result: how it stands among the others (see `outcomes.beats`); None if it cannot win.
        """
        if result is None:
            checkpoints.purge()
            return
        runs = {**self._unbeaten, result: checkpoints}
        self._unbeaten = {one: runs[one] for one in front({one: one for one in runs})}
        for beaten in runs.keys() - self._unbeaten:
            runs[beaten].purge()
