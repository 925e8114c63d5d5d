"""RandAugment as a function of each image's key."""

import torch
from torch import Tensor
from torchvision.transforms import v2


def rand_augment(images_NCHW: Tensor, keys_N: Tensor, level: int) -> Tensor:
    """torchvision's RandAugment (two operations) at magnitude 3 x level of its 30; 0 is off.

    Args:
        images_NCHW: uint8, 1 or 3 channels.
        keys_N: one int64 key for each image; its operations and signs follow from it alone.
    """
    if level == 0:
        return images_NCHW
    augment = v2.RandAugment(num_ops=2, magnitude=3 * level)
    augmented = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's CPU generator
        for image, key in zip(images_NCHW, keys_N.tolist(), strict=True):
            torch.default_generator.manual_seed(key)
            augmented.append(augment(image))
    return torch.stack(augmented)
