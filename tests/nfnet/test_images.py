"""What is read of an image file, whatever is in it; the same in every place that reads one."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nfnet
from nflab.data.folder import ImageFolder
from nflab.learning.classifier import ImageClassifier, write_description

GREYS = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
COLOURS = np.stack([GREYS, GREYS.T, 255 - GREYS], axis=2)


def saved(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def rgb(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def palette() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(COLOURS).quantize(64)
    return saved(image), rgb(image)


def grey_palette() -> tuple[bytes, np.ndarray]:
    """Whose indices run against its greys."""
    image = Image.fromarray(255 - GREYS).convert("P")
    image.putpalette([255 - i // 3 for i in range(768)])
    return saved(image), np.repeat(GREYS[..., None], 3, 2)


def sixteen_bits() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(GREYS.astype(np.uint16) * 257)
    return saved(image), np.repeat(GREYS[..., None], 3, 2)


def sixteen_bits_of_pgm() -> tuple[bytes, np.ndarray]:
    header = b"P5 32 32 65535\n"
    return header + (GREYS.astype(">u2") * 257).tobytes(), np.repeat(GREYS[..., None], 3, 2)


def sixteen_bit_colours() -> tuple[bytes, np.ndarray]:
    """Pillow writes none: a PPM file by hand."""
    return b"P6 32 32 65535\n" + (COLOURS.astype(">u2") * 257).tobytes(), COLOURS


def transparent() -> tuple[bytes, np.ndarray]:
    alpha = np.dstack([COLOURS, GREYS])
    return saved(Image.fromarray(alpha, "RGBA")), COLOURS


def grey_and_alpha() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(np.dstack([GREYS, 255 - GREYS]), "LA")
    return saved(image), np.repeat(GREYS[..., None], 3, 2)


def turned() -> tuple[bytes, np.ndarray]:
    """Told to be shown upside down."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return saved(Image.fromarray(COLOURS), exif=exif), COLOURS


def cmyk() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(COLOURS).convert("CMYK")
    return saved(image, "TIFF"), rgb(image)


def animated() -> tuple[bytes, np.ndarray]:
    first = Image.new("P", (32, 32), 3)
    first.putpalette([0, 0, 0, 9, 9, 9, 200, 10, 10, 10, 220, 30])
    return (
        saved(first, "GIF", save_all=True, append_images=[Image.new("P", (32, 32), 1)]),
        np.broadcast_to(np.array([10, 220, 30], np.uint8), (32, 32, 3)).copy(),
    )


KINDS: list[Callable[[], tuple[bytes, np.ndarray]]] = [
    *(
        palette,
        grey_palette,
        sixteen_bits,
        sixteen_bits_of_pgm,
        sixteen_bit_colours,
        transparent,
        grey_and_alpha,
        turned,
        cmyk,
        animated,
    ),
]


def truncated() -> bytes:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), "JPEG")[:-800]


def unknown_white() -> bytes:
    return saved(Image.fromarray(GREYS.astype(np.float32)), "TIFF")


def bomb() -> bytes:
    """A few bytes that say they are 20,000 pixels each way."""
    data = bytearray(saved(Image.new("1", (8, 8)), "PPM"))
    return bytes(data.replace(b"8 8", b"20000 20000"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_place_reads_the_same_pixels(
    kind: Callable[[], tuple[bytes, np.ndarray]], tmp_path: Path
) -> None:
    data, expected = kind()
    assert np.array_equal(np.array(nfnet.read_image(io.BytesIO(data))), expected)
    # Training and evaluation, from a folder.
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(data)
            (tmp_path / split / name / "1.png").write_bytes(data)
    sizes = nfnet.Preprocessing(train_size=32, test_size=32, crop=1.0, squash=True)
    images, _ = ImageFolder(tmp_path, sizes).eval_images("test", torch.tensor([0]))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    # nfnet's transform.
    transform = nfnet.eval_transform("dm_nfnet_f0")
    with Image.open(io.BytesIO(data)) as image:
        assert torch.equal(transform(image), transform(Image.fromarray(expected)))
    # Serving.
    model = nfnet.create_model("dm_nf_resnet_digits", in_channels=3, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    write_description(
        tmp_path,
        "dm_nf_resnet_digits",
        {"in_channels": 3, "num_classes": 2},
        ("a", "b"),
        sizes,
        torch.zeros(3),
        torch.ones(3),
    )
    serving = ImageClassifier(tmp_path)
    of_file, of_pixels = serving.probabilities([data, saved(Image.fromarray(expected))])
    assert torch.equal(of_file, of_pixels)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (truncated, "^image file is truncated"),
        (unknown_white, "^its pixels are 32-bit numbers, of which it is not known what is white$"),
        (bomb, r"^Image size \(400000000 pixels\) exceeds limit of 178956970 pixels"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    broken: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        nfnet.read_image(io.BytesIO(broken()))


def test_greys_of_a_palette_are_its_greys() -> None:
    data, expected = grey_palette()
    grey = nfnet.read_image(io.BytesIO(data), channels=1)
    assert np.array_equal(np.array(grey), expected[..., 0])
