"""What stores of images are made of: folders, tars, Parquet files, CIFAR's files, in pieces.

A piece is what one task reads. Pieces follow from the source and the size of shards alone, so the
same source gives the same shards, however many tasks there are.
"""

import io
import json
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image
from pyarrow import fs

import nfnet
from nflab.data.arrays import ArrayDataset, cifar, is_cifar
from nflab.data.dataset import DatasetError, Split
from nflab.data.layout import scan, scan_names
from nflab.storage.files import is_away, is_local, open_uri, patiently

_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Word in a file's name -> the part that it is of."""

_CIFAR_PIECE = 10_000
"""Images."""


class Encoded(NamedTuple):
    """An image as it is stored."""

    key: str
    """Unlike any other of its part; in a class images are ordered by it."""
    label: int
    image: bytes


@dataclass(frozen=True)
class Piece:
    """What one task reads."""

    part: str
    """`train`, `val` or `test`."""
    number: int
    """Counted over all parts."""
    holds: tuple[Any, ...]
    """Where it is in the source."""


class Source(ABC):
    """Encoded images with labels, in pieces."""

    class_names: tuple[str, ...] | None = None
    """In the order of the labels; None if the labels are all that is known."""
    left_out = ""
    """What is beside the images, in words."""
    array: ArrayDataset | None = None
    """The dataset, if it is one of small images that fit in memory."""

    @abstractmethod
    def pieces(self, size: int) -> list[Piece]:
        """All of it, in pieces of about `size` bytes."""

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[Encoded]:
        """The images of a piece, in their order.

        Raises:
            DatasetError: the source is damaged, or is not what it was.
        """


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
    for ending, kind in ((".tar", _Tars), (".parquet", _Parquet)):
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


def _part_of(name: str, address: str) -> str:
    """The part that a file is of, by the words in its name or in that of its folder."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        if word in _PARTS:
            return _PARTS[word]
    raise DatasetError(
        f"the name of {name} in {address} says neither train nor val nor test: rename it"
    )


class _Folder(Source):
    """ImageNet's layout, on a disk or in object storage."""

    def __init__(self, address: str, listed: Sequence[tuple[str, int]] | None = None) -> None:
        self._address = address
        if listed is None:
            layout = scan(Path(address))
            self._files = {
                part: [
                    (str(path.relative_to(address)), path.stat().st_size, label)
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


class _Tars(Source):
    """Tars in WebDataset's naming: KEY.jpg beside KEY.cls, which holds the label as a number."""

    def __init__(self, address: str, files: Sequence[tuple[str, int]]) -> None:
        self._address, self._files = address, files

    def pieces(self, size: int) -> list[Piece]:
        return [
            Piece(_part_of(name, self._address), number, (_below(self._address, name),))
            for number, (name, _) in enumerate(self._files)
        ]

    def read(self, piece: Piece) -> Iterator[Encoded]:
        (address,) = piece.holds
        waiting: dict[str, dict[str, bytes]] = {}
        try:
            files, path = open_uri(address)
            with (
                files.open_input_stream(path) as stream,
                tarfile.open(fileobj=stream, mode="r|") as tar,
            ):
                for member in tar:
                    opened = tar.extractfile(member) if member.isfile() else None
                    if opened is None or Path(member.name).name.startswith("."):
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    kind = "image" if f".{ending.lower()}" in nfnet.IMAGE_ENDINGS else ending
                    if kind not in ("image", "cls"):
                        continue
                    held = waiting.setdefault(key, {})
                    held[kind] = opened.read()
                    if len(held) == 2:
                        yield Encoded(key, _label(held["cls"], key, address), held["image"])
                        del waiting[key]
        except (tarfile.TarError, EOFError, OSError) as error:
            raise _told(error, address) from None
        if waiting:
            key, held = next(iter(waiting.items()))
            lacks = "no label (.cls)" if "image" in held else "no image"
            raise DatasetError(f"{address} has {lacks} for {key}, and for {len(waiting)} in all")


def _told(error: Exception, address: str) -> Exception:
    """What is wrong with a file that cannot be read; a store that is away damages nothing."""
    return error if is_away(error) else DatasetError(f"{address} is damaged: {error}")


def _label(text: bytes, key: str, address: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DatasetError(f"the label of {key} in {address} is no number: {text[:20]!r}") from None


class _Parquet(Source):
    """Parquet files as Hugging Face's `datasets` writes images: `image.bytes` and `label`."""

    def __init__(self, address: str, files: Sequence[tuple[str, int]]) -> None:
        self._address = address
        self._groups: list[tuple[str, str, list[int]]] = []
        for name, _ in files:
            where = _below(address, name)
            opened = self._open(where)
            schema = opened.schema_arrow
            if not {"image", "label"} <= set(schema.names):
                raise DatasetError(
                    f"{where} has the columns {', '.join(schema.names)}: expected image and label"
                )
            if self.class_names is None:
                self.class_names = _names_in(schema.metadata or {})
            sizes = [
                opened.metadata.row_group(number).total_byte_size
                for number in range(opened.num_row_groups)
            ]
            self._groups.append((_part_of(name, address), where, sizes))

    @staticmethod
    def _open(where: str) -> Any:
        import pyarrow.parquet as pq

        try:
            files, path = open_uri(where)
            return pq.ParquetFile(files.open_input_file(path))
        except (pa.ArrowException, OSError) as error:
            raise _told(error, where) from None

    def pieces(self, size: int) -> list[Piece]:
        found: list[Piece] = []
        for part, where, sizes in self._groups:
            some: list[int] = []
            for number, _ in enumerate(sizes):
                some.append(number)
                if sum(sizes[n] for n in some) >= size or number == len(sizes) - 1:
                    found.append(Piece(part, len(found), (where, tuple(some))))
                    some = []
        return found

    def read(self, piece: Piece) -> Iterator[Encoded]:
        where, groups = piece.holds
        opened = self._open(where)
        name = where.rpartition("/")[2]
        for group in groups:
            try:
                table = opened.read_row_group(group, columns=["image", "label"])
            except (pa.ArrowException, OSError) as error:
                raise _told(error, where) from None
            for row in range(len(table)):
                image, label = (table.column(c)[row].as_py() for c in ("image", "label"))
                if image is None or image.get("bytes") is None or label is None:
                    raise DatasetError(f"row {row} of group {group} in {where} lacks a value")
                key = image.get("path") or f"{name}:{group:05d}:{row:06d}"
                yield Encoded(key, int(label), image["bytes"])


def _names_in(metadata: Mapping[bytes, bytes]) -> tuple[str, ...] | None:
    """The classes that `datasets` wrote down in a file."""
    try:
        told = json.loads(metadata[b"huggingface"])
        return tuple(told["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return None


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


def _below(address: str, name: str) -> str:
    """The address of a file that was listed at or below another."""
    return address if address.rpartition("/")[2] == name else f"{address}/{name}"
