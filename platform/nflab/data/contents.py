"""What is in the files of a folder: their digests, each read once and remembered in a manifest.

The manifest is a file in the folder itself, where every machine that shares the disk finds it, or
in the user's cache where the folder cannot be written to. An entry counts while path, size, inode
and times of change are those of the file, and the file was at rest when it was read.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

MANIFEST = ".nflab-manifest.parquet"
"""File of the manifest in the folder."""

AT_REST_NS = 2_000_000_000
"""A file that changed shorter before it was read may change again and keep its times."""

AT_ONCE = 4096
"""Files that wait to be read at a time."""

TOLD_BYTES = 1 << 30
"""That many to be read are worth a sentence."""

_THREADS = min(32, 4 * (os.cpu_count() or 1))  # they wait for the disk

_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),  # a name may be no text
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("inode", pa.uint64()),
        ("read_ns", pa.int64()),
        ("digest", pa.binary(32)),
    ]
)

_State = tuple[int, int, int, int]


def digests(root: Path, paths: Sequence[Path] | Sequence[str]) -> list[bytes]:
    """SHA-256 of the contents of files below `root`, in their order.

    Raises:
        OSError: one cannot be read.
    """
    above = f"{root}/"
    names = [os.fspath(path).removeprefix(above) for path in paths]
    states = [_state(path) for path in paths]
    known = _read(root)
    found: dict[str, tuple[_State, int, bytes]] = {}
    missing: list[int] = []
    for place, (name, state) in enumerate(zip(names, states, strict=True)):
        entry = known.get(name)
        if entry is not None and entry[0] == state and _at_rest(state, entry[1]):
            found[name] = entry
        else:
            missing.append(place)
    if missing:
        total = sum(states[place][0] for place in missing)
        if total > TOLD_BYTES:
            print(
                f"reading {len(missing)} images of {root} ({total / 1e9:.1f} GB) once, to know "
                "them by their contents",
                flush=True,
            )
        try:
            with (
                ThreadPoolExecutor(_THREADS) as pool,
                tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None) as bar,
            ):
                for start in range(0, len(missing), AT_ONCE):
                    some = missing[start : start + AT_ONCE]
                    read = pool.map(_digest, [paths[place] for place in some])
                    for place, (when, digest) in zip(some, read, strict=True):
                        found[names[place]] = states[place], when, digest
                        bar.update(states[place][0])
        finally:  # what was read before an interrupt is not read again
            if found:
                _write(root, found)
    return [found[name][2] for name in names]


def _state(path: Path | str) -> _State:
    """By which a file's change is noticed without reading it: size, times and inode."""
    status = os.stat(path)  # noqa: PTH116 no Path for each of a million files
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _at_rest(state: _State, read_ns: int) -> bool:
    return max(state[1], state[2]) + AT_REST_NS < read_ns


def _digest(path: Path | str) -> tuple[int, bytes]:
    """When a file was begun to be read (in ns since 1970), and the SHA-256 of what it holds."""
    when = time.time_ns()
    with Path(path).open("rb") as file:
        return when, hashlib.file_digest(file, "sha256").digest()


def _places(root: Path) -> list[Path]:
    """Where the manifest of a folder may be, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nflab"
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return [root / MANIFEST, cache / "manifests" / f"{name}.parquet"]


def _read(root: Path) -> dict[str, tuple[_State, int, bytes]]:
    """Path below `root` -> state, when it was read, and digest; none if no manifest fits."""
    import pyarrow.parquet as pq  # a dataset in memory does without

    for file in filter(Path.is_file, _places(root)):
        with suppress(OSError, pa.ArrowException):
            table = pq.read_table(file, schema=_SCHEMA)
            columns = [table[field.name].to_pylist() for field in _SCHEMA]
            return {
                os.fsdecode(name): ((size, mtime, ctime, inode), read, digest)
                for name, size, mtime, ctime, inode, read, digest in zip(*columns, strict=True)
            }
    return {}


def _write(root: Path, found: dict[str, tuple[_State, int, bytes]]) -> None:
    """Keeps a manifest where one can be kept."""
    import pyarrow.parquet as pq

    rows = [
        (os.fsencode(name), *state, read, digest) for name, (state, read, digest) in found.items()
    ]
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )
    for file in _places(root):
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            half = file.with_name(f"{file.name}.{os.getpid()}")
            try:
                pq.write_table(table, half)
                half.replace(file)
            finally:
                half.unlink(missing_ok=True)
            return
