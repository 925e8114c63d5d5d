"""What a sweep searches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SearchSpace:
    """Ranges of what a sweep searches, both ends included."""

    clipping: tuple[float, float]
    batch_size: tuple[int, int]
    """Powers of two."""
    augmentation_level: tuple[int, int]
    clippings: tuple[float, ...]
    """Those that ablations compare."""
    lookahead: int = 4
    """Trials that a search runs at once, at most (see `SearchConfig`)."""

    def names(self) -> list[str]:
        """Settings that can be searched."""
        return ["clipping", "batch_size", "augmentation_level"]

    def batch_sizes(self) -> list[int]:
        """Every batch size that may be proposed."""
        low, high = self.batch_size
        return [2**k for k in range(low.bit_length() - 1, high.bit_length())]

    def describe(self, name: str) -> str:
        """The range of a setting in words."""
        if name == "batch_size":
            return ", ".join(str(size) for size in self.batch_sizes())
        low, high = getattr(self, name)
        return f"{low:g} to {high:g}" + (", or none" if name == "clipping" else "")

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a draw of `searching.distributions` stands for: a clipping beyond the
        range is none, and of a batch size the power of two is drawn."""
        settings = dict(drawn)
        if "clipping" in settings and settings["clipping"] > self.clipping[1]:
            settings["clipping"] = None
        if "batch_size" in settings:
            settings["batch_size"] = 2 ** settings["batch_size"]
        return settings


def setting(name: str, text: str) -> float | int | None:
    """A searched setting from MLflow's text of it."""
    if text == "none":
        return None
    return float(text) if name == "clipping" else int(text)
