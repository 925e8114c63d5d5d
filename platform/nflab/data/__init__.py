"""Datasets behind one interface, and the exact batches of an experiment."""

import dataclasses
import functools
import importlib
import io
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import nfnet
from nflab.data.arrays import cifar, digits, is_cifar
from nflab.data.dataset import Dataset, DatasetError, UnreadableImage
from nflab.data.folder import ImageFolder
from nflab.data.idx import FASHION_MNIST, fashion_mnist, is_idx, load_idx
from nflab.data.store import is_store, open_store
from nflab.data.subset import Subset
from nflab.settings.config import Config

__all__ = ["Dataset", "DatasetError", "example_image", "load_dataset"]


def load_dataset(config: Config) -> Dataset:
    """The dataset of a configuration, at the pixels that its model takes.

    Raises:
        DatasetError: it is no known name or folder, or cannot be used.
    """
    sizes = nfnet.preprocessing(config.model.model)
    pixels = config.data.image_size
    if pixels is not None:
        sizes = dataclasses.replace(sizes, train_size=pixels, test_size=pixels)
    skips, share = config.data.bad_images == "skip", config.data.subset
    if share == 1:
        return _load(config.data.dataset, sizes, skips)
    return _part(config.data.dataset, sizes, skips, share)


def example_image(config: Config) -> bytes:
    """The first validation image of a configuration's dataset that can be read, as the bytes of a
    PNG file."""
    dataset = load_dataset(config)
    for index in range(dataset.sizes["val"]):
        try:
            images, _ = dataset.eval_images("val", torch.tensor([index]))
            break
        except UnreadableImage:
            if config.data.bad_images == "fail":
                raise
    pixels_HWC = images[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC).save(
        file, "PNG"
    )
    return file.getvalue()


@functools.cache
def _part(name: str, sizes: nfnet.Preprocessing, skips: bool, share: float) -> Dataset:
    return Subset(_load(name, sizes, skips), share)


@functools.cache
def _load(name: str, sizes: nfnet.Preprocessing, skips: bool) -> Dataset:
    if chosen := re.fullmatch(r"digits(?::(\d)-(\d))?", name):
        first, last = (int(digit) for digit in (chosen[1] or "0", chosen[2] or "9"))
        if first >= last:
            raise DatasetError(f"dataset {name!r} has no two classes: give a range such as 0-4")
        return digits(first, last)
    if name == FASHION_MNIST:
        return fashion_mnist()
    if made := re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)", name):
        return _own(made[1], made[2], sizes)
    folder = Path(name)
    if "://" not in name and not folder.is_dir():
        raise DatasetError(
            f"dataset {name!r} is neither 'digits' nor '{FASHION_MNIST}' nor a folder on this "
            "machine: give the folder of the images, or the address of a store of images"
        )
    if "://" in name or is_store(name):
        return open_store(name, sizes)
    if is_cifar(folder):
        return cifar(folder)
    return load_idx(folder) if is_idx(folder) else ImageFolder(folder, sizes, skips)


def _own(module: str, factory: str, sizes: nfnet.Preprocessing) -> Dataset:
    """What a function of a user's makes."""
    try:
        made: Any = getattr(importlib.import_module(module), factory)(sizes)
    except Exception as error:  # what is not ours may fail in any way
        raise DatasetError(
            f"dataset '{module}:{factory}' cannot be made: {type(error).__name__}: {error}; it "
            "names a module that Python finds, and a function in it that takes an "
            "nfnet.Preprocessing"
        ) from error
    lacking = [name for name in _PROTOCOL if not hasattr(made, name)]
    if lacking:
        raise DatasetError(
            f"dataset '{module}:{factory}' is no Dataset: it has no {', '.join(lacking)} (see "
            "nflab.data.dataset.Dataset)"
        )
    own: Dataset = made
    return own


_PROTOCOL = sorted(
    {
        *Dataset.__annotations__,
        *(name for name in vars(Dataset) if not name.startswith("_")),
    }
)
