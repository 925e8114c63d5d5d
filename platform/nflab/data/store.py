"""A store of images: Arrow IPC files of encoded images, and a manifest that says what is in them.

| file | holds |
| --- | --- |
| `manifest.json` | what `Manifest` says; written last |
| `order.arrow` | of each part, in the dataset's order: `label` (int32), `row` (int64) |
| `PART-NNNNN-NN.arrow` | a shard, one record batch: `image` (bytes of a file), `label`, `key` |
| `bad.json` | what was no image, and is left out: where it was, and what is wrong |

Rows of a part are counted through its shards, in the order of the manifest. The dataset's order is
that of a folder of the same images: class by class, and in a class by their keys.
"""

import bisect
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

import nfnet
from nflab.data.arrays import ArrayDataset
from nflab.data.contents import digests
from nflab.data.dataset import DatasetError, Split
from nflab.data.encoded import EncodedImages
from nflab.storage.cache import Cache, Damaged
from nflab.storage.files import is_local, read_text

MANIFEST = "manifest.json"

ORDER = "order.arrow"

PARTS = ("train", "val", "test")
"""What may be stored, in the order that `order.arrow` has them in."""

FORMAT = 1
"""Version of the format."""

SHARD_SCHEMA = pa.schema(
    [("image", pa.large_binary()), ("label", pa.int32()), ("key", pa.string())]
)

ORDER_SCHEMA = pa.schema([("label", pa.int32()), ("row", pa.int64())])


@dataclass(frozen=True)
class File:
    """A file of a store."""

    name: str
    digest: str
    """SHA-256 of all of it, in hex."""
    size: int
    """Bytes."""
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What a store holds."""

    class_names: tuple[str, ...]
    """In the order of the labels."""
    shards: Mapping[str, tuple[File, ...]]
    """Of each part that is stored (`train`, `val`, maybe `test`), in the order of its rows."""
    order: File
    """The parts one after another, in the order of PARTS."""
    contents: Mapping[str, str]
    """See `Dataset.contents`."""
    fingerprint: str
    """See `Dataset.fingerprint`."""
    counts: Mapping[str, tuple[int, ...]]
    """Images of each class, of each part."""
    left_out: str = ""
    """What was beside the images and is not in the store, in words."""
    made_of: str = ""
    """Digest of the list of what it was made from, and of the settings."""
    array: Mapping[str, Any] | None = None
    """Of small images of one size: `shift` and `flip` of `ArrayDataset`."""
    format: int = FORMAT

    def to_json(self) -> str:
        """As the file holds it."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> "Manifest":
        """What a file says.

        Raises:
            DatasetError: it is damaged, or of a format that this version does not know.
        """
        try:
            told = json.loads(text)
            version = told["format"]
            if version != FORMAT:
                raise DatasetError(
                    f"{where} has format {version!r}, and this version of nflab reads {FORMAT}: "
                    "make the store anew, or use the version that made it"
                )
            told["class_names"] = tuple(told["class_names"])
            told["order"] = File(**told["order"])
            told["shards"] = {
                part: tuple(File(**file) for file in files)
                for part, files in told["shards"].items()
            }
            told["counts"] = {part: tuple(of) for part, of in told["counts"].items()}
            return Manifest(**told)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{where} is damaged: {error}") from None


def is_store(address: str) -> bool:
    """Whether there is a store at an address."""
    return read_text(f"{address}/{MANIFEST}") is not None


def read_manifest(address: str) -> Manifest:
    """The manifest of the store at an address.

    Raises:
        DatasetError: there is none, or it is damaged.
    """
    where = f"{address}/{MANIFEST}"
    text = read_text(where)
    if text is None:
        raise DatasetError(f"{address} holds no store of images: there is no {MANIFEST}")
    return Manifest.from_json(text, where)


