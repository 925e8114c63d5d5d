"""Images in tars, as WebDataset names them, and in Parquet files, as Hugging Face writes them."""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

import nfnet
from nflab.data.dataset import DatasetError
from nflab.data.pieces import Encoded, Piece, Source, below, part_of, what_is_wrong
from nflab.storage.files import open_uri


class Tars(Source):
    """Tars in WebDataset's naming: KEY.jpg beside KEY.cls, which holds the label as a number."""

    def __init__(self, address: str, files: Sequence[tuple[str, int]]) -> None:
        self._address, self._files = address, files

    def pieces(self, size: int) -> list[Piece]:
        return [
            Piece(part_of(name, self._address), number, (below(self._address, name),))
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
            raise what_is_wrong(error, address) from None
        if waiting:
            key, held = next(iter(waiting.items()))
            lacks = "no label (.cls)" if "image" in held else "no image"
            raise DatasetError(f"{address} has {lacks} for {key}, and for {len(waiting)} in all")


def _label(text: bytes, key: str, address: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DatasetError(f"the label of {key} in {address} is no number: {text[:20]!r}") from None


class Parquet(Source):
    """Parquet files as Hugging Face's `datasets` writes images: `image.bytes` and `label`."""

    def __init__(self, address: str, files: Sequence[tuple[str, int]]) -> None:
        self._address = address
        self._groups: list[tuple[str, str, list[int]]] = []
        for name, _ in files:
            where = below(address, name)
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
            self._groups.append((part_of(name, address), where, sizes))

    @staticmethod
    def _open(where: str) -> Any:
        import pyarrow.parquet as pq

        try:
            files, path = open_uri(where)
            return pq.ParquetFile(files.open_input_file(path))
        except (pa.ArrowException, OSError) as error:
            raise what_is_wrong(error, where) from None

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
                raise what_is_wrong(error, where) from None
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
