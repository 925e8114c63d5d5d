"""Make a store of images that a cluster reads: from a folder, tars, Parquet files or CIFAR's files.

SOURCE is ImageNet's layout, a tar or tars in WebDataset's naming, Parquet files as Hugging Face's
datasets are written, or torchvision's CIFAR files; SOURCE and DEST are paths or s3://... addresses.
Stopped and started again it goes on. DEST is then a --dataset of every experiment.

Example:
  python experiments/prepare_data.py imagenet/ s3://bucket/imagenet-256 --shorter-side 256
  python experiments/prepare_data.py --inspect s3://bucket/imagenet-256
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import _start  # noqa: F401
import tyro

from nflab.settings import locations
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import require
from nflab.settings.flags import int_or
from nflab.terminal import command_line
from nflab.terminal.wording import console


@dataclass(frozen=True)
class Preparation:
    """What to read, and what to make of it."""

    source: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, tar, Parquet file, or folder of these."""
    dest: Annotated[str | None, tyro.conf.Positional] = None
    """Folder of the store."""
    shorter_side: Annotated[int | None, int_or("none")] = None
    """Pixels to which the shorter side of larger images is resized; none keeps every byte."""
    quality: int = 95
    """Of the JPEG files that resized images become, 1 to 100."""
    shard_mb: float = 256
    """Megabytes of a shard, about."""
    max_bad: float = 0.001
    """Share of images that may be unreadable; they are left out, and named in bad.json."""
    inspect: str | None = None
    """Say what is in this store, in place of making one, and draw 64 images of it."""
    sheet: Path = Path("contact_sheet.png")
    """File that --inspect draws."""


def main(asked: Preparation) -> None:
    """Makes the store, or inspects one."""
    if asked.inspect is not None:
        inspect(locations.place(asked.inspect, "the store"), asked.sheet.expanduser())
        return
    require(
        asked.source is not None and asked.dest is not None, "give SOURCE and DEST, or --inspect"
    )
    require(
        asked.shorter_side is None or asked.shorter_side >= 1,
        f"shorter_side {asked.shorter_side} must be at least 1",
    )
    require(1 <= asked.quality <= 100, f"quality {asked.quality} must be 1 to 100")
    require(asked.shard_mb > 0, f"shard_mb {asked.shard_mb} must be above 0")
    require(0 <= asked.max_bad < 1, f"max_bad {asked.max_bad} must be in [0, 1)")
    from nflab.cluster import connection  # takes seconds: a wrong flag is answered sooner
    from nflab.data.making import Making
    from nflab.running.preparation import prepare

    assert asked.source is not None
    assert asked.dest is not None
    source = locations.place(asked.source, "the source")
    dest = locations.place(asked.dest, "the store")
    making = Making(asked.shorter_side, asked.quality, int(asked.shard_mb * 1e6))
    connection.connect(ScaleConfig())
    try:
        prepare(source, dest, making, asked.max_bad)
    finally:
        connection.disconnect()
    tell(dest)


def inspect(store: str, sheet: Path) -> None:
    """Prints what is in a store, and draws some of it."""
    from nflab.analysis.figures import draw_contact_sheet
    from nflab.data.store import sample

    tell(store)
    draw_contact_sheet(sample(store, 64), f"64 images of {Path(store).name}", sheet)
    console().print("Images:", sheet, markup=False)


def tell(store: str) -> None:
    """Prints what is in a store."""
    from nflab.data.store import read_manifest

    manifest = read_manifest(store)
    out = console()
    out.print(f"{store}: {len(manifest.class_names)} classes", markup=False)
    for part, counts in manifest.counts.items():
        files = manifest.shards[part]
        size = sum(file.size for file in files) / 1e9
        out.print(
            f"  {part}: {sum(counts)} images ({min(counts)} to {max(counts)} a class), "
            f"{len(files)} shards, {size:.2f} GB",
            markup=False,
        )
    if manifest.left_out:
        out.print(f"  left out: {manifest.left_out}", markup=False)
    out.print(f"  fingerprint {manifest.fingerprint}", markup=False)


if __name__ == "__main__":
    command_line.command(Preparation, main, __doc__)
