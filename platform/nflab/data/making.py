"""How a store of images is made: each piece of a source by itself, then what is said of all.

A piece's shards and its record are the same bytes whoever makes them, and whenever. The record is
written after the shards, the manifest after all records: what is there is whole.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

import nfnet
from nflab.data.dataset import DatasetError, contents, fingerprint
from nflab.data.pieces import Encoded, Piece, Source
from nflab.data.store import (
    MANIFEST,
    ORDER,
    ORDER_SCHEMA,
    PARTS,
    SHARD_SCHEMA,
    File,
    Manifest,
    is_store,
    read_manifest,
)
from nflab.storage.files import (
    delete,
    is_local,
    list_files,
    read_bytes,
    read_text,
    write_bytes,
    write_text,
)

RECORDS = "records"
"""Folder of what is known of each piece, until the manifest is written."""

BAD = "bad.json"

_BEGUN = "begun"

_RECORD_SCHEMA = pa.schema([("label", pa.int32()), ("key", pa.string()), ("digest", pa.binary(32))])


@dataclass(frozen=True)
class Making:
    """What becomes of the images of a source."""

    shorter_side: int | None = None
    """Pixels to which the shorter side of larger images is resized (bicubic); None keeps bytes."""
    quality: int = 95
    """Of the JPEG files that resized images become, 1 to 100."""
    shard_bytes: int = 256_000_000
    """Bytes of a shard, about."""


def begin(dest: str, source: str, pieces: Sequence[Piece], making: Making) -> list[Piece] | None:
    """Writes down what is made at `dest`, or goes on with it: the pieces that are not done; None if
    the store is complete.

    Args:
        source: its address.

    Raises:
        DatasetError: something else is there, or was begun there.
    """
    text = repr((list(pieces), making)).replace(source, "")
    made_of = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
    other = f"was made from another source than {source} is now, or with other settings"
    if is_store(dest):
        if read_manifest(dest).made_of != made_of:
            raise DatasetError(f"{dest} {other}: give another folder, or delete it")
        _forget(dest)
        return None
    begun = read_text(f"{dest}/{_BEGUN}")
    if begun is None:
        if list_files(dest):
            raise DatasetError(f"{dest} holds other files: give a folder of its own for the store")
        write_text(f"{dest}/{_BEGUN}", made_of)
    elif begun != made_of:
        raise DatasetError(f"what is begun in {dest} {other}: give another folder, or delete it")
    done = {uri.rpartition("/")[2] for uri in list_files(f"{dest}/{RECORDS}")}
    return [piece for piece in pieces if _record_name(piece) not in done]


def make_piece(source: Source, piece: Piece, making: Making, dest: str) -> int:
    """Writes the shards of a piece, then its record; returns how many images were read."""
    rows: list[Encoded] = []
    records: list[Encoded] = []
    digests: list[bytes] = []
    files: list[dict[str, Any]] = []
    bad: list[tuple[str, str]] = []
    held = 0

    def write_shard() -> None:
        nonlocal held
        if not rows:
            return
        name = f"{piece.part}-{piece.number:05d}-{len(files):02d}.arrow"
        data = _arrow(SHARD_SCHEMA, image=[r.image for r in rows], **_named(rows))
        write_bytes(f"{dest}/{name}", data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(dataclasses.asdict(File(name, digest, len(data), len(rows))))
        rows.clear()
        held = 0

    count = 0
    for found in source.read(piece):
        count += 1
        try:
            image = _encode(found.image, making)
        except ValueError as error:
            bad.append((f"{piece.part}/{found.key}", str(error)))
            continue
        row = found._replace(image=image)
        rows.append(row)
        records.append(row._replace(image=b""))
        digests.append(hashlib.sha256(image).digest())
        held += len(image)
        if held >= making.shard_bytes:
            write_shard()
    write_shard()
    told = json.dumps({"part": piece.part, "files": files, "bad": bad, "read": count})
    schema = _RECORD_SCHEMA.with_metadata({"nflab": told})
    record = _arrow(schema, digest=digests, **_named(records))
    write_bytes(f"{dest}/{RECORDS}/{_record_name(piece)}", record)
    return count


def finish(source: Source, pieces: Sequence[Piece], dest: str, max_bad: float) -> Manifest:
    """Writes the order of all images and the manifest, and forgets the records.

    Args:
        max_bad: share of images that may be none.

    Raises:
        DatasetError: more are, or a label is not among the classes.
    """
    tables = [
        pa.ipc.open_file(read_bytes(f"{dest}/{RECORDS}/{_record_name(piece)}")).read_all()
        for piece in pieces
    ]
    told = [json.loads(table.schema.metadata[b"nflab"]) for table in tables]
    bad = [one for of_piece in told for one in of_piece["bad"]]
    read = sum(of_piece["read"] for of_piece in told)
    write_text(f"{dest}/{BAD}", json.dumps(dict(bad), indent=1) + "\n")
    if len(bad) > max_bad * read:
        raise DatasetError(
            f"{len(bad)} of {read} images cannot be read, the first {bad[0][0]} ({bad[0][1]}): "
            f"all are named in {dest}/{BAD}; mend the source, or allow more by --max-bad"
        )
    parts = [part for part in PARTS if part in {p.part for p in pieces}]
    shards: dict[str, tuple[File, ...]] = {}
    labels: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    digests: list[bytes] = []
    for part in parts:
        of_part = [n for n, piece in enumerate(pieces) if piece.part == part]
        shards[part] = tuple(File(**file) for n in of_part for file in told[n]["files"])
        table = pa.concat_tables([tables[n].replace_schema_metadata() for n in of_part])
        label = table.column("label").to_numpy()
        keys = table.column("key").to_pylist()
        places = range(len(keys))
        if source.array is None:
            order = sorted(places, key=lambda n: (label[n], keys[n].split("/"), n))
        else:
            order = sorted(places, key=keys.__getitem__)
        rows[part] = np.array(order, dtype=np.int64)
        labels[part] = label[rows[part]]
        digests += table.column("digest").take(pa.array(rows[part])).to_pylist()
    names = _class_names(source, labels)
    ordered = _arrow(
        ORDER_SCHEMA,
        label=np.concatenate([labels[part] for part in parts]),
        row=np.concatenate([rows[part] for part in parts]),
    )
    write_bytes(f"{dest}/{ORDER}", ordered)
    found = contents({"train": [], **{p: labels[p].tolist() for p in parts}}, names, digests)
    manifest = Manifest(
        class_names=names,
        shards=shards,
        order=File(ORDER, hashlib.sha256(ordered).hexdigest(), len(ordered), len(digests)),
        contents=found,
        fingerprint=fingerprint(found),
        counts={
            part: tuple(np.bincount(labels[part], minlength=len(names)).tolist()) for part in parts
        },
        left_out=source.left_out,
        made_of=read_text(f"{dest}/{_BEGUN}") or "",
    )
    if source.array is not None:
        array = source.array
        manifest = dataclasses.replace(
            manifest,
            contents=array.contents,
            fingerprint=array.fingerprint,
            array={"shift": array.shift, "flip": array.flip},
        )
    write_text(f"{dest}/{MANIFEST}", manifest.to_json())
    _forget(dest)
    return manifest


def _forget(dest: str) -> None:
    """Deletes what only the making needs."""
    for uri in list_files(f"{dest}/{RECORDS}"):
        delete(uri)
    if is_local(dest):
        with suppress(OSError):
            Path(f"{dest}/{RECORDS}").rmdir()
    delete(f"{dest}/{_BEGUN}")


def _class_names(source: Source, labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    most = max((int(of.max()) for of in labels.values() if len(of)), default=-1)
    least = min((int(of.min()) for of in labels.values() if len(of)), default=0)
    names = source.class_names
    if names is None:
        names = tuple(str(label) for label in range(most + 1))
    if least < 0 or most >= len(names):
        wrong = least if least < 0 else most
        raise DatasetError(f"the source has a label {wrong}, and {len(names)} classes")
    if "val" not in labels or not len(labels["val"]):
        raise DatasetError("the source has no images of val: nothing to evaluate on")
    for part, of_part in labels.items():
        lacking = sorted(set(range(len(names))) - set(of_part.tolist()))
        if lacking and len(of_part):
            raise DatasetError(f"class {names[lacking[0]]!r} has no images in {part}")
    return names


def _encode(image: bytes, making: Making) -> bytes:
    """The bytes to store: as they are, or those of a smaller image.

    Raises:
        ValueError: they are no image that can be read.
    """
    pixels = nfnet.read_image(io.BytesIO(image))
    if making.shorter_side is None or min(pixels.size) <= making.shorter_side:
        return image
    scale = making.shorter_side / min(pixels.size)
    width, height = (max(making.shorter_side, math.floor(s * scale + 0.5)) for s in pixels.size)
    file = io.BytesIO()
    resized = pixels.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(file, "JPEG", quality=making.quality, subsampling=0)
    return file.getvalue()


def _named(rows: Sequence[Encoded]) -> dict[str, list[Any]]:
    return {"label": [row.label for row in rows], "key": [row.key for row in rows]}


def _record_name(piece: Piece) -> str:
    return f"{piece.part}-{piece.number:05d}.arrow"


def _arrow(schema: pa.Schema, **columns: Any) -> bytes:
    """The bytes of an Arrow IPC file of one record batch."""
    sink = io.BytesIO()
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue()
