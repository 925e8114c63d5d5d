"""What a search draws each setting from, and how that is written.

`SETTING=VALUES`, where values are a range, or several of one kind, or both with `none`:

    base_learning_rate=0.05..1.6:log    a number, evenly by its logarithm
    augmentation_level=0..10            a whole number, where the setting is one
    batch_size=16..128:pow2             a power of two
    drop_rate=0..0.5:0.1                by steps of a tenth
    clipping=0.01..0.64:log,none        none stands beyond the end it is written at
    sam_rho=none,0.02..0.1:log
    ema_decay=none,0.99,0.999           one of these
    model=dm_nf_resnet50,nf_resnet50
    mixup                               on or off
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError

_SHARED = ("dataset", "bad_images", "subset", "epochs", "pretrained")
"""Settings that trials of one search have in common, for their curves are compared."""


@dataclass(frozen=True)
class Scale:
    """The values of one setting, in an order where they have one.

    Attributes:
        low, high: ends of the range, included; None where `choices` are all.
        spacing: how a range is drawn: evenly, evenly by logarithm, or as powers of two.
        step: distance of neighbours in an even range of `float` or `int`; None for the least.
        none: the end of the range beyond which none stands.
        choices: the values where there is no range.
    """

    low: float | None = None
    high: float | None = None
    spacing: Literal["even", "log", "pow2"] = "even"
    step: float | None = None
    none: Literal["low", "high"] | None = None
    choices: tuple[Any, ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether the values are a range."""
        return self.low is not None

    @property
    def ends(self) -> list[Any]:
        """The values that show whether all may be used."""
        if not self.ordered:
            return list(self.choices)
        return [self.low, self.high, *([None] if self.none else [])]

    def values(self) -> list[Any]:
        """All of them but none; of a range, of whole numbers or by steps."""
        if not self.ordered:
            return list(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.spacing == "pow2":
            exponents = range(int(self.low).bit_length() - 1, int(self.high).bit_length())
            return [2**k for k in exponents]
        # In decimals, as they are written: 0.1 + 0.2 is 0.3.
        low, high, step = (Decimal(str(one)) for one in (self.low, self.high, self.step or 1))
        return [type(self.low)(low + k * step) for k in range(int((high - low) / step) + 1)]

    def __contains__(self, value: Any) -> bool:
        """Whether a search may draw a value."""
        if value is None and self.none is not None:
            return True
        if self.low is None or self.high is None or self.spacing == "pow2" or self.step is not None:
            return value in self.values()
        return value is not None and self.low <= value <= self.high

    def __str__(self) -> str:
        """In words."""
        if not self.ordered or self.spacing == "pow2":
            none = [None] if self.none else []
            return ", ".join(_word(value) for value in [*self.values(), *none])
        by = f" by {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{by}" + (", or none" if self.none else "")


@dataclass(frozen=True)
class SearchSpace:
    """What a recipe searches, and what its ablations compare."""

    scales: Mapping[str, Scale]
    """By setting."""
    clippings: tuple[float, ...] = ()
    """Those that ablations compare."""
    lookahead: int = 4
    """Trials that a search runs at once, at most (see `SearchConfig`)."""

    def batch_sizes(self) -> list[int]:
        """Every batch size that may be proposed."""
        return self.scales["batch_size"].values()


def scales(texts: Sequence[str]) -> dict[str, Scale]:
    """Scales by setting, from their texts.

    Raises:
        ConfigError: a text is none, or names no setting that can be searched.
    """
    found: dict[str, Scale] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if name in found:
            raise ConfigError(f"{name} is searched twice: write all of its values in one")
        found[name] = _scale(name, values if equals else None)
    return found


def tried(texts: Sequence[str], within: Mapping[str, Scale]) -> list[dict[str, Any]]:
    """Settings to begin with, from their texts.

    Args:
        within: what is searched.

    Raises:
        ConfigError: a text is none, or names what is not searched.
    """
    found = []
    for text in texts:
        one: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if not equals or name in one:
                raise ConfigError(f"--try {text}: write SETTING=VALUE,OTHER=VALUE, each once")
            if name not in within:
                raise ConfigError(f"--try {text}: {name} is not searched: give it as a flag")
            one[name] = setting(name, value)
            if one[name] not in within[name]:
                raise ConfigError(f"--try {text}: {name} is searched in {within[name]}")
        found.append(one)
    return found


def setting(name: str, text: str) -> Any:
    """A setting from MLflow's text of it.

    Raises:
        ConfigError: it is none.
    """
    kind, absent = _kind(name)
    if text == "none" and absent:
        return None
    if kind is bool:
        if text not in ("True", "False"):
            raise ConfigError(f"{name} {text} must be True or False")
        return text == "True"
    try:
        value = kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(
            f"{name} {text} must be {expected}{', or none' if absent else ''}"
        ) from None
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} {text} must be finite")
    return value


