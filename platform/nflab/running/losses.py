"""How often a run may lose its processes."""

from contextlib import suppress

from nflab.storage.checkpoints import Checkpoints, Mark

LOST_PROCESSES = 3
"""How often in a row a run goes on after a process of it was lost, before it counts as failed."""


class Losses:
    """The losses of one run in a row, which each new checkpoint ends.

    Attributes:
        mark: of the last checkpoint at the last loss; None if there was none.
    """

    def __init__(self, folder: str) -> None:
        """`folder`: path or address of the run's checkpoints."""
        self._checkpoints = Checkpoints.of_run(folder)
        self._count = 0
        self.mark: Mark | None = None

    def bear_another(self) -> bool:
        """Counts a loss; returns whether the run goes on."""
        before = self.mark
        with suppress(OSError):  # a store that is away shows no new checkpoint
            self.mark = self._checkpoints.last_mark(patience=0)
        self._count = self._count + 1 if self.mark == before else 1
        return self._count <= LOST_PROCESSES
