"""Small files by address: a local path, or object storage such as s3://bucket/folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from pyarrow import fs


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of an address, and the path in it."""
    if "://" in uri:
        files, path = fs.FileSystem.from_uri(uri)
        return files, path
    return fs.LocalFileSystem(), uri


def is_local(uri: str) -> bool:
    """Whether an address is a path on this machine (or a disk that it shares)."""
    return "://" not in uri


def exists(uri: str) -> bool:
    """Whether there is a file of this address."""
    files, path = open_uri(uri)
    return bool(files.get_file_info(path).type == fs.FileType.File)


def read_bytes(uri: str) -> bytes | None:
    """The content of a file; None if there is none."""
    files, path = open_uri(uri)
    if files.get_file_info(path).type != fs.FileType.File:
        return None
    with files.open_input_stream(path) as stream:
        return bytes(stream.read())


def read_text(uri: str) -> str | None:
    """What a file says; None if there is none."""
    content = read_bytes(uri)
    return None if content is None else content.decode()


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


def write_text(uri: str, text: str) -> None:
    """Writes a file, and the folders above it: whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    files, path = open_uri(uri)
    files.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with files.open_output_stream(f"{path}.part") as stream:
        stream.write(text.encode())
    files.move(f"{path}.part", path)
