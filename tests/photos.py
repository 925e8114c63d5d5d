"""Folders of real photographs: crops of the two that scikit-learn ships, one class each."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def write_photos(root: Path, counts: dict[str, int], pixels: int = 64) -> Path:
    """Writes `root/SPLIT/CLASS/NUMBER.jpg` with so many images of each class in each split."""
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (pixels + 16 * int(rng.integers(3)), pixels)  # of several shapes
                left, top = (
                    int(rng.integers(end - length))
                    for end, length in zip(photo.shape[1::-1], size, strict=True)
                )
                crop = photo[top : top + size[1], left : left + size[0]]
                Image.fromarray(crop).save(folder / f"{number:03d}.jpg", quality=95)
    return root
