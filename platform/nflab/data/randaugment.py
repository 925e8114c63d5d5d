"""The authors' RandAugment, as a function of each image's key.

Sixteen operations; each image goes through some drawn uniformly, one after the other. A level of 10
is the strongest that the operations were made for; above it they extrapolate.

Source: arXiv 1909.13719; the constants are those of the authors' released code (arXiv 2102.06171),
whose outputs `tests/nflab/test_randaugment.py` compares with.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nfnet

# Every operation works on integers, or on each pixel by itself: sums of floating-point numbers
# would depend on how many images are computed together.

FILL = 128
"""Grey level of pixels that come from outside the image, and of what is cut out."""

TRANSLATED, CUT_OUT = 100, 40
"""Pixels by which Translate moves an image at level 10, and half of the side that Cutout greys:
the same at every image size, as in the authors' code."""

SMALL, SMALL_REFERENCE = 64, 224
"""Images of no more pixels along a side would be moved out of sight: theirs are scaled down from a
side of 224 pixels. The authors trained on none so small."""

ONE_BY_ONE = ("cpu",)
"""Devices on which each image goes through its operations by itself, so that what these make on
their way stays in the cache; elsewhere all of one operation do at once, in few calls."""

# Takes uint8 images (N, C, H, W), the level, and numbers in [0, 1) for each image (N, 3): below 1/2
# the first means a positive sign; the others are a place in the image.
Operation = Callable[[Tensor, float, Tensor], Tensor]


def rand_augment(images_NCHW: Tensor, keys_N: Tensor, layers: int, level: int) -> Tensor:
    """Sends each image through operations drawn from its key alone.

    Args:
        images_NCHW: uint8, 1 or 3 channels, on any device.
        keys_N: one int64 key for each image, on the CPU, where all is drawn.
        layers: operations for each image.
        level: their strength; 0 changes nothing.

    Returns:
        Images of the same shape and type.
    """
    if level == 0:
        return images_NCHW
    images = images_NCHW.clone()
    operations = list(OPERATIONS.values())
    for layer in range(layers):
        draws_N4 = nfnet.uniform(nfnet.hash_keys(keys_N[:, None], layer, torch.arange(4)))
        chosen_N = (draws_N4[:, 0] * len(operations)).long()
        if images.device.type in ONE_BY_ONE:
            for n, index in enumerate(chosen_N.tolist()):
                images[n] = operations[index](images[n : n + 1], level, draws_N4[n : n + 1, 1:])[0]
            continue
        for index in chosen_N.unique().tolist():
            of_operation = chosen_N == index
            draws_N3 = draws_N4[of_operation, 1:]
            of_operation = of_operation.to(images.device)
            images[of_operation] = operations[index](images[of_operation], level, draws_N3)
    return images


