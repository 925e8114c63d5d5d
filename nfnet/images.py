"""One way to read an image file, for training, evaluation and serving alike.

What is in a file, and what is read:

| in the file | read as |
| --- | --- |
| EXIF orientation | ignored: pixels as they are stored, as in the authors' and timm's pipelines |
| 16 bits a channel | scaled to 8 (a colour by Pillow, which rounds down) |
| 32-bit integers, floats | refused: their white is not known |
| a palette | its colours |
| transparency | ignored: the colours beneath, as in the authors' and timm's pipelines |
| CMYK, YCbCr, LAB | converted by Pillow, without a colour profile |
| several frames | the first |
| more than 178,956,970 pixels | refused, as by Pillow: a small file may hold them |
| a truncated file | refused |
"""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

IMAGE_ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif"),
        *(".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)
"""Of the names of files that are images, in small letters."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

_TAIL = 256


def read_image(file: Path | str | BinaryIO, channels: int = 3) -> Image.Image:
    """The pixels of an image file.

    Args:
        file: its path, or what its bytes are read from.
        channels: 3 for colours, 1 for grey levels (ITU-R 601-2 luma).

    Returns:
        8 bits a channel, as RGB or L.

    Raises:
        ValueError: it is no image that can be read; says why.
    """
    try:
        with _opened(file) as image:
            return convert_image(image, channels)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(str(error) or type(error).__name__) from None


def check_image(file: Path | str) -> tuple[int, int]:
    """Looks at the beginning and the end of a file: (width, height) in pixels.

    A JPEG or PNG file without its end is decoded, for it may be cut off or have something after it.

    Raises:
        ValueError: as `read_image`, of what can be told so.
    """
    try:
        with _opened(file) as image:
            _require_known_white(image)
            size, kind = image.size, image.format
        if not _has_end(Path(file), kind):
            read_image(file)
        return size
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from None


def convert_image(image: Image.Image, channels: int = 3) -> Image.Image:
    """An opened image as `read_image` returns it.

    Raises:
        ValueError, OSError: likewise.
    """
    _require_known_white(image)
    if _has_16_bits(image):
        levels = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGB")  # else a palette of greys is dithered
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        image.load()  # while the file is open; to convert would copy
        return image
    return image.convert(mode)


def _has_end(file: Path, kind: str | None) -> bool:
    if kind not in _ENDS:
        return True
    with file.open("rb") as opened:
        opened.seek(-min(_TAIL, file.stat().st_size), 2)
        return opened.read().rstrip(b"\0\r\n").endswith(_ENDS[kind])


def _opened(file: Path | str | BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of half the pixels that it refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _has_16_bits(image: Image.Image) -> bool:
    """Whether its greys are 0..65535; of a PGM file Pillow says so with a wider type."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _require_known_white(image: Image.Image) -> None:
    if image.mode in ("I", "F") and not _has_16_bits(image):
        raise ValueError("its pixels are 32-bit numbers, of which it is not known what is white")
