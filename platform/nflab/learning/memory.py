"""What to do when a device's memory is full: compute fewer images at once."""

from torch import OutOfMemoryError

_TOLD = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Words of errors that say the same and have no type of their own."""


class OutOfMemory(Exception):
    """Memory has run out within a training, which may go on with fewer images at once.

    Attributes:
        micro_batch_size: as it may go on.
    """

    def __init__(self, micro_batch_size: int) -> None:
        super().__init__(micro_batch_size)
        self.micro_batch_size = micro_batch_size

    def __str__(self) -> str:
        return f"memory ran out: from now on {self.micro_batch_size} images are computed at once"


def is_full(error: RuntimeError) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, OutOfMemoryError) or any(word in str(error) for word in _TOLD)
