"""What a forward pass costs."""

import torch

from nfnet.model import ResNet


def count_flops(model: ResNet, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds of the convolutions and linear layers for one image.

    Nothing is computed: a copy of the model without data runs on an image without data.

    Args:
        model: a model from `create_model`.
        image_size: pixels along each side, or (height, width).

    Returns:
        Multiply-adds, which papers on image classifiers, arXiv 2102.06171 among them, call FLOPs.

    Raises:
        ValueError: the image is smaller than the network's stride.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a while, and few need it

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape = ResNet(model.variant).eval()
        shape(torch.empty(1, model.variant.in_channels, height, width))
    # PyTorch counts a multiply-add as two operations.
    return counter.get_total_flops() // 2
