"""All that a training goes on from, as files of a checkpoint."""

import errno
import json
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nfnet
from nflab.data import Dataset
from nflab.learning.classifier import write_description
from nflab.learning.computation import CONFIG, MADE_BY, require_same
from nflab.learning.models import model_settings
from nflab.settings.config import Config
from nflab.settings.locations import WEIGHTS
from nflab.settings.serialization import to_json
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.files import patiently


@dataclass(frozen=True)
class Training:
    """A training as it is saved."""

    config: Config
    maker: dict[str, Any]
    """See `computation.made_by`."""
    dataset: Dataset
    model: nn.Module
    optimizer: nfnet.SGD_AGC
    ema: nfnet.EMA | None

    def state(
        self, history: list[dict[str, Any]], midst: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What `load_state` goes on from; it changes with the training.

        Args:
            history: metrics of each epoch so far.
            midst: of a training within an epoch, `step`, how many of its steps are done, and
                `sums` (see `EpochSums`).
        """
        return {
            "history": history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "midst": midst,
        }


def copied(value: Any) -> Any:
    """A state whose tensors are copies, in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value)(copied(one) for one in value)
    return value


def save_state(
    folder: Path, training: Training, state: dict[str, Any], weights: dict[str, Any]
) -> None:
    """`state.pt` to resume from, `weights.pt` as evaluated, with `model.json` on how to use them,
    their configuration, and what they are of."""
    config, dataset = training.config, training.dataset
    _write(state, folder / "state.pt")
    _write(weights, folder / WEIGHTS)
    write_description(
        folder,
        config.model.model,
        model_settings(config.model.model, dataset),
        dataset.class_names,
        dataset.preprocessing,
        dataset.mean,
        dataset.std,
    )
    (folder / CONFIG).write_text(to_json(config), encoding="utf-8")
    (folder / MADE_BY).write_text(json.dumps(training.maker, indent=2) + "\n", encoding="utf-8")


def _write(state: dict[str, Any], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what the disk said is lost: of a full one "unexpected pos"
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.EIO, "the disk does not take it", str(file)) from None


def load_state(
    folder: Path, training: Training
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, str | None]:
    """Restores what `save_state` wrote, if that is of the same computation.

    Returns:
        the metrics of each epoch so far; the `midst` of `Training.state`; and the remark of
        `require_same`.
    """
    try:
        device = next(training.model.parameters()).device
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    except Exception:  # torch advises to trust the file
        raise ValueError(
            "state.pt of the last checkpoint is damaged or holds more than tensors and numbers, of "
            "which nothing was executed: delete that checkpoint to go on from the one before it"
        ) from None
    history: list[dict[str, Any]] = state["history"]
    epoch = history[-1]["epoch"] if history else 0
    remark = require_same(folder, epoch, training.maker, training.dataset)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    if training.ema is not None:
        training.ema.load_state_dict(state["ema"])
    return history, state.get("midst"), remark


class Saver:
    """Writes checkpoints of a training, on one worker for all."""

    def __init__(self, training: Training, checkpoints: Checkpoints) -> None:
        self._training, self._checkpoints = training, checkpoints
        self._writing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)
        self.last = time.monotonic()
        """When the last one was made."""
        self.waited = 0.0
        """Seconds for which training stood still."""

    def save(self, history: list[dict[str, Any]], best: int) -> None:
        """After an epoch; returns when it is written."""
        begun = time.monotonic()
        self.finish()
        training = self._training
        evaluated = training.model if training.ema is None else training.ema.model
        self._write(training.state(history), evaluated.state_dict(), best)
        self._note(begun)

    def save_midst(
        self, history: list[dict[str, Any]], best: int | None, midst: dict[str, Any]
    ) -> None:
        """Within an epoch, from copies: it is written while training goes on."""
        begun = time.monotonic()
        self.finish()
        training = self._training
        evaluated = training.model if training.ema is None else training.ema.model
        state = copied(training.state(list(history), midst))
        weights = copied(evaluated.state_dict())
        self._writing = self._pool.submit(self._write, state, weights, best)
        self._note(begun)

    def finish(self) -> None:
        """Waits until all is written.

        Raises:
            OSError: it cannot be.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, state: dict[str, Any], weights: dict[str, Any], best: int | None) -> None:
        history, midst = state["history"], state["midst"]
        epoch = history[-1]["epoch"] if history else 0
        with patiently(tempfile.gettempdir(), tempfile.TemporaryDirectory) as temporary:
            folder = Path(temporary)
            patiently(temporary, partial(save_state, folder, self._training, state, weights))
            self._checkpoints.save(folder, epoch, best, 0 if midst is None else midst["step"])

    def _note(self, begun: float) -> None:
        self.last = time.monotonic()
        self.waited += self.last - begun
