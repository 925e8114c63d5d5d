"""MixUp and CutMix by place in the global batch, so that no cut over workers changes a batch.

Source: arXiv 2102.06171, section 5, and its released code.
"""

from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

import nfnet

BETA = 0.2
"""Both parameters of MixUp's Beta distribution (paper, section 5)."""


@dataclass(frozen=True)
class Mixing:
    """How the images at some places of a global batch are mixed with their partners."""

    keep_N: Tensor
    """MixUp: share of the image's own pixels' values, 1 where the place is not for MixUp."""
    box_N4: Tensor
    """CutMix: the pasted box as (top, bottom, left, right), fractions of the image; empty where
    the place is not for CutMix."""


def neighbours(places_N: Tensor, batch_size: int) -> Tensor:
    """The other place of each place's pair: 0 with 1, 2 with 3, ...; the last of an odd number is
    its own."""
    partner_N = places_N ^ 1
    return torch.where(partner_N < batch_size, partner_N, places_N)


def draw_mixing(
    keys_N: Tensor, places_N: Tensor, batch_size: int, mixup: bool, cutmix: bool
) -> Mixing:
    """Draws ratios and boxes, each a function of the place's key alone.

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
        keep_N=torch.where(for_mixup, ratio, torch.ones_like(ratio)),
        box_N4=torch.stack(box, dim=1).clamp(0, 1),
    )


def mix(images_NCHW: Tensor, partners_NCHW: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Mixes uint8 images with their partners, on any device; returns them, and each image's own
    share (N,) on the CPU.

    CutMix's share is counted in pixels, after the box was rounded to the grid.
    """
    height, width = images_NCHW.shape[-2:]
    mixed_NCHW, share_N = images_NCHW.clone(), mixing.keep_N.clone()
    blended = (mixing.keep_N < 1).nonzero()[:, 0]
    # On a CPU one by one, so that floating-point numbers stay in its cache.
    for places in blended.split(1 if images_NCHW.device.type == "cpu" else len(images_NCHW)):
        keep = mixing.keep_N[places].float()[:, None, None, None].to(images_NCHW.device)
        places = places.to(images_NCHW.device)
        images, partners = (of[places].float() for of in (images_NCHW, partners_NCHW))
        mixed_NCHW[places] = partners.lerp_(images, keep).round_().to(torch.uint8)
    grid = torch.tensor([height, height, width, width])
    for place, box in enumerate((mixing.box_N4 * grid).round().long().tolist()):
        top, bottom, left, right = box
        pasted = slice(top, bottom), slice(left, right)
        mixed_NCHW[place, :, *pasted] = partners_NCHW[place, :, *pasted]
        share_N[place] *= 1 - (bottom - top) * (right - left) / (height * width)
    return mixed_NCHW, share_N
