"""Pre-trained weights from a file, a checkpoint's folder, or the Hugging Face hub."""

import argparse
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nfnet.haiku import load_haiku, unpickle_arrays
from nfnet.model import ResNet
from nfnet.variants import Variant
from nfnet.weights import load_weights
from nfnet.zoo import HUB_TAGS

_HUB_FILE = "model.safetensors"

_FILES = ("weights.pt", "model.safetensors", "pytorch_model.bin", "state.pt")
"""Files of a folder that hold a network's weights, the first that is there."""

# How `torch.save` began its files before it wrote zip archives.
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_STATES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
    *("state_dict", "model_state_dict", "model", "module"),
)
"""Where trainings put a network's state in what they save: averaged weights come first."""

_WRAPPERS = ("module.", "model.", "_orig_mod.")
"""Prefixes of names in a network that was saved inside of DDP, of another, or compiled."""

_OF_HAIKU = {"linear": "head.fc", "stem_conv0": "stem.conv1", "initial_conv": "stem.conv"}
"""Our names of some of the authors' modules."""

Weights = dict[str, Tensor] | dict[str, dict[str, np.ndarray]]
"""Tensors by our names, or the authors' arrays by Haiku's module and parameter."""


def find_file(pretrained: str, name: str) -> Path:
    """Where the weights are: a file on this machine, fetched if need be.

    Args:
        pretrained: path of a file, or of the folder of a checkpoint or of a model that was fetched
            from MLflow; or "hub".
        name: the model's name.

    Raises:
        ValueError: there is no such file, or nothing for this model on the hub, or no way to it;
            or what came is not what the hub says it sent.
    """
    if pretrained == "hub":
        return _from_hub(name)
    path = Path(pretrained)
    if path.is_dir():
        return find_in_folder(path)
    if not path.is_file():
        fetched = "; fetch it with `mlflow artifacts download`, and pass its folder"
        raise ValueError(
            f'there is no file {pretrained!r}; pass the path of pre-trained weights, or "hub"'
            f"{fetched if pretrained.startswith('models:/') else ''}."
        )
    return path


def find_in_folder(folder: Path) -> Path:
    """The file of weights in the folder of a checkpoint, or of a model fetched from MLflow.

    Raises:
        ValueError: there is none.
    """
    for inside in (folder, folder / "artifacts"):
        for file in _FILES:
            if (inside / file).is_file():
                return inside / file
    raise ValueError(f"the folder {folder} holds no weights: expected {' or '.join(_FILES)}.")


def _from_hub(name: str) -> Path:
    if name not in HUB_TAGS:
        raise ValueError(
            f"the hub has no weights of {name}, only of {', '.join(HUB_TAGS)}; "
            "pass the path of a file."
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            "weights from the hub need the package huggingface_hub; "
            "install it with `pip install 'nflab[hub]'`, or pass the path of a file."
        ) from None
    repository = f"timm/{name}.{HUB_TAGS[name]}"
    try:
        path = Path(hf_hub_download(repository, _HUB_FILE))
    except Exception as error:  # every layer below has exceptions of its own
        raise ValueError(
            f"cannot fetch {repository} from the hub ({type(error).__name__}); "
            "check the network, or pass the path of a file."
        ) from error
    # The hub names a large file by its SHA-256; its client does not compare.
    stored = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", stored.name):
        with stored.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != stored.name:
                raise ValueError(
                    f"{stored} is not what the hub says that {repository} is; delete that file, "
                    "and fetch it again."
                )
    return path


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, a PyTorch file of tensors, or the authors' pickle of arrays.

    What a file is shows in its first bytes. No code in it is executed. Of what a training saved
    the averaged weights are taken if there are any; prefixes of wrappers are taken off.

    Raises:
        ValueError: the file is none of these, is damaged, or holds no weights.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
    try:
        if start[:4] == b"PK\x03\x04" or start == _LEGACY_TORCH:
            return _unwrapped(_read_torch(path))
        if start[:1] == b"\x80":
            return unpickle_arrays(path.read_bytes())
        if start[8:9] == b"{":
            return _unwrapped(safetensors.torch.load_file(path))
        raise ValueError("it is no safetensors or PyTorch file and no pickle of arrays")
    except (ValueError, safetensors.SafetensorError) as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{path} holds no usable weights: {reason}.") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # timm's training saves its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # unpickling can fail in any way
        raise ValueError(
            "PyTorch's safe reader refuses it, since it is damaged or holds more than tensors; "
            "nothing of it was executed"
        ) from None
    found = _network(state)
    if found is not None:
        return found
    held = f"; it holds {', '.join(map(str, list(state)[:8]))}" if isinstance(state, dict) else ""
    raise ValueError(f"it holds no tensors by name, as a model's state_dict does{held}")


def _network(state: Any) -> dict[str, Tensor] | None:
    """The first tensors by name in what a training saved; None if there are none."""
    if not isinstance(state, dict) or not state:
        return None
    if all(isinstance(value, Tensor) for value in state.values()):
        return state
    inside = (_network(state.get(key)) for key in _STATES)
    return next((found for found in inside if found is not None), None)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that all names have from wrappers, in whatever order."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    while wrapper := next((w for w in _WRAPPERS if all(k.startswith(w) for k in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
        if not state:
            break
    return state


def own_settings(variant: Variant, weights: Weights) -> dict[str, Any]:
    """What the weights were saved with, as overrides of a variant: `num_classes` (0 without a
    classifier), `in_channels` and `stem`; the latter two if the weights have a stem that is known.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in weights.items():
        if isinstance(value, Tensor):
            shapes[name] = tuple(value.shape)
        elif "squeeze_excite" not in name:
            module = _OF_HAIKU.get(name.rpartition("/")[2], "")
            shapes[f"{module}.weight"] = np.shape(value.get("w", 0))[::-1]  # as ours, but kw, kh
    classifier = shapes.get("head.fc.weight", ())
    found: dict[str, Any] = {"num_classes": classifier[0] if len(classifier) == 2 else 0}
    for name, is_deep in (("stem.conv1.weight", True), ("stem.conv.weight", False)):
        if len(first := shapes.get(name, ())) == 4:
            # A kernel does not tell its stride; between equal widths the first shortcut does.
            small = variant.stem if variant.stem.startswith("3x3") else "3x3"
            if variant.stem_channels[-1] == variant.widths[0]:
                strided = "stages.0.0.downsample.conv.weight" in shapes
                small = "3x3_stride2" if strided else "3x3"
            stem = "deep" if is_deep else {7: "7x7_pool", 3: small}.get(first[-1], variant.stem)
            return found | {"in_channels": first[1], "stem": stem}
    return found


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
