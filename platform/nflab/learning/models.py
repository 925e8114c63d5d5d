"""The network of a configuration, as its dataset needs it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import nfnet
from nflab.data import Dataset, load_dataset
from nflab.learning.classifier import DESCRIPTION
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError, require
from nflab.storage.files import local_copy, read_text
from nfnet.model import ResNet

SMALL_IMAGE = 64
"""Pixels up to which images are small: models for larger ones get the stem for these."""


def build_model(config: Config, dataset: Dataset, new_head: bool) -> ResNet:
    """The model for a dataset's images and classes, with its pre-trained weights if it has any.

    Args:
        new_head: put a new classifier on pre-trained features, since the classes are others. Else
            the logits get the order of the dataset's classes, where a `model.json` beside the
            weights says which classes theirs are.

    Raises:
        ValueError: the pre-trained weights cannot be had, or are those of another model, or of
            other classes.
    """
    settings = model_settings(config.model.model, dataset)
    given = config.model.pretrained
    evaluates = given is not None and not new_head
    torch.manual_seed(config.run.seed)
    with nullcontext() if given is None else local_copy(given) as weights:
        model = nfnet.create_model(
            config.model.model,
            pretrained=weights,
            drop_rate=config.model.drop_rate,
            stochdepth_rate=config.model.stochdepth_rate,
            **(settings if given is None or evaluates else settings | {"num_classes": None}),
        )
    if given is not None and evaluates:
        _fit(model, given, dataset.class_names)
    elif given is not None:
        torch.manual_seed(config.run.seed)
        model.reset_classifier(settings["num_classes"])
    for name, p in model.named_parameters():
        p.requires_grad_(nfnet.layer_group(name) not in config.model.frozen)
    return model


def _fit(model: ResNet, weights: str, wanted: Sequence[str]) -> None:
    """Sorts the logits of trained weights as a dataset's classes, by name; refuses weights that
    are not as they were trained."""
    names = _class_names(weights)
    known = set(wanted if names is None else names)
    told = [
        f"{what} {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
        for what, found in (
            ("not of", [name for name in wanted if name not in known]),
            ("but of", [name for name in names or () if name not in wanted]),
        )
        if found
    ]
    if told:
        raise ValueError(
            f"{weights} are weights {' '.join(told)}: give a dataset of the same classes, or "
            "fine-tune them with finetune.py"
        )
    if model.adapted:
        raise ValueError(
            f"{weights} cannot be evaluated as they are, for the dataset needs "
            f"{' and '.join(model.adapted)}: fine-tune them with finetune.py"
        )
    if names is not None:
        order = torch.tensor([names.index(name) for name in wanted])
        with torch.no_grad():
            for p in model.head.fc.parameters():
                p.copy_(p[order.to(p.device)])


def _class_names(weights: str) -> list[str] | None:
    """Names of the classes of trained weights, if a `model.json` stands beside them."""
    described = None if weights == "hub" else read_text(_beside(weights, DESCRIPTION))
    if described is None:
        return None
    try:
        return [str(name) for name in json.loads(described)["class_names"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"the {DESCRIPTION} beside {weights} is damaged") from None


def _beside(file: str, name: str) -> str:
    """Path or address of a file in the same folder."""
    folder, slash, _ = file.rpartition("/")
    return f"{folder}{slash}{name}"


def model_settings(model: str, dataset: Dataset) -> dict[str, Any]:
    """What `nfnet.create_model` is told of a dataset's images and classes."""
    shrinks = max(dataset.image_shape[1:]) <= SMALL_IMAGE < nfnet.preprocessing(model).train_size
    return {
        "num_classes": len(dataset.class_names),
        "in_channels": dataset.image_shape[0],
        # A stem for large images would leave nothing of a small one.
        **({"stem": "3x3"} if shrinks else {}),
    }


def check_model(config: Config, new_head: bool) -> None:
    """Refuses a network that cannot be built, without building it; see `build_model`.

    Raises:
        ConfigError: likewise.
    """
    dataset = load_dataset(config)
    try:
        with torch.device("meta"), _NothingDrawn():
            model = build_model(config, dataset, new_head)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    parts = list(dict.fromkeys(nfnet.layer_group(name) for name, _ in model.named_parameters()))
    for part in config.model.frozen:
        require(
            part in parts[:-1],
            f"{part!r} cannot be frozen: choose from {', '.join(parts[:-1])}",
        )
    for part in config.optimizer.unclipped:
        require(part in parts, f"{part!r} cannot be unclipped: choose from {', '.join(parts)}")


class _NothingDrawn(TorchFunctionMode):
    """Weights without memory are not initialised: torch would import its compiler for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **kwargs)


def set_training(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Training mode for all that is trained: batch norm of frozen groups keeps its statistics."""
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and nfnet.layer_group(name) in frozen:
            module.eval()


@contextmanager
def statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """While in use, batch norm's running statistics follow no batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
