"""The authors' random crop: TensorFlow's `sample_distorted_bounding_box`, by key.

The ratio of the sides is uniform in its range (not its logarithm, as in torchvision's crop), the
height is uniform between what area, ratio and image allow, and so is the place. At least a tenth
of the image is covered; what covers less is drawn again.

Source: arXiv 2102.06171's released code and TensorFlow's; compared with TensorFlow's own draws in
`tests/golden/random_crop.json`.
"""

import torch
from torch import Tensor

import nfnet

_AREA = (0.08, 1.0)
_COVERED = 0.1
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10

_CENTRE = 224 / 256
"""Share of the shorter side that is cropped in the centre instead."""


def random_crop(width: int, height: int, key: Tensor) -> tuple[int, int, int, int]:
    """A random part of an image, from a key alone.

    Returns:
        (left, top, right, bottom) in pixels.
    """
    ((left, top, right, bottom),) = random_crops(
        torch.tensor([[width, height]]), key.view(1)
    ).tolist()
    return left, top, right, bottom


def random_crops(sizes_N2: Tensor, keys_N: Tensor) -> Tensor:
    """A random part of each of several images, each from its key alone.

    Args:
        sizes_N2: int64 (width, height) in pixels.
        keys_N: int64, one for each image.

    Returns:
        int64 (N, 4): left, top, right, bottom in pixels, of the first of ten draws that fits; if
        none does, or that is the whole image, a square in the centre of 7/8 of the shorter side.
    """
    draws_AN4 = nfnet.uniform(
        nfnet.hash_keys(keys_N[:, None], torch.arange(4 * _ATTEMPTS)).view(-1, _ATTEMPTS, 4)
    ).transpose(0, 1)
    width_N, height_N = sizes_N2.double().unbind(1)
    pixels_N = width_N * height_N
    least_N, most_N = (share * pixels_N for share in _AREA)

    # Of each attempt (A, N); a half is rounded to the even number, as by C's lrint.
    ratio = _RATIO[0] + (_RATIO[1] - _RATIO[0]) * draws_AN4[..., 0]
    low, high = ((area / ratio).sqrt().round() for area in (least_N, most_N))
    # The tallest whose width, once rounded, is still within the image.
    too_wide = (high * ratio).round() > width_N
    high = torch.where(too_wide, ((width_N + 0.5 - 1e-7) / ratio).floor(), high)
    high = high - ((high * ratio).round() > width_N).double()
    high = torch.minimum(high, height_N)
    low = torch.minimum(low, high)
    h = low + (draws_AN4[..., 1] * (high - low + 1)).floor()
    w = (h * ratio).round()
    # Rounding alone may take it across a limit.
    h = h + (w * h < least_N).double()
    w = (h * ratio).round()
    h = h - (w * h > most_N).double()
    w = (h * ratio).round()
    fits = (w * h >= least_N) & (w * h <= most_N) & (w <= width_N) & (h <= height_N)
    fits &= (w > 0) & (h > 0) & (w * h >= _COVERED * pixels_N)

    # TensorFlow never draws the last place.
    left = (draws_AN4[..., 2] * (width_N - w)).floor()
    top = (draws_AN4[..., 3] * (height_N - h)).floor()
    first_N = fits.int().argmax(dim=0)  # of equals the first
    each_N = torch.arange(len(keys_N))
    drawn_N4 = torch.stack((left, top, left + w, top + h), dim=2)[first_N, each_N]

    side_N = (torch.minimum(width_N, height_N) * _CENTRE).floor().clamp_min(1)
    left_N, top_N = ((size_N - side_N + 1).div(2).floor() for size_N in (width_N, height_N))
    centre_N4 = torch.stack((left_N, top_N, left_N + side_N, top_N + side_N), dim=1)
    # TensorFlow answers with the whole image where nothing fits; the authors take no whole ones.
    whole_N = (drawn_N4[:, 2:] - drawn_N4[:, :2] == sizes_N2).all(dim=1)
    drawn_N = fits.any(dim=0) & ~whole_N
    return torch.where(drawn_N[:, None], drawn_N4, centre_N4).long()
