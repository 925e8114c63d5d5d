"""Pre-trained weights from a file or from the Hugging Face hub."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nfnet.haiku import load_haiku, unpickle_arrays
from nfnet.model import ResNet
from nfnet.weights import load_weights

# The part of a hub repository's name that says how the weights were made.
_HUB_TAGS = {
    **{f"dm_nfnet_f{n}": "dm_in1k" for n in range(7)},
    "nfnet_l0": "ra2_in1k",
    "eca_nfnet_l0": "ra2_in1k",
    "eca_nfnet_l1": "ra2_in1k",
    "eca_nfnet_l2": "ra3_in1k",
    "nf_regnet_b1": "ra2_in1k",
    "nf_resnet50": "ra2_in1k",
}

# How `torch.save` began its files before it wrote zip archives.
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

Weights = dict[str, Tensor] | dict[str, dict[str, np.ndarray]]
"""Tensors by our names, or the authors' arrays by Haiku's module and parameter."""


def find_file(pretrained: str, name: str) -> Path:
    """Where the weights are: the path given, or the hub's file for a model, fetched if need be.

    Args:
        pretrained: path of a file, or "hub".
        name: the model's name.

    Raises:
        ValueError: there is no such file, or nothing for this model on the hub, or no way to it.
    """
    if pretrained != "hub":
        path = Path(pretrained)
        if not path.is_file():
            raise ValueError(
                f'there is no file {pretrained!r}; pass the path of pre-trained weights, or "hub".'
            )
        return path
    if name not in _HUB_TAGS:
        raise ValueError(
            f"the hub has no weights of {name}, only of {', '.join(_HUB_TAGS)}; "
            "pass the path of a file."
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            "weights from the hub need the package huggingface_hub; "
            "install it with `pip install 'nflab[hub]'`, or pass the path of a file."
        ) from None
    repository = f"timm/{name}.{_HUB_TAGS[name]}"
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # every layer below has exceptions of its own
        raise ValueError(
            f"cannot fetch {repository} from the hub ({type(error).__name__}); "
            "check the network, or pass the path of a file."
        ) from error


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, a PyTorch file of tensors, or the authors' pickle of arrays.

    What a file is shows in its first bytes. No code in it is executed.

    Raises:
        ValueError: the file is none of these, is damaged, or holds more than weights.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
    try:
        if start[:4] == b"PK\x03\x04" or start == _LEGACY_TORCH:
            return _read_torch(path)
        if start[:1] == b"\x80":
            return unpickle_arrays(path.read_bytes())
        if start[8:9] == b"{":
            return safetensors.torch.load_file(path)
        raise ValueError("it is no safetensors or PyTorch file and no pickle of arrays")
    except (ValueError, safetensors.SafetensorError) as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{path} holds no usable weights: {reason}.") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # unpickling can fail in any way
        raise ValueError(
            "PyTorch's safe reader refuses it, since it is damaged or holds more than tensors; "
            "nothing of it was executed"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("it holds no tensors by name, as a model's state_dict does")
    # A model wrapped for training on several devices was saved with its wrapper's prefix.
    return {name.removeprefix("module."): value for name, value in state.items()}


def num_classes(weights: Weights) -> int | None:
    """Number of classes that the weights classify into; None if they have no classifier."""
    for name, value in weights.items():
        if isinstance(value, Tensor):
            if name == "head.fc.weight" and value.ndim == 2:
                return value.shape[0]
        elif name.endswith("/linear") and "squeeze_excite" not in name and "b" in value:
            return int(value["b"].size)
    return None


def load_into(model: ResNet, weights: Weights, source: str) -> None:
    """Copy what `read_weights` read into a model.

    Raises:
        ValueError: the weights are those of another model.
    """
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    arrays = {name: value for name, value in weights.items() if isinstance(value, dict)}
    if arrays:
        load_haiku(model, arrays)
    else:
        load_weights(model, tensors, source)
