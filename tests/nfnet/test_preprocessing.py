"""Sizes, crops and pixel statistics against timm's, the paper's table and the authors' rule."""

from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image

import nfnet

TIMMS = sorted(set(timm.list_models(module="nfnet")) & set(nfnet.list_models()))

# arXiv 2102.06171, table 1: pixels of training and of evaluation.
PAPERS_SIZES = {
    "f0": (192, 256),
    "f1": (224, 320),
    "f2": (256, 352),
    "f3": (320, 416),
    "f4": (384, 512),
    "f5": (416, 544),
    "f6": (448, 576),
    "f7": (480, 608),
}


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    small = Image.fromarray(pixels.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", TIMMS)
def test_sizes_and_statistics_are_timms(name: str) -> None:
    theirs = timm.get_pretrained_cfg(name)
    ours = nfnet.preprocessing(name)
    _, *train = theirs.input_size
    _, *test = theirs.test_input_size or theirs.input_size
    assert [ours.train_size] * 2 == train
    assert [ours.test_size] * 2 == test
    assert ours.squash == (theirs.crop_mode == "squash")
    assert theirs.interpolation == "bicubic"
    assert theirs.mean == nfnet.IMAGENET_MEAN
    assert theirs.std == nfnet.IMAGENET_STD
    if not name.startswith("dm_"):  # of which timm rounds the authors' rule
        assert ours.crop == (theirs.test_crop_pct or theirs.crop_pct)


@pytest.mark.parametrize("name", [name for name in TIMMS if not name.startswith("dm_")])
def test_evaluation_is_timms(name: str) -> None:
    data: dict[str, Any] = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), use_test_size=True
    )
    image = photo(700, 600)
    expected = timm.data.create_transform(**data, is_training=False)(image)
    torch.testing.assert_close(nfnet.eval_transform(name)(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("size", PAPERS_SIZES)
def test_sizes_of_the_f_models_are_the_papers(size: str, plus: str) -> None:
    found = nfnet.preprocessing(f"dm_nfnet_{size}{plus}")
    assert (found.train_size, found.test_size) == PAPERS_SIZES[size]


@pytest.mark.parametrize(
    ("name", "test_size"),
    [
        *((f"dm_nfnet_{size}", test) for size, (_, test) in PAPERS_SIZES.items()),
        ("dm_nfnet_f4+", 512),
        ("dm_nf_resnet50", 224),
        ("preact_resnet200", 224),
    ],
)
def test_the_authors_resize_to_32_pixels_more_and_evaluate_the_centre(
    name: str, test_size: int
) -> None:
    # So an image that has these pixels already is cut, and none of them changes.
    image = photo(test_size + 32, test_size + 32)
    found = np.array(nfnet.preprocessing(name).crop_image(image))
    assert np.array_equal(found, np.array(image)[16:-16, 16:-16])


def test_the_authors_squash_to_a_square_what_is_none() -> None:
    image = photo(600, 300)
    squashed = image.resize((288, 288), Image.Resampling.BICUBIC)
    found = np.array(nfnet.preprocessing("dm_nfnet_f0").crop_image(image))
    assert np.array_equal(found, np.array(squashed)[16:-16, 16:-16])
