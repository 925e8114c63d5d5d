"""What random numbers are for: part of every key, so that no two uses share their numbers."""

from enum import IntEnum

from torch import Tensor

import nfnet


class Stream(IntEnum):
    """One use of randomness."""

    ORDER = 0
    CROP = 1
    AUGMENT = 2
    MIX = 3
    MODEL = 4
    """Dropout and stochastic depth."""
    SEARCH = 5
    PARTNER_ORDER = 6
    """Fresh images that others are mixed with."""
    PARTNER_CROP = 7
    SUBSET = 8
    """Which training images a part of the split has."""


def keys(seed: int, stream: Stream, *parts: int | Tensor) -> Tensor:
    """Random keys of one use, for `nfnet.uniform`; see `nfnet.hash_keys`."""
    return nfnet.hash_keys(seed, int(stream), *parts)
