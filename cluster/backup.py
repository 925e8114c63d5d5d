"""What only the head's disk holds, copied to where results are kept, and back.

That is MLflow's database, and of every run what its driver keeps: Optuna's study, and what MLflow
has not taken yet. Checkpoints, logs and artifacts are there from the beginning.

`python backup.py` copies it now, and says what is there.
"""

import os
import sqlite3
import sys
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path

from pyarrow import fs

from nflab.storage.files import (
    delete,
    list_files,
    open_uri,
    patiently,
    read_text,
    write_bytes,
    write_text,
)

EARLIER, DAYS = "earlier", 7
"""Folder of the copies of MLflow's database, one of each day that it changed, the last seven."""

DATABASE = Path.home() / "mlflow" / "mlflow.db"
"""Of MLflow."""

OWNER = DATABASE.parent / "owner"
"""A word that this head and the copies have in common."""

RUNS = Path.home() / "nflab" / "runs"
"""A folder for each run."""


def main() -> None:
    """Copies all, or ends with one sentence."""
    results = os.environ["NFLAB_RESULTS"]
    try:
        count = Backup(results).save()
    except (OSError, sqlite3.Error) as error:
        reason = str(error).splitlines()[0]
        print(f"error: the head's files could not be copied to {results}: {reason}")
        sys.exit(2)
    print(f"MLflow's database and the files of {count} runs are in {results}")


class Backup:
    """The copies in `RESULTS/backup`; results are in a bucket (`s3://...`) or a shared folder."""

    def __init__(self, results: str) -> None:
        self._uri = f"{results}/backup"
        self._saved: dict[Path, tuple[tuple[int, int], ...]] = {}

    def take_over(self) -> None:
        """Brings back what is not on this disk. Of a head that has no database yet the copies are
        then: an earlier head, should it still run, cannot save any more.

        Raises:
            OSError: they cannot be read or written.
        """
        new = not DATABASE.exists()
        self.restore()
        if new or not OWNER.exists():
            owner = uuid.uuid4().hex
            # First: had only this disk the word, no start would bring it there.
            write_text(f"{self._uri}/{OWNER.name}", owner)
            OWNER.parent.mkdir(parents=True, exist_ok=True)
            OWNER.write_text(owner, encoding="utf-8")

    def save(self) -> int:
        """Copies what has changed since this object copied it last; returns how many runs.

        Raises:
            OSError: they cannot be written, or are another head's.
            sqlite3.Error: a database cannot be read, or is damaged: its last sound copy stays.
        """
        owner = read_text(f"{self._uri}/{OWNER.name}", patience=0)
        if owner is not None and (not OWNER.exists() or owner != OWNER.read_text(encoding="utf-8")):
            raise OSError(
                f"{self._uri} is another head's: give each cluster an address of its own as "
                "NFLAB_RESULTS"
            )
        damaged: sqlite3.Error | None = None
        for path, name in self._all():
            try:
                state = _state(path)
                if self._saved.get(path) == state:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    copy = _copy_database(path, Path(folder)) if path.suffix == ".db" else path
                    content = copy.read_bytes()
            except FileNotFoundError:  # deleted since it was listed
                continue
            except sqlite3.Error as error:  # told when all that is sound is kept
                damaged = damaged or error
                continue
            write_bytes(f"{self._uri}/{name}", content, patience=0)
            if path == DATABASE:
                self._keep(content)
            self._saved[path] = state
        if damaged is not None:
            raise damaged
        return len([folder for folder in RUNS.glob("*") if folder.is_dir()])

    def _keep(self, content: bytes) -> None:
        """The first copy of a day stays for a week: what is sound may yet be not what one wants."""
        folder, day = f"{self._uri}/{EARLIER}", time.strftime("%Y-%m-%d.db", time.gmtime())
        days = sorted(list_files(folder, patience=0))
        if f"{folder}/{day}" not in days:
            write_bytes(f"{folder}/{day}", content, patience=0)
            for old in days[: 1 - DAYS]:
                delete(old, patience=0)

    def restore(self) -> None:
        """Brings back what is not on this disk; a bucket that is away is waited for.

        Raises:
            OSError: they cannot be read.
        """
        patiently(self._uri, self._restore)

    def _restore(self) -> None:
        files, root = open_uri(self._uri)
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        for info in found:
            name = info.path.removeprefix(f"{root}/")
            target = RUNS / name.removeprefix("runs/")
            if name == DATABASE.name:
                target = DATABASE
            passing = name == OWNER.name or name.endswith(".part") or name.startswith(EARLIER)
            if info.type == fs.FileType.File and not (target.exists() or passing):
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                with files.open_input_stream(info.path) as stream:
                    part.write_bytes(stream.read())
                part.replace(target)

    def _all(self) -> list[tuple[Path, str]]:
        """Every file that is to be copied, and what its copy is called."""
        found = [(DATABASE, DATABASE.name)] if DATABASE.exists() else []
        passing = (".lock", ".part", "-wal", "-shm", "-journal")
        for path in sorted(RUNS.rglob("*")):
            # Of Ray Tune's own state nothing is needed again.
            of_tune = path.relative_to(RUNS).parts[1:2] == ("ray",)
            if path.is_file() and not of_tune and not path.name.endswith(passing):
                found.append((path, f"runs/{path.relative_to(RUNS).as_posix()}"))
        return found


def _state(path: Path) -> tuple[tuple[int, int], ...]:
    """Changes when the file, or what SQLite has not yet merged into it, does."""
    both = (path, path.with_name(f"{path.name}-wal"))
    return tuple((p.stat().st_mtime_ns, p.stat().st_size) for p in both if p.exists())


def _copy_database(path: Path, folder: Path) -> Path:
    """A whole copy of a database that others may be writing to.

    Raises:
        sqlite3.DatabaseError: it is damaged.
    """
    copy = folder / path.name
    if not path.exists():  # else an empty one would be made
        raise FileNotFoundError(path)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        ((told, *_),) = target.execute("PRAGMA quick_check(1)")
    if told != "ok":
        raise sqlite3.DatabaseError(f"{path} is damaged ({told}): its last sound copy is kept")
    return copy


if __name__ == "__main__":
    main()