class Rows:
    """The encoded images of a store, each at hand by its part and row.

    Files are mapped into memory, from the store itself where it is on a disk of this machine, else
    from this machine's cache.
    """

    def __init__(self, address: str, manifest: Manifest) -> None:
        """Looks at the files; those on a disk are read once, to compare their digests.

        Raises:
            DatasetError: one is missing, or is not what the manifest says.
        """
        self._address, self._manifest = address, manifest
        self._files = {file.name: file for files in manifest.shards.values() for file in files}
        self._files[ORDER] = manifest.order
        self._begins = {
            part: [0, *accumulate(file.rows for file in files)]
            for part, files in manifest.shards.items()
        }
        self._open: dict[str, tuple[Any, Any, Any]] = {}
        self._cache = None if is_local(address) else Cache()
        if self._cache is None:
            _verify(Path(address), self._files)
            return
        size = sum(file.size for file in self._files.values())
        if size > self._cache.capacity:
            raise DatasetError(
                f"{address} is {size / 1e9:.1f} GB, and the cache {self._cache.folder} may hold "
                f"{self._cache.capacity / 1e9:.1f} GB: name a folder on a larger disk by "
                "NFLAB_CACHE, or allow more by NFLAB_CACHE_GB"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process maps files for itself

    def read(self, part: str, row: int) -> BytesIO:
        """The encoded image in a row."""
        file, place = self._at(part, row)
        offsets, data, _ = self._mapped(file)
        return BytesIO(data[offsets[place] : offsets[place + 1]])

    def name(self, part: str, row: int) -> str:
        """What a person finds an image by: the shard, and its key in it."""
        file, place = self._at(part, row)
        return f"{self._address}/{file.name}:{self._mapped(file)[2][place].as_py()}"

    def order(self) -> pa.Table:
        """The table of labels and rows of all parts, mapped into memory."""
        return _opened(self.path(self._manifest.order)).read_all()

    def path(self, file: File) -> Path:
        """Where a file is on this machine, fetched if need be.

        Raises:
            DatasetError: it is not what the manifest says.
        """
        if self._cache is None:
            return Path(self._address) / file.name
        try:
            return self._cache.fetch(f"{self._address}/{file.name}", file.digest, file.size)
        except Damaged as error:
            raise DatasetError(str(error)) from None

    def _at(self, part: str, row: int) -> tuple[File, int]:
        begins = self._begins[part]
        number = bisect.bisect_right(begins, row) - 1
        return self._manifest.shards[part][number], row - begins[number]

    def _mapped(self, file: File) -> tuple[Any, Any, Any]:
        """Offsets and bytes of the images in a shard, and its keys."""
        if file.name not in self._open:
            batch = _opened(self.path(file)).get_batch(0)
            images = batch.column("image")
            _, offsets, data = images.buffers()
            self._open[file.name] = (
                np.frombuffer(offsets, np.int64)[images.offset :],
                memoryview(data),
                batch.column("key"),
            )
        return self._open[file.name]


def _opened(path: Path) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _verify(root: Path, files: Mapping[str, File]) -> None:
    paths = [root / name for name in files]
    try:
        found = digests(root, paths)
    except OSError as error:
        raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from None
    for (name, file), digest in zip(files.items(), found, strict=True):
        if digest.hex() != file.digest:
            raise DatasetError(
                f"{root / name} is damaged, or of another store: its digest is {digest.hex()[:16]} "
                f"and the manifest says {file.digest[:16]}; copy it again"
            )


class ImageStore(EncodedImages):
    """Implements `Dataset` over a store, as `ImageFolder` does over a folder of the same images.

    Args:
        address: of its folder: a path, or s3://bucket/folder.
        sizes: pixels of training and evaluation, and the evaluation's crop.

    Raises:
        DatasetError: a file is missing, or is not what the manifest says.
    """

    earlier_fingerprint = None

    def __init__(self, address: str, manifest: Manifest, sizes: nfnet.Preprocessing) -> None:
        self._rows = Rows(address, manifest)
        self.left_out = ""
        self.contents, self.fingerprint = manifest.contents, manifest.fingerprint
        labels, self._row = _orders(self._rows, manifest)
        super().__init__(labels, manifest.class_names, sizes)

    def _file(self, part: str, place: int) -> BytesIO:
        return self._rows.read(part, int(self._row[part][place]))

    def _name(self, part: str, place: int) -> str:
        return self._rows.name(part, int(self._row[part][place]))


def _orders(rows: Rows, manifest: Manifest) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Labels and rows of each part, in the dataset's order."""
    table = rows.order().combine_chunks()
    labels, places = (np.asarray(table.column(name)) for name in ("label", "row"))
    parts = [part for part in PARTS if part in manifest.shards]
    sizes = [sum(file.rows for file in manifest.shards[part]) for part in parts]
    begins = [0, *accumulate(sizes)]
    if len(labels) != begins[-1]:
        raise DatasetError(f"{ORDER} has {len(labels)} rows, and the shards have {begins[-1]}")
    cuts = dict(zip(parts, pairwise(begins), strict=True))
    return (
        {part: torch.from_numpy(labels[a:b].astype(np.int64)) for part, (a, b) in cuts.items()},
        {part: places[a:b] for part, (a, b) in cuts.items()},
    )


def sample(address: str, count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """Images of a store, drawn at random from all of it: (class name, image as it is stored).

    Raises:
        DatasetError: there is no store, or it is damaged.
    """
    manifest = read_manifest(address)
    rows = Rows(address, manifest)
    labels, order = _orders(rows, manifest)
    places = [(part, place) for part in order for place in range(len(order[part]))]
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    found = []
    for part, place in (places[n] for n in sorted(chosen)):
        image = nfnet.read_image(rows.read(part, int(order[part][place])))
        found.append((manifest.class_names[int(labels[part][place])], image))
    return found


def open_store(address: str, sizes: nfnet.Preprocessing) -> ImageStore | ArrayDataset:
    """The dataset in a store, at the pixels that a model takes.

    Raises:
        DatasetError: there is no store, or it cannot be used.
    """
    manifest = read_manifest(address)
    if manifest.array is None:
        return ImageStore(address, manifest, sizes)
    rows = Rows(address, manifest)
    labels, order = _orders(rows, manifest)
    splits: dict[Split, tuple[Tensor, Tensor]] = {}
    for part in ("train", "val", "test"):
        images = [nfnet.read_image(rows.read(part, int(row))) for row in order[part]]
        splits[part] = torch.stack([nfnet.to_pixels(image) for image in images]), labels[part]
    return ArrayDataset(splits, manifest.class_names, **manifest.array)
