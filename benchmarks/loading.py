"""Images a second from JPEG files to a training step's tensors, beside torchvision's and timm's.

Makes a folder of photographs of ImageNet's usual size (500x375; crops of those that scikit-learn
ships), a store of the same bytes and one whose shorter side is 256 pixels, and reads each by two
processes at 224 pixels. The peers: torchvision's `ImageFolder` with `RandomResizedCrop` and flips
(of its two kinds of transforms the faster) in a `DataLoader`, and, with RandAugment and mixing,
timm's loader.

Example:
  python benchmarks/loading.py --images 20000 --folder /tmp/photos
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from timm.data import FastCollateMixup, create_dataset, create_loader  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from benchmarks.compare import Row, arguments, of_rounds, show  # noqa: E402
from nflab.data import load_dataset  # noqa: E402
from nflab.data.feed import Feed, Part  # noqa: E402
from nflab.data.making import Making, begin, finish, make_piece  # noqa: E402
from nflab.data.sources import open_source  # noqa: E402
from nflab.settings.config import Config  # noqa: E402
from nflab.settings.leaves import replace  # noqa: E402

LOADERS = 2

AUGMENTED = {"augmentation_level": 5, "mixup": True}

SIZE, BATCH = 224, 256


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
        batch_size=BATCH,
        **augmentation,
    )
    loaded = load_dataset(config)

    def measure() -> float:
        feed = Feed(loaded, config, [Part("train", 0)], loaders=LOADERS)
        return _rate((len(c.places_N) for chunks in feed.train(0) for c in chunks), count)

    return measure


def torchvisions(folder: Path, count: int, kind: ModuleType) -> Callable[[], float]:
    """Images a second of torchvision's folder, with one of its kinds of transforms."""
    transform = kind.Compose(
        [
            kind.RandomResizedCrop(SIZE, interpolation=kind.InterpolationMode.BICUBIC),
            kind.RandomHorizontalFlip(),
            kind.PILToTensor(),
        ]
    )
    loaded = datasets.ImageFolder(str(folder / "train"), transform)

    def measure() -> float:
        loader = DataLoader(loaded, batch_size=BATCH, shuffle=True, num_workers=LOADERS)
        return _rate((len(labels) for _, labels in loader), count)

    return measure


def timms(folder: Path, count: int) -> Callable[[], float]:
    """Images a second of timm's loader with `rand-m5-n4` and MixUp."""
    mixup = FastCollateMixup(mixup_alpha=0.2, num_classes=2)
    loader = create_loader(
        create_dataset("", str(folder / "train")),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        auto_augment="rand-m5-n4",
        interpolation="bicubic",
        num_workers=LOADERS,
        collate_fn=mixup,
        pin_memory=False,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return lambda: _rate((len(labels) for _, labels in loader), count)


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


def measure(root: Path, images: int, read: int, rounds: int) -> list[Row]:
    """All rows, of images made in `root` if they are not there."""
    photos, kept, small = root / "photos", root / "store", root / "store-256"
    if not small.exists():
        write_photos(photos, images)
        write_store(photos, kept, Making())
        write_store(photos, small, Making(shorter_side=256))
    forms = {"folder": photos, "store": kept, "store at 256": small}
    plain = {
        "torchvision": torchvisions(photos, read, transforms),
        "torchvision v2": torchvisions(photos, read, v2),
    }
    augmented = {"timm": timms(photos, read)}
    mine = {form: partial(ours, dataset, read) for form, dataset in forms.items()}
    measures: dict[str, Callable[[], float]] = {
        **plain,
        **augmented,
        **{form: made() for form, made in mine.items()},
        **{f"{form}, augmented": made(**AUGMENTED) for form, made in mine.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, one in measures.items():
            rates[name].append(one())
    middle = {name: statistics.median(found) for name, found in rates.items()}
    rows = []
    for form in forms:
        for told, peers, of in (
            ("crop and flip", plain, form),
            ("RandAugment 4x5 and MixUp", augmented, f"{form}, augmented"),
        ):
            peer = max(peers, key=lambda name: middle[name])
            target = 1.5 if form == "folder" else None
            pair = rates[of], rates[peer]
            name = f"JPEGs to {SIZE} px from a {form}, {told}"
            rows.append(of_rounds(name, peer, *pair, target, "least", "images/s"))
    return rows


def main() -> None:
    """Measures."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--read", type=int, default=1000, help="images of a measurement")
    parser.add_argument("--folder", help="where images and stores are kept")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with folder_of(asked.folder) as root:
        show(measure(root, asked.images, asked.read, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
