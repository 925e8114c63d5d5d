"""A checkpoint before Ray Train changes the number of workers: it ends all of them for that."""

import time
from contextlib import suppress

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, TrainControllerState

from nflab.storage.checkpoints import Checkpoints

WAIT_SECONDS = 120.0
"""For a checkpoint; workers are asked for it after a step, and at most every few seconds."""


class SavesFirst(ControllerCallback):
    """Lets the workers of a run make a checkpoint before their number changes."""

    def __init__(self, folder: str) -> None:
        """`folder`: path or address of the run's checkpoints."""
        self._folder = folder

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Asks for one, and waits for it, when workers that train are about to be replaced."""
        if not isinstance(current_state, ResizingState):
            return
        checkpoints = Checkpoints.of_run(self._folder)
        end = time.monotonic() + WAIT_SECONDS
        # A store that is away keeps nobody from going on, with less.
        with suppress(OSError):
            before = checkpoints.last_mark(patience=0)
            try:
                _internal_kv_put(_key(self._folder), b"")
                while time.monotonic() < end and checkpoints.last_mark(patience=0) == before:
                    time.sleep(0.2)
            finally:
                _internal_kv_del(_key(self._folder))


def resized(folder: str) -> str | None:
    """Why the processes of a run are about to be ended, if its number of workers changes."""
    try:
        asked = _internal_kv_exists(_key(folder))
    except Exception:  # Ray's own kinds: who does not answer asks for nothing
        return None
    return "the number of workers changes" if asked else None


def _key(folder: str) -> str:
    return f"nflab-resizes:{folder}"
