"""MixUp and CutMix by place in the global batch, so that no cut over workers changes a batch."""

from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

import nfnet

BETA = 0.2
"""Both parameters of MixUp's Beta distribution (paper, section 5)."""


@dataclass(frozen=True)
class Mixing:
    """How the images at some places of a global batch are mixed with those at other places."""

    partner_N: Tensor
    """Place, in the global batch, of the image that is mixed in."""
    keep_N: Tensor
    """MixUp: share of the image's own pixels' values, 1 where the place is not for MixUp."""
    box_N4: Tensor
    """CutMix: the pasted box as (top, bottom, left, right), fractions of the image; empty where
    the place is not for CutMix."""


def draw_mixing(
    keys_N: Tensor, places_N: Tensor, batch_size: int, mixup: bool, cutmix: bool
) -> Mixing:
    """Draws partners, ratios and boxes, each a function of the place's key alone.

    With both kinds on, the first half of the global batch is for MixUp, the second for CutMix.

    Args:
        keys_N: one random key for each place.
        places_N: places in the global batch, 0 <= place < batch_size.
    """

    def draw(stream: int) -> Tensor:
        return nfnet.uniform(nfnet.hash_keys(keys_N, stream)).double()

    first_half = places_N < (batch_size + 1) // 2
    for_mixup = first_half if cutmix else torch.ones_like(first_half)
    for_mixup = for_mixup & mixup
    for_cutmix = ~for_mixup & cutmix
    ratio = torch.from_numpy(betaincinv(BETA, BETA, draw(1).numpy()))
    # A box of area 1 - ratio around a uniform centre, cut off at the image's edges.
    half_side = (1 - draw(2)).sqrt() / 2 * for_cutmix
    row, column = draw(3), draw(4)
    box = [row - half_side, row + half_side, column - half_side, column + half_side]
    return Mixing(
        partner_N=(draw(0) * batch_size).long(),
        keep_N=torch.where(for_mixup, ratio, torch.ones_like(ratio)),
        box_N4=torch.stack(box, dim=1).clamp(0, 1),
    )


def mix(images_NCHW: Tensor, partners_NCHW: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Mixes uint8 images with their partners; returns them and each image's own share (N,).

    CutMix's share is counted in pixels, after the box was rounded to the grid.
    """
    height, width = images_NCHW.shape[-2:]
    keep = mixing.keep_N[:, None, None, None]
    blended = keep * images_NCHW + (1 - keep) * partners_NCHW
    top, bottom = (mixing.box_N4[:, :2] * height).round().T[..., None]
    left, right = (mixing.box_N4[:, 2:] * width).round().T[..., None]
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    in_box_NHW = in_rows[:, :, None] & in_columns[:, None, :]
    mixed = torch.where(in_box_NHW[:, None], partners_NCHW, blended.round())
    share_N = mixing.keep_N * (1 - in_box_NHW.double().mean((1, 2)))
    return mixed.to(torch.uint8), share_N
