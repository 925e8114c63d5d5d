"""The checkpoints of one run, in a folder or in object storage: the last and the best, never half.

While a run goes on it has two at most (three in the moment of saving), and so has a training that
has ended; of a sweep or grid only the best run, and those that failed, keep theirs when they end.
"""

import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from nflab.files import open_uri

COMPLETE = "complete"
"""File that is written last into a checkpoint."""


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
        """
        files, root = open_uri(self._uri)
        target = f"{root}/epoch-{epoch:06d}"
        files.create_dir(target, recursive=True)
        fs.copy_files(str(folder), target, fs.LocalFileSystem(), files)
        with files.open_output_stream(f"{target}/{COMPLETE}") as marker:
            marker.write(b"")
        kept = {target, f"{root}/epoch-{epoch if best is None else best:06d}"}
        for path in self._paths():
            if path not in kept:
                files.delete_dir(path)

    def purge(self, kept: Collection[int] = ()) -> None:
        """Forgets all of them but those of the epochs `kept`."""
        files, root = open_uri(self._uri)
        spared = {f"{root}/epoch-{epoch:06d}" for epoch in kept}
        for path in self._paths():
            if path not in spared:
                files.delete_dir(path)

    @contextmanager
    def last(self) -> Iterator[Path | None]:
        """A local folder with the last checkpoint, while in use; None if there is none."""
        files, _ = open_uri(self._uri)
        complete = [
            path
            for path in self._paths()
            if files.get_file_info(f"{path}/{COMPLETE}").type == fs.FileType.File
        ]
        if not complete:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            fs.copy_files(complete[-1], folder, files, fs.LocalFileSystem())
            yield Path(folder)

    def _paths(self) -> list[str]:
        """The folders of all checkpoints, oldest first, complete or not."""
        files, root = open_uri(self._uri)
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(f.path for f in found if re.fullmatch(r"epoch-\d{6}", f.base_name))


class Winner:
    """Keeps the checkpoints of the best of several runs, and forgets those of the others."""

    def __init__(self) -> None:
        self._best: tuple[float, int, Checkpoints] | None = None

    def ended(self, value: float | None, number: int, checkpoints: Checkpoints) -> None:
        """A run has ended.

        Args:
            value: what is to be largest; None if the run cannot win.
            number: of the run; the first of two equals wins.
        """
        if value is None:
            checkpoints.purge()
        elif self._best is None:
            self._best = value, -number, checkpoints
        else:
            challenger = value, -number, checkpoints
            loser, self._best = sorted((self._best, challenger), key=lambda run: run[:2])
            loser[2].purge()
