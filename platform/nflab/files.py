"""Small files by address: a local path, or object storage such as s3://bucket/folder."""

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


def read_text(uri: str) -> str | None:
    """What a file says; None if there is none."""
    files, path = open_uri(uri)
    if files.get_file_info(path).type != fs.FileType.File:
        return None
    with files.open_input_stream(path) as stream:
        return str(stream.read().decode())


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
