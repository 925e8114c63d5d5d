"""A store of ImageNet's size: how soon a worker has it, its memory, and how fast it is read.

Makes a store of 1.28 million tiny images (100 bytes to 2 kB), if it is not there yet, and measures
in processes of their own: the start (`load_dataset`, the store's digests being known), memory
of its own against that with the digits, an epoch's order, and rows read at random.

Example:
  python benchmarks/data_at_size.py /tmp/big-store
"""

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from nflab.data.making import Making, begin, finish, make_piece  # noqa: E402
from nflab.data.pieces import Encoded, Piece, Source  # noqa: E402
from nflab.data.store import is_store  # noqa: E402

IMAGES, CLASSES, PIECE = 1_280_000, 1000, 20_000

READS = 20_000

_ASK = """
import json, resource, sys, time
sys.path[:0] = {path!r}
import torch
from nflab.data import load_dataset
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.streams import Stream, keys
config = replace(Config(), dataset={dataset!r}, model={model!r})
begun = time.perf_counter()
dataset = load_dataset(config)
found = {{"start_seconds": time.perf_counter() - begun}}
def memory():
    lines = open("/proc/self/smaps_rollup").readlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
found["memory_mb"] = memory() / 1024
begun = time.perf_counter()
order = keys(0, Stream.ORDER, 0, torch.arange(dataset.sizes["train"])).argsort()
found["order_seconds"] = time.perf_counter() - begun
if hasattr(dataset, "_rows"):
    for _ in range(2):
        begun = time.perf_counter()
        for place in order[:{reads}].tolist():
            dataset._file("train", place)
        found["reads_per_second"] = {reads} / (time.perf_counter() - begun)
    found["memory_mb_after"] = memory() / 1024
print(json.dumps(found))
"""


class Tiny(Source):
    """Images of 100 bytes to 2 kB, each of a few hundred different ones."""

    class_names = tuple(f"class {n:04d}" for n in range(CLASSES))

    def pieces(self, size: int) -> list[Piece]:
        """Of 20,000 images each."""
        held_out = [Piece("val", 0, (0, CLASSES * 10))]
        return held_out + [
            Piece("train", 1 + n // PIECE, (n, min(IMAGES, n + PIECE)))
            for n in range(0, IMAGES, PIECE)
        ]

    def read(self, piece: Piece) -> Iterator[Encoded]:
        """Noise of some pixels, as PNG."""
        rng = np.random.default_rng(0)
        images = []
        for side in rng.integers(4, 26, 300):
            file = io.BytesIO()
            noise = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file, "PNG")
            images.append(file.getvalue())
        start, stop = piece.holds
        for number in range(start, stop):
            label = number % CLASSES
            yield Encoded(f"{label}/{number:07d}.png", label, images[number * 7919 % 300])


def main() -> None:
    """Makes the store and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if not is_store(asked.store):
        making, source = Making(), Tiny()
        pieces = source.pieces(making.shard_bytes)
        waiting = begin(asked.store, "tiny", pieces, making)
        assert waiting is not None
        for piece in waiting:
            make_piece(source, piece, making, asked.store)
        begun = time.perf_counter()
        finish(source, pieces, asked.store, 0.0)
        print(f"finished in {time.perf_counter() - begun:.1f} s", file=sys.stderr)

    def measure(dataset: str, model: str) -> dict[str, float]:
        code = _ASK.format(path=sys.path[:2], dataset=dataset, model=model, reads=READS)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    measure(asked.store, "dm_nf_resnet50")  # reads every file once
    found = {
        "store": measure(asked.store, "dm_nf_resnet50"),
        "digits": measure("digits", "dm_nf_resnet_digits"),
    }
    if asked.json:
        print(json.dumps(found))
        return
    for name, figures in found.items():
        print(name, *(f"{key} {value:.2f}" for key, value in figures.items()), sep="\n  ")


if __name__ == "__main__":
    main()
