"""Files of object storage that are kept on this machine, each known by its digest.

Several processes may ask for one at once: the first fetches it, the others wait.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nflab.settings.errors import ConfigError
from nflab.storage.files import open_uri, patiently

_FASTEST = Path("/opt/dlami/nvme")
"""Where AWS's images for deep learning put an instance's own disk."""

_LEFT_FREE = 0.05
"""Share of the disk that the cache never takes."""

_PIECE = 8 << 20

_TRIES = 2


class Damaged(ConfigError):
    """A file that is not what it should be, each time it is fetched."""


class Cache:
    """A folder of files by their SHA-256, the oldest unused of which go when room is needed.

    The folder is that of the environment's NFLAB_CACHE; else on an instance's own disk, where AWS's
    images have one; else in the user's cache. It takes at most NFLAB_CACHE_GB gigabytes, or what
    leaves a twentieth of the disk free.
    """

    def __init__(self) -> None:
        """Makes the folder if need be.

        Raises:
            ConfigError: it cannot be made, or the limit is no number.
        """
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        usual = _FASTEST if os.access(_FASTEST, os.W_OK) else cache
        self.folder = Path(os.environ.get("NFLAB_CACHE") or usual / "nflab" / "files").absolute()
        told = os.environ.get("NFLAB_CACHE_GB")
        try:
            self._limit = None if told is None else int(float(told) * 1e9)
        except ValueError:
            raise ConfigError(f"NFLAB_CACHE_GB is {told!r}: give a number of gigabytes") from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the cache {self.folder}: {error.strerror}; name another folder by "
                "NFLAB_CACHE"
            ) from None

    @property
    def capacity(self) -> int:
        """Bytes that it may hold."""
        disk = shutil.disk_usage(self.folder)
        fits = disk.free + sum(file.stat().st_size for file in self._files())
        fits -= int(_LEFT_FREE * disk.total)
        return max(0, fits if self._limit is None else min(fits, self._limit))

    def fetch(self, uri: str, digest: str, size: int) -> Path:
        """The file of a digest, from `uri` if it is not here yet, or is not what it was.

        Args:
            digest: SHA-256 in hex.
            size: bytes.

        Raises:
            Damaged: what is at `uri` has another digest.
            ConfigError: it does not fit, or there is none.
        """
        file = self.folder / digest
        if self._is_whole(file, size):
            return file
        with self._alone(digest):
            if self._is_whole(file, size):  # another process has fetched it
                return file
            if self._matches(file, digest):
                return file
            self._make_room(size, file)
            for _ in range(_TRIES):
                found = patiently(str(self.folder), lambda: self._download(uri, file))
                if found == digest:
                    self._remember(file)
                    return file
                file.unlink(missing_ok=True)
        raise Damaged(
            f"{uri} is damaged, or of another store: its digest is {found[:16]} and should be "
            f"{digest[:16]}; copy it again"
        )

    def _download(self, uri: str, file: Path) -> str:
        """Fetches a file; returns the SHA-256 of what came."""
        half = file.with_suffix(".part")
        digest = hashlib.sha256()
        try:
            with half.open("wb") as out:
                files, path = open_uri(uri)
                with files.open_input_stream(path) as stream:
                    while piece := stream.read(_PIECE):
                        digest.update(piece)
                        out.write(piece)
            half.replace(file)
        except FileNotFoundError:
            raise ConfigError(f"there is no file {uri}: copy the store again") from None
        finally:
            half.unlink(missing_ok=True)
        return digest.hexdigest()

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """One process at a time, of those on this machine."""
        with (self.folder / f"{digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_whole(self, file: Path, size: int) -> bool:
        """Whether a file is as it was when it was last found to match; notes that it is used."""
        note = file.with_suffix(".seen")
        try:
            state = _state(file)
            known = json.loads(note.read_text())
            if state != known or state[0] != size:
                return False
            _use(note)
        except (OSError, ValueError):
            return False
        return True

    def _matches(self, file: Path, digest: str) -> bool:
        """Whether a file that has changed, or that nothing is known of, is what it should be."""
        with suppress(OSError), file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() == digest:
                self._remember(file)
                return True
            print(f"{file} is damaged: it is fetched again", flush=True)
        return False

    def _remember(self, file: Path) -> None:
        note = file.with_suffix(".seen")
        note.write_text(json.dumps(_state(file)))
        _use(note)

    def _files(self) -> list[Path]:
        return [file for file in self.folder.iterdir() if len(file.name) == 64]

    def _make_room(self, size: int, wanted: Path) -> None:
        """Deletes what has not been used for the longest time, until a file fits.

        What is mapped into the memory of a process stays readable for it.
        """
        if size > self.capacity:
            raise ConfigError(
                f"the cache {self.folder} may hold {self.capacity / 1e9:.1f} GB, and a file of "
                f"{size / 1e9:.1f} GB is needed: name another folder by NFLAB_CACHE, or allow more "
                "by NFLAB_CACHE_GB"
            )
        files = [file for file in self._files() if file != wanted]
        held = sum(file.stat().st_size for file in files)
        for file in sorted(files, key=_last_used):
            if held + size <= self.capacity:
                return
            held -= file.stat().st_size
            file.unlink(missing_ok=True)
            file.with_suffix(".seen").unlink(missing_ok=True)


def _state(file: Path) -> list[int]:
    """By which a file's change is noticed without reading it."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _use(note: Path) -> None:
    """Notes that a file is used now: finer than file systems tell the time."""
    os.utime(note, ns=(time.time_ns(),) * 2)


def _last_used(file: Path) -> int:
    note = file.with_suffix(".seen")
    return note.stat().st_mtime_ns if note.exists() else 0
