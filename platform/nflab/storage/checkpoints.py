"""The checkpoints of one run, in a folder or in object storage: the last and the best, never half.

While a run goes on it has two at most (three in the moment of saving), and so has a training that
has ended; of a sweep or grid only the best run, and those that failed, keep theirs when they end.
"""

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from nflab.settings.outcomes import Standing, standing
from nflab.storage.files import open_uri, patiently

COMPLETE = "complete"
"""File that is written last into a checkpoint."""

CHUNK_BYTES = 8 << 20
"""Read and written at once."""

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

    def save(self, folder: Path, epoch: int, best: int | None = None) -> None:
        """Copies `folder` as the checkpoint of `epoch`; then forgets all others but `best`.

        A process killed at any moment leaves either this checkpoint or the one before it.

        Raises:
            OSError: it cannot be written.
        """

        def copy() -> None:
            files, root = open_uri(self._uri)
            target = f"{root}/epoch-{epoch:06d}"
            files.create_dir(target, recursive=True)
            # Not fs.copy_files: it is silent about an upload that fails when its file is closed.
            for path in folder.iterdir():
                with (
                    path.open("rb") as file,
                    files.open_output_stream(f"{target}/{path.name}") as stream,
                ):
                    shutil.copyfileobj(file, stream, CHUNK_BYTES)
            with files.open_output_stream(f"{target}/{COMPLETE}") as marker:
                marker.write(b"")

        patiently(self._uri, copy)
        self.purge({epoch, epoch if best is None else best})

    def purge(self, kept: Collection[int] = ()) -> None:
        """Forgets all of them but those of the epochs `kept`.

        Raises:
            OSError: they cannot be deleted.
        """

        def delete() -> None:
            files, root = open_uri(self._uri)
            spared = {f"{root}/epoch-{epoch:06d}" for epoch in kept}
            for path in _folders(files, root):
                if path not in spared:
                    files.delete_dir(path)

        patiently(self._uri, delete)

    def last_epoch(self) -> int | None:
        """The epoch of the last checkpoint; None if there is none.

        Raises:
            OSError: it cannot be read.
        """
        path = patiently(self._uri, lambda: _last_complete(*open_uri(self._uri)))
        return None if path is None else int(path.rpartition("-")[2])

    @contextmanager
    def last(self) -> Iterator[Path | None]:
        """A local folder with the last checkpoint, while in use; None if there is none.

        Raises:
            OSError: it cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:

            def copy() -> bool:
                files, root = open_uri(self._uri)
                path = _last_complete(files, root)
                if path is None:
                    return False
                for info in files.get_file_info(fs.FileSelector(path)):
                    copied = Path(folder) / info.base_name
                    with files.open_input_stream(info.path) as file, copied.open("wb") as to:
                        shutil.copyfileobj(file, to, CHUNK_BYTES)
                return True

            yield Path(folder) if patiently(self._uri, copy) else None


def _folders(files: fs.FileSystem, root: str) -> list[str]:
    """The folders of all checkpoints, oldest first, complete or not."""
    found = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
    return sorted(f.path for f in found if re.fullmatch(r"epoch-\d{6}", f.base_name))


def _last_complete(files: fs.FileSystem, root: str) -> str | None:
    """The folder of the last checkpoint that was written whole."""
    for path in reversed(_folders(files, root)):
        if files.get_file_info(f"{path}/{COMPLETE}").type == fs.FileType.File:
            return path
    return None


class Winner:
    """Keeps the checkpoints of the best of several runs, and forgets those of the others."""

    def __init__(self) -> None:
        self._best: tuple[Standing, Checkpoints] | None = None

    def ended(self, value: float | None, number: int | str, checkpoints: Checkpoints) -> None:
        """A run has ended.

        Args:
            value: its validation top-1 in percent; None if the run cannot win.
            number: decides between equals, see `outcomes.standing`.
        """
        if value is None:
            checkpoints.purge()
            return
        runs = [(standing(value, number), checkpoints)]
        if self._best is not None:
            runs = sorted([*runs, self._best], key=lambda run: run[0])
            runs[1][1].purge()
        self._best = runs[0]
