"""What each dataset is trained with, and what is searched: every such number stands here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from nflab.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class SearchSpace:
    """Ranges of what a sweep searches, both ends included."""

    clipping: tuple[float, float]
    batch_size: tuple[int, int]
    """Powers of two."""
    augmentation_level: tuple[int, int]

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

    def distributions(self, searched: tuple[str, ...]) -> dict[str, BaseDistribution]:
        """What the sampler draws from: an ordered scale for each searched setting.

        No clipping is the limit of large clipping, so it stands beyond the top of that scale: an
        octave above the range means none. So the sampler sees one ordered number, not a switch
        and a number that exists only at times.
        """
        smallest, largest = (size.bit_length() - 1 for size in self.batch_size)
        scales: dict[str, BaseDistribution] = {
            "clipping": FloatDistribution(self.clipping[0], 2 * self.clipping[1], log=True),
            "batch_size": IntDistribution(smallest, largest),
            "augmentation_level": IntDistribution(*self.augmentation_level),
        }
        return {name: scales[name] for name in searched}

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a draw from `distributions` stands for."""
        settings = dict(drawn)
        if "clipping" in settings and settings["clipping"] > self.clipping[1]:
            settings["clipping"] = None
        if "batch_size" in settings:
            settings["batch_size"] = 2 ** settings["batch_size"]
        return settings

    def draw(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A draw that stands for `settings`: the inverse of `settings` up to the octave of none."""
        drawn = dict(settings)
        if "clipping" in drawn and drawn["clipping"] is None:
            drawn["clipping"] = 2 * self.clipping[1]
        if "batch_size" in drawn:
            drawn["batch_size"] = drawn["batch_size"].bit_length() - 1
        return drawn


@dataclass(frozen=True)
class Recipe:
    """A dataset's default configuration and search space."""

    config: Config
    space: SearchSpace


RECIPES = {
    # base_learning_rate: the smallest batch, 16, gets the paper's 0.1.
    "digits": Recipe(
        Config(optimizer=OptimizerConfig(base_learning_rate=1.6)),
        SearchSpace(clipping=(0.01, 0.64), batch_size=(16, 128), augmentation_level=(0, 10)),
    ),
    # The ablations of clipping (paper, section 4.1; the authors' released ResNet configuration).
    "imagenet": Recipe(
        Config(
            model=ModelConfig(model="dm_nf_resnet50"),
            data=DataConfig(dataset="imagenet"),
            optimizer=OptimizerConfig(
                batch_size=1024, clipping=0.01, weight_decay=1e-4, ema_decay=None
            ),
            schedule=ScheduleConfig(epochs=90, warmup_epochs=5),
        ),
        SearchSpace(clipping=(0.01, 0.16), batch_size=(256, 4096), augmentation_level=(0, 10)),
    ),
}
