"""What the networks of the family are made of."""

from dataclasses import dataclass

from nfnet.layers import ACTIVATIONS

STEMS: dict[str, tuple[int, ...]] = {
    "7x7_pool": (2, 2),
    "deep": (2, 1, 1, 2),
    "3x3_stride2": (2,),
    "3x3": (1,),
}
"""Strides of a stem's convolutions and, at the end, of its pooling."""
ATTENTIONS = ("none", "se", "eca")
"""Kinds of channel attention; see `Variant.attention`."""
REFERENCES = ("authors", "timm")
"""Whose arithmetic a network may follow; see `Variant.reference`."""


@dataclass(frozen=True)
class Variant:
    """A pre-activation residual network with bottlenecks, normalizer-free or batch-normalised.

    Args:
        depths: blocks in each stage.
        widths: output channels of each stage.
        stem: "7x7_pool" (stride 2, then a 3x3 max pool of stride 2), "deep" (four 3x3
            convolutions, the first and the last of stride 2), "3x3_stride2", or "3x3"
            (stride 1, for small images). Every stage halves the resolution, but the first only
            after "3x3_stride2".
        stem_width: output channels of the stem; None is half the first stage's.
        batch_norm: batch norm before every activation, in place of scaled weight
            standardization, gammas, alpha and beta.
        bottleneck_ratio: channels inside a block over its output channels.
        inverted: over its input channels instead, the first block's ratio 1, and the attention
            stands inside the block, as in EfficientNets.
        group_size: input channels that each output of a block's 3x3 convolutions sees; None is
            all of them. Channels inside a block are rounded to a multiple of it.
        second_conv: a second 3x3 convolution in each block.
        attention: channel attention of each block: "none", "se" (squeeze-excite) or "eca".
        se_ratio: hidden channels of squeeze-excite over its input's.
        pooled_shortcut: a shortcut that halves the resolution averages 2x2 pixels before its 1x1
            convolution; else that convolution has stride 2.
        final_ratio: output channels of the 1x1 convolution after the last stage over the last
            width; 0 for no such convolution.
        skip_gain: a learnable scalar, 0 at first, ends each residual branch; else the gain of
            its last convolution is 0 at first.
        same_padding: pad as TensorFlow's `SAME`; else by half the kernel on all sides.
        gamma_in_kernels: every kernel, the stem's first too, is multiplied by gamma and the final
            activation is not; else every activation is.
        reference: whose arithmetic: "authors" (standardised kernels have a lower bound, GELU
            is its tanh form) or "timm" (1e-5 is added to a kernel's variance, GELU is exact).
        alpha: scale of the residual branch (normalizer-free only).
        activation: "relu", "gelu" or "silu".
        in_channels: channels of the images.
        num_classes: number of logits; 0 for none, and features in their place.
        drop_rate: dropout of the pooled features.
        stochdepth_rate: stochastic depth; block b of B is dropped with probability
            stochdepth_rate * b / B.

    Raises:
        ValueError: a value is out of its range.

    Source: arXiv 2102.06171, section 3 and appendix E; arXiv 2101.08692; timm's `nfnet.py` for
    the models that are timm's own.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem: str = "7x7_pool"
    stem_width: int | None = 64
    batch_norm: bool = False
    bottleneck_ratio: float = 0.25
    inverted: bool = False
    group_size: int | None = None
    second_conv: bool = False
    attention: str = "none"
    se_ratio: float = 0.5
    pooled_shortcut: bool = False
    final_ratio: float = 0.0
    skip_gain: bool = True
    same_padding: bool = True
    gamma_in_kernels: bool = False
    reference: str = "authors"
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
        for name in ("stem_width", "group_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        _check_count("in_channels", self.in_channels)
        if self.num_classes != 0:
            _check_count("num_classes", self.num_classes)
        for depth in self.depths:
            _check_count("a depth", depth)
        for width in self.widths:
            _check_count("a width", width)
            self._check_inside(width)
        for name in ("drop_rate", "stochdepth_rate"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}, expected a number in [0, 1); 0 turns it off.")
        _check_choice("stem", self.stem, tuple(STEMS))
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_choice("reference", self.reference, REFERENCES)
        _check_choice("activation", self.activation, tuple(ACTIVATIONS))

    def _check_inside(self, width: int) -> None:
        inside = width * self.bottleneck_ratio
        if self.group_size is None and not inside.is_integer():
            raise ValueError(
                f"width {width} times the bottleneck ratio {self.bottleneck_ratio} is not "
                "whole; choose another width."
            )
        if self.group_size is not None and inside < self.group_size:
            raise ValueError(
                f"width {width} leaves {inside:g} channels inside a block, fewer than a group of "
                f"{self.group_size}; choose a larger width or a smaller group_size."
            )

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Output channels of each of the stem's convolutions."""
        last = self.widths[0] // 2 if self.stem_width is None else self.stem_width
        return (16, 32, 64, last) if self.stem == "deep" else (last,)

    @property
    def stem_tap(self) -> int:
        """Which of the stem's convolutions comes before its next stride: its finest features."""
        strides = STEMS[self.stem]
        later = [i for i, stride in enumerate(strides) if i > 0 and stride > 1]
        return (later[0] if later else len(self.stem_channels)) - 1

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Stride of each stage's first block."""
        return (2 if self.stem == "3x3_stride2" else 1, *[2] * (len(self.depths) - 1))

    @property
    def stride(self) -> int:
        """Pixels of the image along each side of one pixel of the last features."""
        total = 1
        for stride in (*STEMS[self.stem], *self.stage_strides):
            total *= stride
        return total

    def inside_width(self, in_channels: int, out_channels: int, first: bool) -> int:
        """Channels inside a block; `first` is the network's first block."""
        ratio = 1.0 if self.inverted and first else self.bottleneck_ratio
        width = ratio * (in_channels if self.inverted else out_channels)
        group = self.group_size or 1
        return int(width / group + 0.5) * group


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of 1 or more; give one.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} is {value!r}, expected one of {', '.join(choices)}; choose one of them."
        )
