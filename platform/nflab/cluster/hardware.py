"""What a worker trains on: two GPUs of other kinds, or with other drivers, do not round alike."""

import re
from contextlib import suppress
from pathlib import Path

import torch

from nflab.cluster.preemption import metadata

DRIVER = Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver tells its version, in a container too."""


def gpu_of(device: torch.device) -> str | None:
    """The kind of GPU, its driver and the image of its machine, as far as they are told.

    Returns:
        such as "NVIDIA A10G, driver 580.95.05, image ami-0123"; None if it is no GPU.
    """
    if device.type != "cuda":
        return None
    return in_words(torch.cuda.get_device_name(device))


def in_words(name: str) -> str:
    """A GPU of this name, with what this machine tells of itself."""
    told = [name]
    with suppress(OSError):
        version = re.search(r"Kernel Module.*?\s(\d+(\.\d+)+)", DRIVER.read_text(encoding="utf-8"))
        told += [f"driver {version[1]}"] if version else []
    with suppress(OSError):
        image = metadata("ami-id")
        told += [f"image {image}"] if image else []
    return ", ".join(told)
