"""The models that have a name."""

import difflib
import fnmatch
from dataclasses import fields, replace
from typing import Any

from nfnet.variants import Variant

_PAPERS_WIDTHS, _PLUS_WIDTHS = (256, 512, 1536, 1536), (384, 768, 2048, 2048)

# arXiv 2102.06171, table 1: F0's depths; Fn has n + 1 times as many blocks.
_F = Variant(
    depths=(1, 2, 6, 3),
    widths=_PAPERS_WIDTHS,
    stem="deep",
    stem_width=None,
    bottleneck_ratio=0.5,
    group_size=128,
    second_conv=True,
    attention="se",
    pooled_shortcut=True,
    final_ratio=2.0,
    activation="gelu",
)

# What timm's own models have in common.
_TIMM: dict[str, Any] = {
    "skip_gain": False,
    "same_padding": False,
    "gamma_in_kernels": True,
    "pooled_shortcut": True,
    "reference": "timm",
}

_TIMM_F = replace(_F, **_TIMM)
_TIMM_LIGHT = replace(_TIMM_F, bottleneck_ratio=0.25, group_size=64, activation="silu")
_TIMM_RESNET = Variant(depths=(3, 4, 6, 3), se_ratio=1 / 16, **_TIMM)
_TIMM_REGNET = Variant(
    depths=(1, 3, 6, 6),
    widths=(40, 80, 160, 328),
    stem="3x3_stride2",
    stem_width=40,
    bottleneck_ratio=2.25,
    inverted=True,
    group_size=8,
    attention="se",
    final_ratio=960 / 328,
    activation="silu",
    **_TIMM,
)


def _scaled(base: Variant, times: int) -> Variant:
    """The variant with that many times as many blocks."""
    return replace(base, depths=tuple(times * depth for depth in base.depths))


def _with_twin(size: str, variant: Variant) -> dict[str, Variant]:
    """A normalizer-free ResNet and its batch-normalised twin.

    The twin has the authors' baseline's layers. Three things are choices, so that the two networks
    differ in nothing but the norm and a result does not depend on how a batch is cut: kernels start
    as He's (the authors': a truncated normal of variance 1 / fan-in), the classifier as the other
    network's (theirs: 0), and training normalises with the statistics of the global batch (theirs:
    of each device's part). Running statistics are PyTorch's, as is usual: momentum 0.1 as theirs,
    but an unbiased variance, and no correction of the first steps.
    """
    return {
        f"dm_nf_resnet{size}": variant,
        f"preact_resnet{size}": replace(variant, batch_norm=True),
    }


def _regnet(
    depths: tuple[int, ...], widths: tuple[int, ...], stem_width: int, final_width: int
) -> Variant:
    final_ratio = final_width / widths[-1]
    return replace(
        _TIMM_REGNET, depths=depths, widths=widths, stem_width=stem_width, final_ratio=final_ratio
    )


_DIGITS = Variant(
    depths=(1, 1, 1),
    widths=(32, 64, 128),
    stem="3x3",
    stem_width=16,
    in_channels=1,
    num_classes=10,
)

# For 28 to 32 pixels; half of a block's channels inside it, since a quarter of 32 are few.
_SMALL = Variant(
    depths=(1, 2, 2),
    widths=(32, 64, 128),
    stem="3x3_stride2",
    stem_width=16,
    bottleneck_ratio=0.5,
    in_channels=1,
    num_classes=10,
)

HUB_TAGS = {
    **{f"dm_nfnet_f{n}": "dm_in1k" for n in range(7)},
    "nfnet_l0": "ra2_in1k",
    "eca_nfnet_l0": "ra2_in1k",
    "eca_nfnet_l1": "ra2_in1k",
    "eca_nfnet_l2": "ra3_in1k",
    "nf_regnet_b1": "ra2_in1k",
    "nf_resnet50": "ra2_in1k",
}
"""Model -> the part of its repository's name on the hub that says how the weights were made."""

VARIANTS: dict[str, Variant] = {
    # The authors' models, and the batch-normalised ResNets they compare with.
    **{f"dm_nfnet_f{n}": _scaled(_F, n + 1) for n in range(8)},
    # The released code rounds the + variants' channels inside stage 1 down to whole groups (384 / 2
    # = 192 -> 128). Rounded up, to 256, F4+ has the published 527 M parameters (526.9, not 525.0).
    **{f"dm_nfnet_f{n}+": _scaled(replace(_F, widths=_PLUS_WIDTHS), n + 1) for n in range(8)},
    **_with_twin("50", Variant(depths=(3, 4, 6, 3))),
    **_with_twin("101", Variant(depths=(3, 4, 23, 3))),
    **_with_twin("152", Variant(depths=(3, 8, 36, 3))),
    **_with_twin("200", Variant(depths=(3, 24, 36, 3))),
    **_with_twin("_digits", _DIGITS),
    **_with_twin("_small", _SMALL),
    # timm's own.
    **{f"nfnet_f{n}": _scaled(_TIMM_F, n + 1) for n in range(8)},
    "nfnet_l0": replace(_TIMM_LIGHT, se_ratio=0.25, final_ratio=1.5),
    "eca_nfnet_l0": replace(_TIMM_LIGHT, attention="eca", final_ratio=1.5),
    **{
        f"eca_nfnet_l{n}": _scaled(replace(_TIMM_LIGHT, attention="eca"), n + 1)
        for n in range(1, 4)
    },
    **{
        f"nf_{prefix}resnet{size}": replace(_TIMM_RESNET, depths=depths, attention=attention)
        for prefix, attention in (("", "none"), ("se", "se"), ("eca", "eca"))
        for size, depths in ((26, (2, 2, 2, 2)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)))
    },
    "nf_regnet_b0": _TIMM_REGNET,
    "nf_regnet_b1": replace(_TIMM_REGNET, depths=(2, 4, 7, 7)),
    "nf_regnet_b2": _regnet((2, 4, 8, 8), (40, 88, 176, 368), 40, 1064),
    "nf_regnet_b3": _regnet((2, 5, 9, 9), (40, 96, 184, 400), 40, 1152),
    "nf_regnet_b4": _regnet((2, 6, 11, 11), (48, 112, 216, 464), 48, 1344),
    "nf_regnet_b5": _regnet((3, 7, 14, 14), (64, 128, 256, 528), 64, 1536),
}
"""Every model by its name."""

# The rest is what makes a variant the network its name promises.
_OVERRIDES = (
    "widths",
    "depths",
    "stem",
    "stem_width",
    "group_size",
    "in_channels",
    "num_classes",
    "drop_rate",
    "stochdepth_rate",
    "reference",
)
assert set(_OVERRIDES) <= {field.name for field in fields(Variant)}


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """The names that `create_model` knows, sorted.

    Args:
        pattern: as of file names, such as "nf_*".
        pretrained: only those of which the hub has weights.
    """
    names = HUB_TAGS if pretrained else VARIANTS
    return sorted(fnmatch.filter(names, pattern))


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
    variant = VARIANTS[name]
    if variant.reference == "timm" and overrides.get("reference") == "authors":
        raise ValueError(
            f"{name} is timm's own model, of which the authors have no form; "
            "leave reference out, or choose a model whose name begins with dm_."
        )
    return replace(variant, **overrides)