def _scale(name: str, text: str | None) -> Scale:
    kind, absent = _kind(name)
    if text is None:
        if kind is not bool:
            raise ConfigError(
                f"{name} has no values to search: write {name}=LOW..HIGH or {name}=ONE,OTHER"
            )
        return Scale(choices=(False, True))
    items = text.split(",")
    ranges = [n for n, item in enumerate(items) if ".." in item]
    if not ranges:
        choices = tuple(setting(name, item) for item in items)
        if len(set(choices)) < len(choices):
            raise ConfigError(f"{name}={text} has a value twice")
        if all(type(choice) in (int, float) for choice in choices):
            choices = tuple(sorted(choices))  # their order is a scale
        if len(choices) < 2:
            raise ConfigError(f"{name}={text} is one value, not a search: give it as a flag")
        return Scale(choices=choices)
    none: Literal["low", "high"] | None = None
    if len(items) == 2 and len(ranges) == 1 and items[1 - ranges[0]] == "none" and absent:
        none = "high" if ranges[0] == 0 else "low"
    elif len(items) > 1:
        raise ConfigError(
            f"{name}={text} mixes a range with other values: only none may stand beside a range, "
            f"where the setting may be none"
        )
    return _range(name, kind, items[ranges[0]], none)


def _range(name: str, kind: type, text: str, none: Literal["low", "high"] | None) -> Scale:
    if kind not in (int, float):
        raise ConfigError(f"{name}={text}: {name} is no number, so it has no range")
    ends, *more = text.split(":")
    low, high = (setting(name, end) for end in ends.split("..", 1))
    if low is None or high is None:
        raise ConfigError(f"{name}={text} must be a range of two numbers")
    if not low < high:
        what = "one point" if low == high else "upside down"
        raise ConfigError(f"{name}={text} is {what}: write the smaller end first")
    spacing: Literal["even", "log", "pow2"] = "even"
    step = None
    for word in more:
        if word in ("log", "pow2"):
            spacing = word  # type: ignore[assignment]
        else:
            step = setting(name, word)
            if step is None or not 0 < step <= high - low:
                raise ConfigError(f"{name}={text}: a step must be above 0 and within the range")
    if spacing != "even" and (low <= 0 or step is not None):
        raise ConfigError(f"{name}={text}: by logarithm a range begins above 0 and has no step")
    powers = all(end == 2 ** (int(end).bit_length() - 1) for end in (low, high))
    if spacing == "pow2" and (kind is not int or not powers):
        raise ConfigError(f"{name}={text}: pow2 is for whole numbers between two powers of two")
    return Scale(low, high, spacing, step, none)


def _kind(name: str) -> tuple[type, bool]:
    """The type of a setting, and whether it may be none.

    Raises:
        ConfigError: it cannot be searched.
    """
    parts = typing.get_type_hints(Config)
    hints = {part: typing.get_type_hints(kind) for part, kind in parts.items()}
    known = {leaf: hint for leaves in hints.values() for leaf, hint in leaves.items()}
    may_be = known.keys() - {*hints["scale"], *hints["run"], *_SHARED}
    if name not in known:
        close = difflib.get_close_matches(name, may_be, 1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown setting {name!r} to search{guess}")
    if name not in may_be:
        why = "trials are compared by it" if name in _SHARED else "no result depends on it"
        raise ConfigError(f"{name} cannot be searched: {why}")
    hint = known[name]
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        options: tuple[Any, ...] = (hint,)
    else:
        options = typing.get_args(hint)
    kinds = [option for option in options if option is not type(None)]
    if kinds[0] not in (bool, int, float, str):
        raise ConfigError(f"{name} is a list, which cannot be searched")
    return kinds[0], len(kinds) < len(options)


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
