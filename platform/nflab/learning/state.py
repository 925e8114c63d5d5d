"""All that a training goes on from, as files of a checkpoint."""

import errno
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nfnet
from nflab.data import Dataset
from nflab.learning.classifier import write_description
from nflab.learning.computation import CONFIG, MADE_BY, require_same
from nflab.learning.models import model_settings
from nflab.settings.config import Config
from nflab.settings.locations import WEIGHTS
from nflab.settings.serialization import to_json


def save_state(
    folder: Path,
    config: Config,
    maker: dict[str, Any],
    dataset: Dataset,
    history: list[dict[str, Any]],
    model: nn.Module,
    optimizer: nfnet.SGD_AGC,
    ema: nfnet.EMA | None,
) -> None:
    """`state.pt` to resume from, `weights.pt` as evaluated, with `model.json` on how to use them,
    their configuration, and what they are of (`maker`)."""
    state = {
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
    }
    _write(state, folder / "state.pt")
    _write((model if ema is None else ema.model).state_dict(), folder / WEIGHTS)
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
    (folder / MADE_BY).write_text(json.dumps(maker, indent=2) + "\n", encoding="utf-8")


def _write(state: dict[str, Any], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what the disk said is lost: of a full one "unexpected pos"
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.EIO, "the disk does not take it", str(file)) from None


def load_state(
    folder: Path,
    maker: dict[str, Any],
    dataset: Dataset,
    model: nn.Module,
    optimizer: nfnet.SGD_AGC,
    ema: nfnet.EMA | None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Restores what `save_state` wrote, if that is of the same computation.

    Returns:
        the metrics of each epoch so far; and the remark of `require_same`.
    """
    try:
        device = next(model.parameters()).device
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    except Exception:  # torch advises to trust the file
        raise ValueError(
            "state.pt of the last checkpoint is damaged or holds more than tensors and numbers, of "
            "which nothing was executed: delete that checkpoint to go on from the one before it"
        ) from None
    history: list[dict[str, Any]] = state["history"]
    remark = require_same(folder, history[-1]["epoch"], maker, dataset)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
    return history, remark
