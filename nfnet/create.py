"""From a name to a model."""

from typing import Any

from nfnet import pretrained as files
from nfnet.model import ResNet
from nfnet.zoo import find_variant


def create_model(
    name: str, num_classes: int | None = None, pretrained: str | None = None, **overrides: Any
) -> ResNet:
    """Build a model by name, with freshly initialised or pre-trained weights.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits; None takes that of the pre-trained weights, or else the
            variant's own (1000, or 10 for digits). See also `ResNet.reset_classifier`.
        pretrained: where to take weights from: the path of a safetensors file, of a PyTorch file
            of tensors (such as timm's .pth) or of the authors' released Haiku pickle; or "hub",
            which fetches timm's copy from the Hugging Face hub (extra `hub`). No code in a file
            is executed.
        overrides: `depths`, `widths`, `stem` ("7x7_pool", "deep", "3x3_stride2" or, for small
            images, "3x3"), `stem_width`, `group_size`, `in_channels`, `drop_rate`,
            `stochdepth_rate` or `reference` ("authors" or "timm"; see `Variant`), in place of the
            variant's own.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: the name or an override is unknown, a value is out of its range, or the
            weights cannot be had or are those of another model.
        OSError: the weights' file cannot be read.
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    variant = find_variant(name, overrides)
    if pretrained is None:
        return ResNet(variant)
    path = files.find_file(pretrained, name)
    weights = files.read_weights(path)
    if num_classes is None:
        found = files.num_classes(weights)
        variant = find_variant(name, overrides | ({"num_classes": found} if found else {}))
    model = ResNet(variant)
    files.load_into(model, weights, f"the weights in {path}")
    return model
