"""Small files by address: a local path, or object storage, s3://bucket/folder or gs://bucket/folder.

A store that is away (object storage that does not answer, a disk that is full or fails) is waited
for here, and nowhere else: see `patiently`.
"""

import errno
import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from pyarrow import fs

from nflab.settings.errors import ConfigError

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""How long a run waits for a store that is away."""

GCS_SECONDS = 5
"""How long Google's own client tries again, in which nothing can be interrupted."""

RETRY_SECONDS = 1.0
"""Between two tries while it is."""

# What passes with time; a bucket that there is not, or keys that are wrong, do not.
# An upload whose end was told and not answered is known no more when that is told again.
_AWAY = re.compile(
    r"AWS Error (NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING"
    r"|REQUEST_TIMEOUT|NO_SUCH_UPLOAD|UNKNOWN \(HTTP status (408|429|5\d\d)\))"
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL)"
)

_FAILING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EREMOTEIO),
        *(errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV),
    }
)
"""Of a disk that is full, read-only or damaged, or of a shared one whose server is away."""


class Away(ConfigError, OSError):
    """A store has been away for as long as a run waits."""


def patiently(uri: str, call: Callable[[], T], patience: float = PATIENCE_SECONDS) -> T:
    """What `call` returns, which is called again as long as a store is away.

    Args:
        uri: what is told to be waited for.
        call: reads or writes there; done twice it must be as if done once.
        patience: how many seconds to wait.

    Raises:
        Away: it stays away.
        OSError: it refuses, and will go on doing so.
    """
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            return call()
        except OSError as error:
            if not is_away(error):
                raise
            reason = str(error).splitlines()[0]
            if time.monotonic() > deadline:
                raise Away(f"{uri} cannot be used: {reason}") from None
        if not told:
            told = True
            with suppress(OSError):  # it may be the log that is full
                print(f"waiting for {uri}, which cannot be used now: {reason}", flush=True)
        time.sleep(RETRY_SECONDS)


def is_away(error: BaseException) -> bool:
    """Whether an error says that a store cannot be reached, or cannot be used now."""
    failing = isinstance(error, OSError) and error.errno in _FAILING
    return isinstance(error, Away) or failing or _AWAY.search(str(error)) is not None


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of an address, and the path in it."""
    if is_local(uri):
        return fs.LocalFileSystem(), uri
    parts = urlsplit(uri)
    if parts.scheme not in ("s3", "gs"):
        files, path = fs.FileSystem.from_uri(uri)
        return files, path
    files, bucket = _open_bucket(urlunsplit(parts._replace(path="")))
    return files, bucket + unquote(parts.path)


@functools.cache  # to open one asks where it is
def _open_bucket(uri: str) -> tuple[fs.FileSystem, str]:
    found, name = fs.FileSystem.from_uri(uri)
    _, (options,) = found.__reduce__()
    if isinstance(found, fs.GcsFileSystem):
        # Its own patience is a quarter of an hour.
        options["retry_time_limit"] = timedelta(seconds=GCS_SECONDS)
        return fs.GcsFileSystem(**options), name
    options["allow_delayed_open"] = True  # what is small is one request
    # Its own patience is minutes, in which nothing can be interrupted.
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=3)
    return fs.S3FileSystem(**options, retry_strategy=retry), name


def is_local(uri: str) -> bool:
    """Whether an address is a path on this machine (or a disk that it shares)."""
    return "://" not in uri


def exists(uri: str) -> bool:
    """Whether there is a file of this address."""

    def look() -> bool:
        files, path = open_uri(uri)
        return bool(files.get_file_info(path).type == fs.FileType.File)

    return patiently(uri, look)


def list_files(uri: str, patience: float = PATIENCE_SECONDS) -> list[str]:
    """Addresses of the files in a folder; none if there is no such folder."""

    def look() -> list[str]:
        files, path = open_uri(uri)
        found = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return [f"{uri}/{f.base_name}" for f in found if f.type == fs.FileType.File]

    return patiently(uri, look, patience)


def folders(files: fs.FileSystem, path: str) -> list[str]:
    """Paths of the folders in a folder of an opened store; none if there is no such folder."""
    # Google's store lists no folder for the files that are in it.
    deep = isinstance(files, fs.GcsFileSystem)
    found = files.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=deep))
    below = ((f, f.path.removeprefix(f"{path}/").split("/")) for f in found)
    inside = {f"{path}/{p[0]}" for f, p in below if f.type == fs.FileType.Directory or len(p) > 1}
    return sorted(inside)


def delete(uri: str, patience: float = PATIENCE_SECONDS) -> None:
    """Deletes a file, if there is one."""

    def remove() -> None:
        files, path = open_uri(uri)
        if files.get_file_info(path).type == fs.FileType.File:
            files.delete_file(path)

    patiently(uri, remove, patience)


def read_bytes(uri: str, patience: float = PATIENCE_SECONDS) -> bytes | None:
    """The content of a file; None if there is none.

    Args:
        patience: how many seconds to wait for a store that is away.
    """

    def read() -> bytes | None:
        files, path = open_uri(uri)
        if files.get_file_info(path).type != fs.FileType.File:
            return None
        with files.open_input_stream(path) as stream:
            return bytes(stream.read())

    return patiently(uri, read, patience)


def read_text(uri: str, patience: float = PATIENCE_SECONDS) -> str | None:
    """What a file says; None if there is none. See `read_bytes`."""
    content = read_bytes(uri, patience)
    # Whoever understands the text says what is wrong with it.
    return None if content is None else content.decode(errors="replace")


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """Path of a file in object storage, while in use; a path as it is.

    Raises:
        OSError: there is no such file.
    """
    if is_local(uri):
        yield uri
        return
    content = read_bytes(uri)
    if content is None:
        raise FileNotFoundError(f"there is no file {uri}")
    with tempfile.NamedTemporaryFile(suffix=PurePosixPath(uri).suffix) as file:
        file.write(content)
        file.flush()
        yield file.name


def write_text(uri: str, text: str, patience: float = PATIENCE_SECONDS) -> None:
    """Writes a file, and the folders above it: whole or not at all. See `write_bytes`."""
    write_bytes(uri, text.encode(), patience)


def write_bytes(uri: str, content: bytes, patience: float = PATIENCE_SECONDS) -> None:
    """Writes a file, and the folders above it: whole or not at all.

    Args:
        patience: how many seconds to wait for a store that is away.

    Raises:
        OSError: it cannot be written.
    """

    def write() -> None:
        files, path = open_uri(uri)
        # Which have no folders, and no halves of files.
        if isinstance(files, fs.S3FileSystem | fs.GcsFileSystem):
            _put(files, path, content)
            return
        files.create_dir(path.rsplit("/", 1)[0], recursive=True)
        _put(files, f"{path}.part", content)
        files.move(f"{path}.part", path)

    patiently(uri, write, patience)


def _put(files: fs.FileSystem, path: str, content: bytes) -> None:
    with files.open_output_stream(path) as stream:
        stream.write(content)
