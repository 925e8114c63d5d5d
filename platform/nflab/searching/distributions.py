"""Search spaces as Optuna's samplers see them: an ordered scale for each setting that has an order.

None is the limit of a range at the end that it is written at, as no clipping is of large clipping.
So it stands beyond that end, for an octave or a quarter of the range, and the sampler sees one
ordered number, not a switch and a number that exists only at times.
"""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from nflab.settings.search_space import Scale

Scales = Mapping[str, Scale]
"""By setting."""


def distributions(scales: Scales) -> dict[str, BaseDistribution]:
    """What the sampler draws from."""
    return {name: _distribution(scale) for name, scale in scales.items()}


def settings_of(scales: Scales, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a draw stands for."""
    return {name: _setting(scales[name], value) for name, value in drawn.items()}


def draw(scales: Scales, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A draw that stands for settings: the inverse of `settings_of`, up to what is none."""
    return {name: _draw(scales[name], value) for name, value in settings.items()}


def _distribution(scale: Scale) -> BaseDistribution:
    listed = _listed(scale)
    if listed is not None:
        return IntDistribution(0, len(listed) - 1)
    if not scale.ordered:
        return CategoricalDistribution(scale.choices)
    low, high = _ends(scale)
    log = scale.spacing == "log"
    if isinstance(scale.low, int):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _setting(scale: Scale, drawn: Any) -> Any:
    listed = _listed(scale)
    if listed is not None:
        return listed[drawn]
    if not scale.ordered:
        return drawn
    low, high = _range(scale)
    if (scale.none == "high" and drawn > high) or (scale.none == "low" and drawn < low):
        return None
    return 2**drawn if scale.spacing == "pow2" else drawn


def _draw(scale: Scale, setting: Any) -> Any:
    listed = _listed(scale)
    if listed is not None:
        return listed.index(setting)
    if not scale.ordered:
        return setting
    if setting is None:
        return _ends(scale)[scale.none == "high"]
    return setting.bit_length() - 1 if scale.spacing == "pow2" else setting


def _listed(scale: Scale) -> list[Any] | None:
    """The values in their order, which is drawn from by place: of a list of numbers, and of steps,
    which do not add up to the ends in floating-point numbers."""
    if scale.step is not None:
        none = [None]
        return none * (scale.none == "low") + scale.values() + none * (scale.none == "high")
    if not scale.ordered and all(type(choice) in (int, float) for choice in scale.choices):
        return list(scale.choices)
    return None


def _range(scale: Scale) -> tuple[float, float]:
    """Ends of the range that is drawn from, without what is none."""
    assert scale.low is not None
    assert scale.high is not None
    if scale.spacing == "pow2":
        return int(scale.low).bit_length() - 1, int(scale.high).bit_length() - 1
    return scale.low, scale.high


def _ends(scale: Scale) -> tuple[float, float]:
    """The same with it."""
    low, high = _range(scale)
    beyond = (high - low) / 4
    if isinstance(low, int):
        beyond = max(1, int(beyond))
    if scale.none == "high":
        high = 2 * high if scale.spacing == "log" else high + beyond
    if scale.none == "low":
        low = low / 2 if scale.spacing == "log" else low - beyond
        if isinstance(scale.low, int) and scale.spacing == "log":
            low = max(1, scale.low // 2)
    return low, high
