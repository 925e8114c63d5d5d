"""Making a store of images with Ray Data, on all cores of all nodes."""

import logging
from collections.abc import Sequence
from typing import Any

import ray
from rich.progress import Progress

from nflab.data.dataset import DatasetError
from nflab.data.making import Making, begin, finish, make_piece
from nflab.data.pieces import Piece, Source
from nflab.data.sources import open_source
from nflab.data.store import Manifest, read_manifest
from nflab.settings.errors import ConfigError
from nflab.storage.files import patiently
from nflab.terminal.wording import console


def prepare(address: str, dest: str, making: Making, max_bad: float) -> Manifest:
    """Makes the store at `dest` from the source at `address`, or goes on with it.

    Args:
        max_bad: share of images that may be unreadable.

    Returns:
        what the store holds. It is the same for the same source, whatever the cluster.

    Raises:
        DatasetError: the source cannot be read, or too much of it; or something else is at `dest`.
    """
    source = open_source(address)
    pieces = source.pieces(making.shard_bytes)
    waiting = begin(dest, address, pieces, making)
    if waiting is None:
        return read_manifest(dest)
    if waiting:
        _make(source, address, waiting, making, dest, len(pieces))
    return finish(source, pieces, dest, max_bad)


def _make(
    source: Source,
    address: str,
    waiting: Sequence[Piece],
    making: Making,
    dest: str,
    total: int,
) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shared, references = ray.put(source), [ray.put(piece) for piece in waiting]

    def make(row: dict[str, Any]) -> dict[str, Any]:
        piece: Piece = ray.get(references[row["number"]])
        try:
            # A piece that was begun is made again as it was.
            images = patiently(address, lambda: make_piece(ray.get(shared), piece, making, dest))
        except (DatasetError, ConfigError) as error:  # Ray Data would tell a page of it
            return {"images": 0, "refused": str(error)}
        return {"images": images, "refused": ""}

    rows = [{"number": number} for number in range(len(waiting))]
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make)
    out = console()
    done = total - len(waiting)
    out.print(f"{total} pieces, {done} of them done before", markup=False)
    images = 0
    with Progress(console=out, transient=True) as progress:
        bar = progress.add_task("pieces", total=total, completed=done)
        for row in made.iter_rows():
            if row["refused"]:
                raise DatasetError(row["refused"])
            done += 1
            images += row["images"]
            progress.update(bar, completed=done)
            if not out.is_terminal:
                out.print(f"[{done}/{total}] {images} images", markup=False)
