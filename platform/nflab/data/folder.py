"""A folder of images in ImageNet's layout, on a local or a shared disk."""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch

import nfnet
from nflab.data.contents import digests
from nflab.data.crop import random_crop as random_crop
from nflab.data.dataset import DatasetError, contents, fingerprint
from nflab.data.encoded import EncodedImages
from nflab.data.layout import scan

CHECKED = 20_000
"""Files that are looked at before anything starts, spread over all of them."""

CHECKED_AT_ONCE = 16
"""They wait for the disk."""


class ImageFolder(EncodedImages):
    """Implements `Dataset` over `root/train/CLASS/...`, `root/val/CLASS/...` and, if it is there,
    `root/test/CLASS/...` (see `layout.scan`); without `train` there is nothing to train on.

    Args:
        root: the folder.
        sizes: pixels of training and evaluation, and the evaluation's crop.
        skips: whether images that cannot be read are told instead of refused.

    Raises:
        DatasetError: the layout is another, a class has no images, or a file is no image.
    """

    def __init__(self, root: Path, sizes: nfnet.Preprocessing, skips: bool = False) -> None:
        self._root = root
        layout = scan(root)
        self.left_out = layout.left_out
        found = {"train": [], **layout.files}
        labels = {part: [label for _, label in files] for part, files in found.items()}
        super().__init__(
            {part: torch.tensor(of_part, dtype=torch.long) for part, of_part in labels.items()},
            layout.class_names,
            sizes,
        )
        self._files = {part: [path for path, _ in files] for part, files in found.items()}
        # As they lie on the disk: which of them are held out follows from that.
        paths = [path for files in self._files.values() for path in files]
        damaged = _damaged(paths)
        if damaged:
            told = f"{', '.join(damaged[:3])}{', ...' if len(damaged) > 3 else ''}"
            if not skips:
                raise DatasetError(
                    f"{len(damaged)} files cannot be read as images: {told}; remove or replace "
                    "them, or go on without them with --bad-images skip"
                )
            told = f"{len(damaged)} files that cannot be read as images ({told})"
            self.left_out = ", ".join(filter(None, (self.left_out, told)))
        try:
            found_digests = digests(root, paths)
        except OSError as error:
            raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from None
        self.contents: Mapping[str, str] = contents(labels, self.class_names, found_digests)
        self.fingerprint = fingerprint(self.contents)

    @cached_property
    def earlier_fingerprint(self) -> str | None:
        """Of names and sizes alone."""
        digest = hashlib.sha256()
        for split, (part, places_N) in self._places.items():
            for place in places_N.tolist():
                path = Path(self._files[part][place])
                size = path.stat().st_size
                digest.update(f"{split} {path.relative_to(self._root)} {size}\n".encode())
        return digest.hexdigest()[:16]

    def _file(self, part: str, place: int) -> Path:
        return Path(self._files[part][place])

    def _name(self, part: str, place: int) -> str:
        return self._files[part][place]


def _damaged(paths: list[str]) -> list[str]:
    """What is wrong with files that are no images, as far as their ends tell: each would end a run
    hours later."""
    if not paths:
        return []

    def wrong(path: str) -> str | None:
        try:
            nfnet.check_image(path)
        except ValueError as error:
            return f"{path} ({error})"
        return None

    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        found = pool.map(wrong, paths[:: math.ceil(len(paths) / CHECKED)])
        return [one for one in found if one is not None]
