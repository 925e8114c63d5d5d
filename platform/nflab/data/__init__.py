"""Datasets and how their images become the batches of an exact experiment."""

import functools
from collections.abc import Callable

from nflab.data.dataset import Dataset
from nflab.data.digits import Digits

__all__ = ["Dataset", "dataset_names", "load_dataset"]

_DATASETS: dict[str, Callable[[], Dataset]] = {"digits": Digits}


def dataset_names() -> list[str]:
    """Names that `load_dataset` knows."""
    return sorted(_DATASETS)


@functools.cache
def load_dataset(name: str) -> Dataset:
    """The dataset called `name`, one of `dataset_names()`."""
    return _DATASETS[name]()
