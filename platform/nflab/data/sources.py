"""The sources that stores of images are made from: folders, tars, Parquet files, CIFAR's files.

Pieces follow from the source and the size of shards alone, so the same source gives the same
shards, however many tasks there are.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import fs

from nflab.data.archives import Parquet, Tars
from nflab.data.arrays import cifar, is_cifar
from nflab.data.dataset import DatasetError, Split
from nflab.data.layout import scan, scan_names
from nflab.data.pieces import Encoded, Piece, Source
from nflab.storage.files import is_local, open_uri, patiently

_CIFAR_PIECE = 10_000
"""Images."""


def open_source(address: str) -> Source:
    """The source at an address: a path, or s3://bucket/folder.

    Raises:
        DatasetError: nothing is there that is known.
    """
    if is_local(address) and not Path(address).exists():
        raise DatasetError(f"there is no {address}: give a folder, a tar or a Parquet file")
    if is_local(address) and Path(address).is_dir():
        if is_cifar(Path(address)):
            return _Cifar(Path(address))
        if any((Path(address) / part).is_dir() for part in ("val", "train")):
            nested = [p for p in Path(address).glob("*/*") if p.suffix in (".tar", ".parquet")]
            if not nested:
                return _Folder(address)
    found = _files_below(address)
    for ending, kind in ((".tar", Tars), (".parquet", Parquet)):
        of_kind = [file for file in found if file[0].endswith(ending)]
        if of_kind:
            return kind(address, of_kind)
    if is_local(address):
        raise DatasetError(
            f"{address} holds neither {address}/val/CLASS/..., nor tars, Parquet files or CIFAR's"
        )
    return _Folder(address, found)


def _files_below(address: str) -> list[tuple[str, int]]:
    """Names and sizes of all files at or below an address, sorted."""

    def look() -> list[tuple[str, int]]:
        files, path = open_uri(address)
        (there,) = files.get_file_info([path])
        if there.type == fs.FileType.File:
            return [("", there.size)]
        if there.type == fs.FileType.NotFound:
            raise DatasetError(f"there is nothing at {address}")
        listed = files.get_file_info(fs.FileSelector(path, recursive=True))
        root = path.rstrip("/") + "/"
        return sorted(
            (file.path.removeprefix(root), file.size)
            for file in listed
            if file.type == fs.FileType.File
        )

    found = patiently(address, look)
    return [(name or address.rpartition("/")[2], size) for name, size in found]


def _bytes(address: str) -> bytes:
    if is_local(address):
        try:
            return Path(address).read_bytes()
        except OSError as error:
            raise DatasetError(f"cannot read {address}: {error.strerror}") from None

    def read() -> bytes:
        files, path = open_uri(address)
        with files.open_input_stream(path) as stream:
            return bytes(stream.read())

    try:
        return patiently(address, read)
    except FileNotFoundError:
        raise DatasetError(f"{address} is gone since it was listed") from None


class _Folder(Source):
    """ImageNet's layout, on a disk or in object storage."""

    def __init__(self, address: str, listed: Sequence[tuple[str, int]] | None = None) -> None:
        self._address = address
        if listed is None:
            layout, above = scan(Path(address)), f"{Path(address)}/"
            self._files = {
                part: [
                    (path.removeprefix(above), Path(path).stat().st_size, label)
                    for path, label in files
                ]
                for part, files in layout.files.items()
            }
            self.class_names, self.left_out = layout.class_names, layout.left_out
        else:
            names, found, self.left_out = scan_names(address, [name for name, _ in listed])
            sizes = dict(listed)
            self._files = {
                part: [(name, sizes[name], label) for name, label in files]
                for part, files in found.items()
            }
            self.class_names = names

    def pieces(self, size: int) -> list[Piece]:
        found: list[Piece] = []
        for part, files in self._files.items():
            some: list[tuple[str, int]] = []
            held = 0
            for place, (name, length, label) in enumerate(files):
                some.append((name, label))
                held += length
                if held >= size or place == len(files) - 1:
                    found.append(Piece(part, len(found), tuple(some)))
                    some, held = [], 0
        return found

    def read(self, piece: Piece) -> Iterator[Encoded]:
        for name, label in piece.holds:
            # A name may be no text.
            key = name.partition("/")[2].encode(errors="backslashreplace").decode()
            yield Encoded(key, label, _bytes(f"{self._address}/{name}"))


class _Cifar(Source):
    """CIFAR-10 or CIFAR-100, as torchvision stores them; images are stored as PNG."""

    def __init__(self, folder: Path) -> None:
        self.array = self._dataset = cifar(folder)
        self.class_names = self._dataset.class_names

    def pieces(self, size: int) -> list[Piece]:
        found: list[Piece] = []
        parts: tuple[Split, ...] = ("train", "val", "test")
        for part in parts:
            count = self._dataset.sizes[part]
            for start in range(0, count, _CIFAR_PIECE):
                found.append(Piece(part, len(found), (start, min(count, start + _CIFAR_PIECE))))
        return found

    def read(self, piece: Piece) -> Iterator[Encoded]:
        import torch

        start, stop = piece.holds
        part: Any = piece.part
        images, labels = self._dataset.eval_images(part, torch.arange(start, stop))
        for place, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True), start):
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
            yield Encoded(f"{place:05d}", label, file.getvalue())
