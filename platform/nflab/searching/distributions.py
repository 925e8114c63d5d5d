"""Search spaces as Optuna's samplers see them: an ordered scale for each searched setting.

No clipping is the limit of large clipping, so it stands beyond the top of that scale: an octave
above the range means none. So the sampler sees one ordered number, not a switch and a number that
exists only at times.
"""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from nflab.settings.search_space import SearchSpace


def distributions(space: SearchSpace, searched: tuple[str, ...]) -> dict[str, BaseDistribution]:
    """What the sampler draws from."""
    smallest, largest = (size.bit_length() - 1 for size in space.batch_size)
    scales: dict[str, BaseDistribution] = {
        "clipping": FloatDistribution(space.clipping[0], 2 * space.clipping[1], log=True),
        "batch_size": IntDistribution(smallest, largest),
        "augmentation_level": IntDistribution(*space.augmentation_level),
    }
    return {name: scales[name] for name in searched}


def draw(space: SearchSpace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A draw that stands for `settings`: the inverse of `SearchSpace.settings` up to the octave of
    none."""
    drawn = dict(settings)
    if "clipping" in drawn and drawn["clipping"] is None:
        drawn["clipping"] = 2 * space.clipping[1]
    if "batch_size" in drawn:
        drawn["batch_size"] = drawn["batch_size"].bit_length() - 1
    return drawn
