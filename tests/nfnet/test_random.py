"""Hash and uniforms: against SplitMix64's published outputs, and by their statistics."""

import mpmath
import numpy as np
import pytest
import torch

from nfnet import hash_keys, uniform

MASK = 2**64 - 1
with mpmath.workprec(128):
    START = int((mpmath.pi - 3) * 2**64)
"""The first binary digits of pi after the point."""
N = 1_000_000


def splitmix64(seed: int, index: int) -> int:
    """Output number `index` of SplitMix64, in Python's unbounded integers."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_is_splitmix64() -> None:
    # Published test vector for seed 1234567.
    assert [splitmix64(1234567, i) for i in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(
    "parts", [(0,), (1, 2, 3), (-1, 5), (2**63, -(2**63)), (2**64 - 1, 7), (42, 10**12)]
)
def test_each_part_picks_one_output_of_the_stream_the_last_one_started(
    parts: tuple[int, ...],
) -> None:
    expected = START
    for part in parts:
        expected = splitmix64(expected, part)
    assert hash_keys(*parts).item() & MASK == expected
    if all(-(2**63) <= part < 2**63 for part in parts):
        tensors = [torch.tensor([part]) for part in parts]
        assert hash_keys(*tensors).item() & MASK == expected
        assert hash_keys(parts[0], *tensors[1:]).item() & MASK == expected
        assert hash_keys(tensors[0], *parts[1:]).item() & MASK == expected


def test_parts_broadcast_and_a_batch_can_be_cut() -> None:
    places = torch.arange(10)
    keys = hash_keys(3, 7, places)
    assert torch.equal(torch.cat([hash_keys(3, 7, places[:4]), hash_keys(3, 7, places[4:])]), keys)
    assert hash_keys(keys[:, None], torch.arange(3)).shape == (10, 3)
    assert hash_keys(1, 2).shape == ()


def test_order_and_number_of_parts_matter() -> None:
    keys = [hash_keys(*p).item() for p in [(1, 2), (2, 1), (1,), (1, 0), (0, 1), (-1, 1), (1, -1)]]
    assert len(set(keys)) == len(keys)


def test_a_million_keys_do_not_collide() -> None:
    places = torch.arange(1000)
    keys = hash_keys(0, places[:, None], places).flatten()
    assert len(keys.unique()) == N


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    u = uniform(hash_keys(0, torch.arange(N))).numpy()
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    # Five standard errors each.
    assert abs(u.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / N)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / N)
    # Kolmogorov-Smirnov at one in a million.
    distance = np.abs(np.sort(u) - (np.arange(N) + 0.5) / N).max()
    assert distance < 2.7 / np.sqrt(N)


def test_neighbouring_keys_are_uncorrelated() -> None:
    places = torch.arange(N)
    u = uniform(hash_keys(0, 0, places)).numpy()
    others = {
        "next place": np.roll(u, 1),
        "next step": uniform(hash_keys(0, 1, places)).numpy(),
        "next seed": uniform(hash_keys(1, 0, places)).numpy(),
        "derived key": uniform(hash_keys(hash_keys(0, 0, places), 0)).numpy(),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(u, other)[0, 1]) < 5 / np.sqrt(N), name


def test_each_bit_of_the_input_moves_half_of_the_output() -> None:
    x = torch.arange(2000)
    for bit in range(63):
        moved = hash_keys(x) ^ hash_keys(x ^ (1 << bit))
        ones = sum(((moved >> b) & 1).double().mean().item() for b in range(64))
        assert abs(ones - 32) < 1, bit


def test_the_largest_and_smallest_keys_stay_inside_the_interval() -> None:
    edges = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert uniform(edges).tolist() == [0.0, 1 - 2.0**-53, 0.5 - 2.0**-53, 0.5]


def test_refuses_nothing_and_other_types() -> None:
    with pytest.raises(ValueError, match="no parts"):
        hash_keys()
    with pytest.raises(ValueError, match=r"type torch.float32, expected torch.int64"):
        hash_keys(1, torch.ones(3))


@pytest.mark.slow
def test_keys_are_the_same_in_a_compiled_function() -> None:
    def draw(keys_N: torch.Tensor) -> torch.Tensor:
        return uniform(hash_keys(keys_N[:, None], 1, torch.arange(50)))

    keys = hash_keys(3, torch.arange(1000))
    assert torch.equal(torch.compile(draw)(keys), draw(keys))
