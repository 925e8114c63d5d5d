"""Randomness as a function: keys hashed from what a number is for, uniforms from keys.

A generator has a state, so what it draws depends on everything drawn before. A key has none:
`uniform(hash_keys(seed, step, places))` gives every place in the batch its own number, whoever
computes it and in whatever order. Integer arithmetic only, so CPU and GPU agree to the bit.

Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from typing import TypeVar

import torch
from torch import Tensor

# The constants of SplitMix64 as signed 64-bit integers, and digits of pi to start from.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_START = 0x243F6A8885A308D3

_Int64 = TypeVar("_Int64", int, Tensor)


def _wrap(z: _Int64) -> _Int64:
    """A Python integer taken modulo 2^64 into the signed range; int64 tensors wrap already."""
    return (z + 2**63) % 2**64 - 2**63 if isinstance(z, int) else z


def _shift_right(z: _Int64, bits: int) -> _Int64:
    """Logical shift: `>>` copies the sign bit, the mask takes the copies away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: _Int64) -> _Int64:
    """SplitMix64's output function: a bijection in which every input bit moves half of all."""
    z = _wrap((z ^ _shift_right(z, 30)) * _MULTIPLIERS[0])
    z = _wrap((z ^ _shift_right(z, 27)) * _MULTIPLIERS[1])
    return z ^ _shift_right(z, 31)


def hash_keys(*parts: int | Tensor) -> Tensor:
    """Hash a sequence of integers into one 64-bit key.

    Tensors broadcast: `hash_keys(seed, step, places_N)` is one key per place. The order of the
    parts matters. Keys are parts themselves: `hash_keys(keys_N, 3)` derives new ones.

    Args:
        parts: Python integers (taken modulo 2^64) or int64 tensors, at least one.

    Returns:
        int64 tensor of the broadcast shape (0-d if every part is a Python integer).

    Raises:
        ValueError: there are no parts, or a tensor is not of type int64.
    """
    if not parts:
        raise ValueError("hash_keys got no parts; pass at least one integer or int64 tensor.")
    key: int | Tensor = _START
    for part in parts:
        if isinstance(part, Tensor) and part.dtype != torch.int64:
            raise ValueError(
                f"hash_keys got a tensor of type {part.dtype}, expected torch.int64; "
                "convert it with .long()."
            )
        # Output number `part` of the SplitMix64 stream that starts at `key`.
        # A tensor takes no Python integer beyond 64 bits, so that one is wrapped first.
        # ~(-2 - part) is part + 1: compiled for a CPU (torch 2.15), an arange times a number this
        # large, without such an operation in between, writes beyond its memory.
        offset = ~(-2 - part) * _GAMMA
        key = key + (_wrap(offset) if isinstance(offset, int) else offset)
        key = _mix(_wrap(key)) if isinstance(key, int) else _mix(key)
    return key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64)


def uniform(keys: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one per key: its upper 53 bits as a fraction.

    Args:
        keys: int64 tensor from `hash_keys`, of any shape.

    Returns:
        float64 tensor of the same shape.
    """
    return _shift_right(keys, 11).double() * 2.0**-53
