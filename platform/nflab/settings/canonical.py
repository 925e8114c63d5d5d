"""One way to write settings that compute the same."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import nfnet
from nflab.settings.config import Config
from nflab.settings.leaves import flat

UNREAD: dict[str, dict[str, Any]] = {
    "augmentation_layers": {"augmentation_level": 0},
    "sam_fraction": {"sam_rho": None},
    "unclipped": {"clipping": None},
    "partners": {"mixup": False, "cutmix": False},
}
"""Setting -> the values of others with which nothing reads it."""

_FLOATS = {
    name
    for part in get_type_hints(Config).values()
    for name, kind in get_type_hints(part).items()
    if kind in (float, float | None)
}

_ORDER = ("stem", "stage", "final_conv", "head")


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run so that what nothing reads has its default, sets of parts have the
    network's order, and numbers have their type.

    Args:
        settings: leaf name -> value, of all parts that say what is computed.
    """
    found, default = dict(settings), flat(Config())
    for name, others in UNREAD.items():
        if name in found and all(found[other] == value for other, value in others.items()):
            found[name] = default[name]
    sizes = nfnet.preprocessing(found["model"])
    if sizes.train_size == sizes.test_size == found["image_size"]:
        found["image_size"] = None
    for name in ("unclipped", "frozen"):
        found[name] = sorted(set(found[name]), key=_place)
    for name in _FLOATS & found.keys():
        found[name] = None if found[name] is None else float(found[name])
    return found


def is_read(config: Config, name: str) -> bool:
    """Whether a setting of a configuration changes anything beside the others."""
    settings = flat(config)
    others = UNREAD.get(name)
    return others is None or any(settings[other] != value for other, value in others.items())


def _place(part: str) -> tuple[int, str]:
    """Where a part stands in a network."""
    kind = part.rstrip("0123456789")
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), part
