"""A look at the images of a dataset."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from nflab.analysis.figures.style import save_figure

COLUMNS = 8
"""Images in a row."""


def draw_contact_sheet(images: Sequence[tuple[str, Image.Image]], title: str, path: Path) -> None:
    """Images in rows of COLUMNS, each as it is stored, below its class.

    Args:
        images: (class name, image) of each.
    """
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(12, 0.6 + 1.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for place in axes:
        place.axis("off")
    for place, (name, image) in zip(axes, images, strict=False):
        place.imshow(image, cmap="gray" if image.mode == "L" else None)
        place.set_title(f"{name[:18]}\n{image.width}x{image.height}", fontsize=7)
    figure.suptitle(title)
    save_figure(figure, path)
