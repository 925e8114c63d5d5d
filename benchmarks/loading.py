"""Images a second from JPEG files to a training step's tensors, beside torchvision's.

Makes a folder of photographs of ImageNet's usual size (500x375; crops of those that scikit-learn
ships), a store of the same bytes and one whose shorter side is 256 pixels, and reads each by two
processes at 224 pixels: plain, with RandAugment, and with mixing. The peer is torchvision's
`ImageFolder` with `RandomResizedCrop` and flips in a `DataLoader` of two processes. Measured in
turns; medians, with the least and the most.

Example:
  python benchmarks/loading.py --images 20000
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

from nflab.data import load_dataset  # noqa: E402
from nflab.data.feed import Feed, Part  # noqa: E402
from nflab.data.making import Making, begin, finish, make_piece  # noqa: E402
from nflab.data.sources import open_source  # noqa: E402
from nflab.settings.config import Config  # noqa: E402
from nflab.settings.leaves import replace  # noqa: E402

LOADERS = 2

AUGMENTATIONS = {
    "plain": {},
    "RandAugment": {"augmentation_level": 10},
    "mixing": {"mixup": True, "cutmix": True},
}


def write_photos(root: Path, count: int) -> None:
    """`count` training images and 10 others, of two classes."""
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        large = Image.fromarray(photo).resize((960, 640), Image.Resampling.BICUBIC)
        for split, images in (("train", count // 2), ("val", 5)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                left, top = int(rng.integers(460)), int(rng.integers(265))
                crop = large.crop((left, top, left + 500, top + 375))
                crop.save(folder / f"{number:06d}.jpg", quality=90)


def write_store(source: Path, dest: Path, making: Making) -> None:
    """The store of a folder."""
    opened = open_source(str(source))
    pieces = opened.pieces(making.shard_bytes)
    for piece in begin(str(dest), str(source), pieces, making) or ():
        make_piece(opened, piece, making, str(dest))
    finish(opened, pieces, str(dest), 0.0)


def ours(dataset: Path, count: int, **augmentation: object) -> Callable[[], float]:
    """Images a second of a dataset of ours."""
    config = replace(
        Config(),
        model="dm_nf_resnet50",
        dataset=str(dataset),
        batch_size=256,
        **augmentation,
    )
    loaded = load_dataset(config)

    def measure() -> float:
        feed = Feed(loaded, config, [Part("train", 0)], loaders=LOADERS)
        return _rate((len(c.places_N) for chunks in feed.train(0) for c in chunks), count)

    return measure


def torchvisions(folder: Path, count: int) -> Callable[[], float]:
    """Images a second of torchvision's folder."""
    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    loaded = datasets.ImageFolder(str(folder / "train"), transform)

    def measure() -> float:
        loader = DataLoader(loaded, batch_size=32, shuffle=True, num_workers=LOADERS)
        return _rate((len(labels) for _, labels in loader), count)

    return measure


def _rate(lengths: Iterator[int], count: int) -> float:
    """Images a second, once the processes have started."""
    read, begun = 0, 0.0
    for length in lengths:
        if begun == 0.0:
            begun = time.perf_counter()
            continue
        read += length
        if read >= count:
            break
    return read / (time.perf_counter() - begun)


@contextmanager
def folder_of(given: str | None) -> Iterator[Path]:
    """Where the images lie."""
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--read", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where images and stores are kept")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with folder_of(asked.folder) as root:
        photos, kept, small = root / "photos", root / "store", root / "store-256"
        if not small.exists():
            write_photos(photos, asked.images)
            write_store(photos, kept, Making())
            write_store(photos, small, Making(shorter_side=256))
        measures = {"torchvision's folder, plain": torchvisions(photos, asked.read)}
        for augmentation, settings in AUGMENTATIONS.items():
            for name, dataset in (("folder", photos), ("store", kept), ("store at 256", small)):
                measures[f"{name}, {augmentation}"] = ours(dataset, asked.read, **settings)
        found: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(asked.rounds):
            for name, measure in measures.items():
                found[name].append(measure())
    if asked.json:
        print(json.dumps(found))
        return
    peer = statistics.median(found["torchvision's folder, plain"])
    for name, rates in found.items():
        middle = statistics.median(rates)
        print(
            f"{name:30} {middle:6.0f} images/s ({min(rates):.0f} to {max(rates):.0f}), "
            f"{middle / peer:.2f} of torchvision's"
        )


if __name__ == "__main__":
    main()
