"""RandAugment: the authors' operations, drawn by key."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nfnet
from nflab.data import randaugment
from nflab.data.randaugment import OPERATIONS, rand_augment

with np.load(Path(__file__).parents[1] / "golden" / "randaugment_ops.npz") as _data:
    GOLDEN = dict(_data)
CASES = sorted(key for key in GOLDEN if "@" in key)
POSITIVE = torch.zeros(1, 3)


def to_nchw(image_hwc: np.ndarray) -> Tensor:
    return torch.from_numpy(image_hwc).permute(2, 0, 1)[None].contiguous()


@pytest.mark.parametrize("case", CASES)
def test_operations_are_the_authors(case: str) -> None:
    name, level = case.split("@")
    image = GOLDEN["image_large" if name.startswith("Translate") else "image"]
    ours = OPERATIONS[name](to_nchw(image), float(level), POSITIVE).int()
    difference = (ours - to_nchw(GOLDEN[case]).int()).abs().amax(dim=1)
    assert (difference > 2).double().mean() <= 0.01


def test_golden_images_cover_all_operations_but_cutout() -> None:
    assert {case.split("@")[0] for case in CASES} == set(OPERATIONS) - {"Cutout"}
    assert len(OPERATIONS) == 16
    # Nothing is inverted where the threshold is beyond white.
    image = to_nchw(GOLDEN["image"])
    assert torch.equal(OPERATIONS["Solarize"](image, 10, POSITIVE), image)


@pytest.mark.parametrize(
    ("size", "level", "half"),
    # The paper's sizes have the same pixels; a small image has its own, 40 x 32 / 224.
    [(192, 10, 40), (192, 15, 60), (320, 10, 40), (320, 15, 60), (32, 10, 5)],
)
def test_cutout_greys_a_square_around_a_pixel_of_the_image(
    size: int, level: float, half: int
) -> None:
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    draws = torch.tensor([[0.0, 0.5, 0.0]])
    cut = OPERATIONS["Cutout"](image, level, draws)[0]
    expected = torch.zeros(3, size, size, dtype=torch.uint8)
    expected[:, size // 2 - half : size // 2 + half, :half] = 128
    assert torch.equal(cut, expected)


@pytest.mark.parametrize(
    ("size", "level", "moved"),
    [(192, 5, 50), (192, 15, 150), (320, 5, 50), (320, 15, 150), (448, 15, 150), (56, 10, 25)],
)
@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translations_are_of_the_same_pixels_at_every_size(
    name: str, size: int, level: float, moved: int
) -> None:
    ramp = torch.arange(size).remainder(100).to(torch.uint8).expand(1, 3, size, size)
    image = ramp if name == "TranslateX" else ramp.transpose(2, 3)
    result = OPERATIONS[name](image, level, POSITIVE)
    result = result if name == "TranslateX" else result.transpose(2, 3)
    assert (result[..., size - moved :] == 128).all()
    assert torch.equal(result[..., : size - moved], ramp[..., moved:])


def test_signs_mirror() -> None:
    negative = torch.tensor([[0.9, 0.0, 0.0]])
    image = torch.randint(256, (1, 3, 21, 21), dtype=torch.uint8)
    mirrored = image.flip(3)
    for name in ("Rotate", "TranslateX"):
        there = OPERATIONS[name](image, 7, POSITIVE)
        back = OPERATIONS[name](mirrored, 7, negative).flip(3)
        assert (there == back).double().mean() > 0.9, name


@pytest.mark.parametrize("channels", [1, 3])
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    level=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_each_image_depends_on_its_own_key_alone(
    channels: int, height: int, width: int, level: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        256, (6, channels, height, width), dtype=torch.uint8, generator=generator
    )
    before = images.clone()
    keys = nfnet.hash_keys(seed, torch.arange(6))
    whole = rand_augment(images, keys, 3, level)
    assert whole.shape == images.shape
    assert whole.dtype == torch.uint8
    assert torch.equal(images, before)
    parts = [rand_augment(images[i : i + 1], keys[i : i + 1], 3, level) for i in (4, 1)]
    assert torch.equal(torch.cat(parts), whole[[4, 1]])
    with patch.object(randaugment, "ONE_BY_ONE", ()):  # as on a GPU
        assert torch.equal(rand_augment(images, keys, 3, level), whole)


def test_draws_all_operations_alike() -> None:
    keys = nfnet.hash_keys(7, torch.arange(16_000))
    images = to_nchw(GOLDEN["image"])[:, :, :16, :16].expand(16_000, -1, -1, -1)
    inverted = (rand_augment(images, keys, 1, 9) == 255 - images).flatten(1).all(dim=1)
    # Invert is one of 16.
    assert abs(int(inverted.sum()) - 1000) < 5 * (16_000 * 15 / 256) ** 0.5


def test_no_layers_or_level_0_change_nothing() -> None:
    image = to_nchw(GOLDEN["image"])
    keys = torch.arange(1)
    assert torch.equal(rand_augment(image, keys, 0, 9), image)
    assert torch.equal(rand_augment(image, keys, 4, 0), image)
