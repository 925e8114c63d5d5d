"""What the models of the family are made of, and the table of those with a name."""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from nfnet.layers import ACTIVATIONS

STEMS = ("7x7_pool", "3x3")


@dataclass(frozen=True)
class Variant:
    """A pre-activation bottleneck network, normalizer-free or batch-normalised.

    Args:
        depths: blocks in each stage.
        widths: output channels of each stage; the first stage keeps the stem's resolution,
            every other one halves it.
        stem: "7x7_pool" (stride 2, then a 3x3 max pool of stride 2) or "3x3" (stride 1, for
            small images).
        stem_width: output channels of the stem.
        batch_norm: batch norm before every activation, in place of scaled weight
            standardization, gammas, alpha and beta.
        bottleneck_ratio: channels inside a block over its output channels.
        alpha: scale of the residual branch (normalizer-free only).
        activation: "relu", "gelu" or "silu".
        in_channels: channels of the images.
        num_classes: number of logits.
        drop_rate: dropout of the pooled features.
        stochdepth_rate: stochastic depth; block b of B is dropped with probability
            stochdepth_rate * b / B.

    Raises:
        ValueError: a value is out of its range.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem: str = "7x7_pool"
    stem_width: int = 64
    batch_norm: bool = False
    bottleneck_ratio: float = 0.25
    alpha: float = 0.2
    activation: str = "relu"
    in_channels: int = 3
    num_classes: int = 1000
    drop_rate: float = 0.0
    stochdepth_rate: float = 0.0

    def __post_init__(self) -> None:
        # Lists arrive from configuration files.
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"depths {self.depths} and widths {self.widths} differ in length, expected one of "
                "each per stage; give both."
            )
        for name in ("stem_width", "in_channels", "num_classes"):
            _check_count(name, getattr(self, name))
        for depth in self.depths:
            _check_count("a depth", depth)
        for width in self.widths:
            _check_count("a width", width)
            if not (width * self.bottleneck_ratio).is_integer():
                raise ValueError(
                    f"width {width} times the bottleneck ratio {self.bottleneck_ratio} is not "
                    "whole; choose another width."
                )
        for name in ("drop_rate", "stochdepth_rate"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}, expected a number in [0, 1); 0 turns it off.")
        _check_choice("stem", self.stem, STEMS)
        _check_choice("activation", self.activation, tuple(ACTIVATIONS))


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of 1 or more; give one.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} is {value!r}, expected one of {', '.join(choices)}; choose one of them."
        )


def _with_twin(size: str, variant: Variant) -> dict[str, Variant]:
    """A normalizer-free ResNet and its batch-normalised twin."""
    return {
        f"dm_nf_resnet{size}": variant,
        f"preact_resnet{size}": replace(variant, batch_norm=True),
    }


_DIGITS = Variant(
    depths=(1, 1, 1),
    widths=(32, 64, 128),
    stem="3x3",
    stem_width=16,
    in_channels=1,
    num_classes=10,
)

VARIANTS: dict[str, Variant] = {
    **_with_twin("50", Variant(depths=(3, 4, 6, 3))),
    **_with_twin("101", Variant(depths=(3, 4, 23, 3))),
    **_with_twin("152", Variant(depths=(3, 8, 36, 3))),
    **_with_twin("200", Variant(depths=(3, 24, 36, 3))),
    **_with_twin("_digits", _DIGITS),
}

# The rest is what makes a variant the network its name promises.
_OVERRIDES = (
    "widths",
    "depths",
    "stem",
    "stem_width",
    "in_channels",
    "num_classes",
    "drop_rate",
    "stochdepth_rate",
)
assert set(_OVERRIDES) <= {field.name for field in fields(Variant)}


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(VARIANTS)


def find_variant(name: str, overrides: dict[str, Any]) -> Variant:
    """The variant of this name with some of its fields replaced.

    Raises:
        ValueError: the name or an override is unknown, or a value is out of its range.
    """
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS) or list_models()
        raise ValueError(f"there is no model {name!r}; did you mean {' or '.join(close)}?")
    for override in overrides:
        if override not in _OVERRIDES:
            close = difflib.get_close_matches(override, _OVERRIDES) or list(_OVERRIDES)
            raise ValueError(
                f"{name} has no setting {override!r}; did you mean {' or '.join(close)}?"
            )
    return replace(VARIANTS[name], **overrides)