def _to_uint8(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def _sign(draws_N3: Tensor) -> Tensor:
    return torch.where(draws_N3[:, 0] < 0.5, 1.0, -1.0)


def _distance(pixels: int, level: float, images_NCHW: Tensor) -> float:
    """Pixels at a level, of which level 10 has so many."""
    side = max(images_NCHW.shape[-2:])
    return pixels * level / 10 * (side / SMALL_REFERENCE if side <= SMALL else 1)


def _blend(degenerate: Tensor, images: Tensor, level: float) -> Tensor:
    """Between a degenerate image (factor 0) and the image (factor 1), or beyond it."""
    factor = 0.1 + 1.8 * level / 10
    return _to_uint8(degenerate + factor * (images.float() - degenerate))


def auto_contrast(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Stretches each channel to 0..255."""
    low, high = (f(images.float(), dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scale = torch.where(high > low, 255 / (high - low).clamp_min(1), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    return _to_uint8(images * scale + offset)


def equalize(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Makes all grey levels of a channel about equally frequent, as PIL does."""
    n, c, h, w = images.shape
    pixels = images.reshape(n * c, h * w).long()
    counts = torch.zeros(n * c, 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels))
    last = counts.gather(1, pixels.amax(dim=1, keepdim=True))
    step = (h * w - last) // 255
    table = (counts.cumsum(dim=1) + step // 2) // step.clamp_min(1)
    table = F.pad(table[:, :-1], (1, 0)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(1, pixels).reshape(images.shape).to(torch.uint8)


def invert(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """White becomes black."""
    return 255 - images


def posterize(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Keeps int(4 * level / 10) bits of each pixel, 8 at most: more at higher levels."""
    dropped = max(0, 8 - int(4 * level / 10))
    return (images >> dropped) << dropped


def solarize(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Inverts pixels of int(256 * level / 10) or more."""
    return torch.where(images.int() < int(256 * level / 10), images, 255 - images)


def solarize_add(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Adds int(110 * level / 10) to pixels below 128."""
    added = _to_uint8(images.int() + int(110 * level / 10))
    return torch.where(images < 128, added, images)


def color(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Between grey and colour; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    grey = (0.2989 * red + 0.587 * green + 0.114 * blue).round()
    return _blend(grey, images, level)


def contrast(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Between the image and a grey one, of min(255, H * W / 256) as in the authors' code."""
    height, width = images.shape[-2:]
    return _blend(torch.tensor(min(255.0, height * width / 256)), images, level)


def brightness(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Between black and the image."""
    return _blend(torch.tensor(0.0), images, level)


def sharpness(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Between a smoothed image and the image; the outermost pixels stay as they are."""
    smooth = images.to(torch.int16)
    rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    # Weights 1, and 5 in the middle, over 13.
    smooth[:, :, 1:-1, 1:-1] = (square + 4 * smooth[:, :, 1:-1, 1:-1]) // 13
    return _blend(smooth, images, level)


def rotate(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """By 3 degrees x level about the centre."""
    angle = _sign(draws) * math.radians(30 * level / 10)
    bottom, right = (size - 1 for size in images.shape[-2:])
    cos, sin = angle.cos(), angle.sin()
    x_offset = (right - (cos * right - sin * bottom)) / 2
    y_offset = (bottom - (sin * right + cos * bottom)) / 2
    return _affine(images, [cos, -sin, x_offset], [sin, cos, y_offset])


def shear_x(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Moves each row by 0.03 x level of its distance from the top."""
    return _affine(images, [1, _sign(draws) * 0.3 * level / 10, 0], [0, 1, 0])


def shear_y(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Moves each column by 0.03 x level of its distance from the left."""
    return _affine(images, [1, 0, 0], [_sign(draws) * 0.3 * level / 10, 1, 0])


def translate_x(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Sideways by 10 pixels x level."""
    return _affine(images, [1, 0, _sign(draws) * _distance(TRANSLATED, level, images)], [0, 1, 0])


def translate_y(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Up or down by 10 pixels x level."""
    return _affine(images, [1, 0, 0], [0, 1, _sign(draws) * _distance(TRANSLATED, level, images)])


def cutout(images: Tensor, level: float, draws: Tensor) -> Tensor:
    """Makes a square around a random pixel grey, to 4 pixels x level on each side."""
    half = int(_distance(CUT_OUT, level, images))
    inside = []
    for draw_N, size in ((draws[:, 1], images.shape[2]), (draws[:, 2], images.shape[3])):
        centre_N1 = (draw_N * size).floor()[:, None]
        places = torch.arange(size)
        inside.append((places >= centre_N1 - half) & (places < centre_N1 + half))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square.to(images.device), FILL)


def _affine(images: Tensor, x_row: list[float | Tensor], y_row: list[float | Tensor]) -> Tensor:
    """Each pixel (x, y) takes the nearest one to (a x + b y + c, d x + e y + f) of its image.

    Args:
        x_row: a, b and c, each a number, or a tensor (N,) of one for each image.
        y_row: d, e and f likewise.
    """
    n, channels, height, width = images.shape
    device = images.device
    x, y = torch.arange(width, device=device), torch.arange(height, device=device)[:, None]
    from_x, from_y = (_nearest(row, x, y) for row in (x_row, y_row))
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)
    # What comes from outside is taken from one more pixel behind the last.
    places = torch.where(outside, height * width, from_y * width + from_x).expand(n, height, width)
    pixels = F.pad(images.flatten(2), (0, 1), value=FILL)
    if n == 1:  # faster than gather
        moved = pixels[0].index_select(1, places.flatten())
    else:
        moved = pixels.gather(2, places.flatten(1)[:, None].expand(n, channels, -1))
    return moved.view(images.shape)


def _nearest(row: list[float | Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The whole numbers next to a x + b y + c, int64, of a shape that expands to (N, H, W)."""
    a, b, c = (torch.as_tensor(f, dtype=torch.float32).reshape(-1, 1, 1) for f in row)
    a, b, c = (factor.to(x.device) for factor in (a, b, c))
    # A factor that is 0 for all leaves that axis out.
    of_x, of_y = (not isinstance(factor, int) or factor != 0 for factor in row[:2])
    exact = a * x + b * y + c if of_x and of_y else a * x + c if of_x else b * y + c
    # In float32, and halves away from zero: both decide about exact halves.
    return (exact + torch.copysign(exact.new_tensor(0.5), exact)).long()


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Cutout": cutout,
    "SolarizeAdd": solarize_add,
}
